"""`s4v train`: the loop over epochs, from planned batches to checkpoints."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from ..device import DEVICES, find_auto_device
from ..errors import ConfigError, EnvironmentFailedError
from ..files import write_json
from ..store.reader import StoreReader, open_store
from .clips import (
    ClipBatch,
    ClipLoader,
    ClipPlan,
    codec_for,
    find_clip_lengths,
    require_long_clips,
    resolve_clip_frames,
    warn_of_short_splits,
    warn_of_thinned_clips,
)
from .config import TrainConfig
from .logs import make_loggers, require_wandb
from .networks import find_network
from .networks.contract import Network
from .recipe import learning_rate_at, make_optimizer, set_learning_rate
from .resume_state import STATE_NAME, Position, load_state, save_state
from .run_folder import (
    CONFIG_NAME,
    Run,
    append_metrics,
    begin_with,
    create_run,
    cut_metrics,
    plan_run,
    refuse_existing_run,
    require_same_run,
    save_checkpoint,
    validates_every_clip,
)
from .scorer import Scorer, Team, explain_full_device
from .settings import find_optimisation, plan_network, resolve_preset, resolve_views
from .tasks import find_task
from .tasks.contract import Task

ReportEpoch = Callable[[dict[str, Any], int], None]
"""Called after each epoch with its metrics and the number of epochs."""

_log = logging.getLogger(__name__)

# A GPU is asked for its losses so often: each time holds it up.
_CHECK_EVERY = 50

_MOST_NAMED = 32


def default_run_path(features: Path, head: str, *, resume: bool = False, folder: Path = Path("runs")) -> Path:
    """`runs/STORE-HEAD`, with a number behind it where that is taken; to resume, the last one that is there."""
    stem = folder / f"{features.name.removesuffix('.zarr')}-{head}"
    taken = None
    for number in itertools.count(1):
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        if not path.exists():
            return taken if resume and taken is not None else path
        taken = path
    raise AssertionError


def train_run(config: TrainConfig, report: ReportEpoch = lambda *_: None) -> dict[str, Any]:
    """Train a head on a store and leave a run's folder.

    Under `torchrun` every process takes clips of its own in each step; the first one writes.

    Args:
        config: What to train, and how.
        report: Told about each epoch.

    Returns:
        run, preset, epochs, best (metrics of the best epoch), last, parameters, seconds, data_wait_share.

    Raises:
        StoreMismatchError: If the store lacks what the head reads, has no labelled training video, or its clips are
            shorter than was asked for.
        RunExistsError: If the run's folder holds anything; with `resume`, if it was begun with other settings.
        EnvironmentFailedError: If the loss is not finite, the last good checkpoint is kept; or if the device's memory
            does not suffice.
    """
    with explain_full_device(
        "train with --checkpoint-activations, or with a smaller --batch-size and more of --accumulate"
    ):
        return _train_run(config, report)


def _train_run(config: TrainConfig, report: ReportEpoch) -> dict[str, Any]:
    is_first = int(os.environ.get("RANK", "0")) == 0
    can_resume = config.resume and (config.out / CONFIG_NAME).is_file()
    if is_first and not can_resume:
        refuse_existing_run(config.out)
    require_wandb(config)
    num_processes = int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else 1
    device_type, precision = resolve_device(config)
    config = replace(config, precision=precision)  # type: ignore[arg-type]
    store = open_store(config.features)
    is_auto = config.preset == "auto"
    config = resolve_preset(config, store, num_processes=num_processes)
    shape = plan_network(config, store)
    kind, task = find_network(config.head), find_task(config.task)(config, store)
    if can_resume and validates_every_clip(config.out):
        task.validation = task.find_rows(store, config.val_split)
    config = replace(config, views_per_video=resolve_views(config, task.training.num_views, num_processes))
    frames = _resolve_frames(config, store, task, is_told=is_auto and config.preset != "none")
    warn_of_short_splits(store, frames, {config.train_split, config.val_split}, task.find_rows)
    assert config.batch_size is not None
    task.check_step(config.batch_size * num_processes)
    kind.check_step(min(config.batch_size, len(task.training) // num_processes) * num_processes)
    # Before anything is written: it may not fit.
    torch.manual_seed(config.seed)
    network = kind.build(shape)
    if config.init is not None and not (can_resume and (config.out / STATE_NAME).is_file()):
        begin_with(config.init, network)
    network.prepare(store)
    task.begin(network)
    fabric = _make_fabric(config, device_type)
    run = plan_run(
        config,
        frames,
        shape,
        store,
        task.training.rows,
        num_processes=fabric.world_size,
        device_type=device_type,
    )
    fabric.barrier()  # no process looks at what the first one is about to write
    if fabric.is_global_zero:
        require_same_run(run, config) if can_resume else create_run(run)
    fabric.barrier()
    return _Training(config, run, store, task, network, fabric).fit(report)


def _resolve_frames(config: TrainConfig, store: StoreReader, task: Task, *, is_told: bool) -> int:
    """T, which neither training rows nor evaluation clips may fall short of; whether fewer than usual are told."""
    held = np.concatenate([task.training.num_cached_frames, task.validation.num_cached_frames])
    if config.frames is None:
        lengths = find_clip_lengths(task.validation, only_first=task.reads_first_clips)
        held = np.concatenate([held, lengths])
    frames = resolve_clip_frames(config.frames, held, store, task.default_frames)
    require_long_clips(task.validation, frames, store, only_first=task.reads_first_clips)
    warn_of_thinned_clips(task.validation, frames, store, only_first=task.reads_first_clips)
    if is_told and config.frames is None and frames < task.default_frames:
        _log.warning(
            "clips of %d frames: rows of %s hold no more; %s is trained with %d (--frames)",
            frames,
            store.path,
            config.preset,
            task.default_frames,
        )
    return frames


class _Training:
    """One run from its first epoch, or from where it was killed, to its last."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        store: StoreReader,
        task: Task,
        network: Network,
        fabric: Fabric,
    ) -> None:
        self._config = config
        self._run = run
        self._layers = layers = run.shape.layers
        self._optimisation = find_optimisation(config)
        self._store = store
        self._task = task
        self._fabric = fabric
        self._module = network
        if config.checkpoint_activations:
            self._module.checkpoints_activations = True
        if config.with_compile:
            self._module.compile()
        optimizer = make_optimizer(network.parameter_groups(), config, self._optimisation)
        self._head, self._optimizer = fabric.setup(network, optimizer)
        self._codec = codec_for(store, layers, fabric.device) if "patches" in network.arrays else None
        self._loader = ClipLoader.for_network(network, store, layers=layers, device=fabric.device, with_texts=True)
        self._position = Position()
        self._own_losses: list[torch.Tensor] = []  # of this process, since all were last found finite
        self._saved_at = time.monotonic()
        self._began = time.perf_counter()
        self._wait_s = 0.0
        self._wait_share = 0.0

    @property
    def _state_path(self) -> Path:
        return self._run.path / STATE_NAME

    def fit(self, report: ReportEpoch) -> dict[str, Any]:
        start = time.perf_counter()
        if self._config.resume:
            self._go_on()
        self._began = start - self._position.seconds
        loggers = make_loggers(self._run, self._config, self._position.epoch) if self._fabric.is_global_zero else []
        num_epochs, patience = self._config.epochs, self._config.patience
        assert num_epochs is not None
        while (epoch := self._position.epoch) < num_epochs and not self._is_out_of_patience(patience):
            metrics = {"epoch": epoch + 1, **self._train_epoch(epoch)}
            self._require_finite_weights(epoch)
            is_validated = (epoch + 1) % self._config.validate_every == 0 or epoch + 1 == num_epochs
            metrics = self._fabric.broadcast({**metrics, **(self._validate(epoch) if is_validated else {})})
            is_best = self._note_epoch(metrics)
            if self._fabric.is_global_zero:
                append_metrics(self._run, metrics)
                for log in loggers:
                    log(metrics)
                save_checkpoint(self._run, "last", self._module, metrics)
                if is_best:
                    save_checkpoint(self._run, "best", self._module, metrics)
                self._save_state()
                # Times differ from run to run: they are told, and not kept among the metrics.
                report({**metrics, "data_wait_share": round(self._wait_share, 4)}, num_epochs)
            self._fabric.barrier()
        summary = self._summarise(time.perf_counter() - start)
        if self._fabric.is_global_zero:
            write_json(self._run.path / "stats.json", summary)
        return summary

    def _summarise(self, seconds: float) -> dict[str, Any]:
        """What a run comes to; its seconds are those of all its parts, as far as their states were saved."""
        return {
            "run": str(self._run.path),
            "preset": self._config.preset,
            "epochs": self._position.epoch,
            "videos": {
                name: len(np.unique(data.rows))
                for name, data in (("train", self._task.training), ("val", self._task.validation))
            },
            "steps": self._position.steps,
            "best": self._position.best,
            "last": self._position.metrics,
            "parameters": sum(p.numel() for p in self._module.parameters()),
            "seconds": round(self._position.seconds, 3),
            "data_wait_share": round(self._wait_s / seconds, 4),
        }

    def _go_on(self) -> None:
        """Be where the run was when its state was last saved; at the start, if it never was."""
        if self._state_path.is_file():
            self._load_state()
        if self._fabric.is_global_zero:
            cut_metrics(self._run, self._position.epoch)

    def _load_state(self) -> None:
        self._position, precision = load_state(self._state_path, self._module, self._optimizer.optimizer)
        self._position.losses = [loss.to(self._fabric.device) for loss in self._position.losses]
        self._fabric.strategy.precision.load_state_dict(precision)
        _log.info("going on in epoch %d, step %d", self._position.epoch + 1, self._position.step_in_epoch)

    def _save_state(self) -> None:
        precision = self._fabric.strategy.precision.state_dict()
        self._position.seconds = time.perf_counter() - self._began
        save_state(self._state_path, self._position, self._module, self._optimizer.optimizer, precision)
        self._saved_at = time.monotonic()

    def _note_epoch(self, metrics: dict[str, Any]) -> bool:
        """Stand after an epoch; whether none was better. Of equals the later one is the best.

        An epoch that was not validated is the best only as long as none was.
        """
        old, found = self._position, metrics.get(self._task.figure)
        highest = None if old.best is None else old.best.get(self._task.figure)
        is_best = highest is None or (found is not None and found >= highest)
        is_better = highest is None or (found is not None and found > highest)
        self._position = Position(
            epoch=metrics["epoch"],
            steps=old.steps,
            best=metrics if is_best else old.best,
            improved=metrics["epoch"] if is_better else old.improved,
            metrics=metrics,
            seconds=old.seconds,
        )
        return is_best

    def _is_out_of_patience(self, patience: int | None) -> bool:
        """Whether the last epoch was validated, and so many went by since a better one."""
        is_told = self._task.figure in self._position.metrics
        return patience is not None and is_told and self._position.epoch - self._position.improved >= patience

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config, position = self._config, self._position
        plans = self._task.plan_epoch(
            epoch, num_frames=self._run.frames, rank=self._fabric.global_rank, num_ranks=self._fabric.world_size
        )
        # Like clips that do not fill a batch, batches that do not fill a step are left out of an epoch.
        accumulate = min(config.accumulate, len(plans))
        num_steps = len(plans) // accumulate

        def rate_at(step: int) -> float:
            # The middle of the step: at its end, the last step of a run would have a rate of zero.
            return learning_rate_at(epoch + (step + 0.5) / num_steps, config, self._optimisation.schedule)

        self._head.train()
        batches = self._loader.load(plans[position.step_in_epoch * accumulate : num_steps * accumulate])
        began, waited = time.perf_counter(), self._wait_s
        for step in range(position.step_in_epoch, num_steps):
            set_learning_rate(self._optimizer, rate_at(step))
            position.losses.append(self._step(batches, accumulate))
            position.steps += 1
            position.step_in_epoch = step + 1
            if step % _CHECK_EVERY == _CHECK_EVERY - 1 or step + 1 == num_steps:
                self._require_finite(epoch, plans, accumulate)
            is_due = time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
            if is_due and step + 1 < num_steps and self._fabric.is_global_zero:
                self._require_finite(epoch, plans, accumulate)
                self._require_finite_weights(epoch)
                self._save_state()
        train_loss = float(torch.stack(position.losses).mean())
        self._wait_share = (self._wait_s - waited) / (time.perf_counter() - began)
        return {"train_loss": train_loss, "learning_rate": rate_at(num_steps - 1)}

    def _step(self, batches: Iterator[ClipBatch], accumulate: int) -> torch.Tensor:
        """One step of the optimiser on `accumulate` batches; the mean loss of all processes, ()."""
        losses = []
        for place in range(accumulate):
            start = time.perf_counter()
            batch = next(batches)
            self._wait_s += time.perf_counter() - start
            with self._fabric.no_backward_sync(self._head, enabled=place + 1 < accumulate):
                output = self._head(*self._module.inputs(batch), self._codec)
                loss = self._task.compute_loss(self._module, output, batch, self._gather)
                for own in self._module.own_losses(output, batch).values():
                    loss = loss + own
                self._fabric.backward(loss / accumulate)
            losses.append(loss.detach())
        if self._config.clip_norm is not None:
            # What is not finite is told by the loss and the weights; under fp16 such a step is left out, not an error.
            self._fabric.clip_gradients(
                self._head, self._optimizer, max_norm=self._config.clip_norm, error_if_nonfinite=False
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        mean = torch.stack(losses).mean()
        self._own_losses.append(mean.clone())
        if self._fabric.world_size > 1:
            # Not Fabric's, which waits for all processes first: this one is only queued on a GPU.
            dist.all_reduce(mean)
            mean /= self._fabric.world_size
        return mean

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, ...) of this process to those of all, (B of all, ...), in the order of the processes."""
        if self._fabric.world_size == 1:
            return values
        gathered: torch.Tensor = self._fabric.all_gather(values, sync_grads=True)  # type: ignore[assignment]
        return gathered.flatten(0, 1)

    def _validate(self, epoch: int) -> dict[str, float]:
        """Every process scores its share of the clips, in the precision of training."""
        if not len(self._task.validation):
            return {}
        fabric = self._fabric
        try:
            assert self._config.batch_size is not None
            scorer = Scorer(
                self._module,
                self._store,
                layers=self._layers,
                num_frames=self._run.frames,
                batch_size=self._config.batch_size,
                device=fabric.device,
                team=Team(fabric.global_rank, fabric.world_size, fabric.autocast),
            )
            return self._task.validate(scorer)
        except EnvironmentFailedError:
            self._stop_as_diverged("a validation score", epoch, f"at or before step {self._position.steps}")

    def _require_finite(self, epoch: int, plans: Sequence[ClipPlan], accumulate: int) -> None:
        """Check the losses since the last time; the first bad one names its step and the videos of its batches."""
        position, own = self._position, self._own_losses
        first = len(position.losses) - len(own)
        if not own or bool(torch.isfinite(torch.stack(position.losses[first:])).all()):
            own.clear()
            return
        bad = next(place for place, loss in enumerate(position.losses[first:]) if not bool(torch.isfinite(loss)))
        step = first + bad  # in this epoch
        where = f"in step {position.steps - len(position.losses) + step + 1}"
        if bool(torch.isfinite(own[bad])):
            where += " (on the videos of another process)"
        else:
            batches = plans[step * accumulate : (step + 1) * accumulate]
            rows = list(dict.fromkeys(np.concatenate([plan.rows for plan in batches]).tolist()))
            ids = self._store.read_manifest(["video_id"])["video_id"].take(rows[:_MOST_NAMED]).to_pylist()
            more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
            where += f" (videos {', '.join(ids)}{more})"
        self._stop_as_diverged("the loss", epoch, where)

    def _require_finite_weights(self, epoch: int) -> None:
        finite = [torch.isfinite(tensor).all() for tensor in self._module.state_dict().values()]
        if not bool(torch.stack(finite).all()):
            self._stop_as_diverged("a weight", epoch, f"at or before step {self._position.steps}")

    def _stop_as_diverged(self, what: str, epoch: int, where: str) -> NoReturn:
        kept = self._run.path / "last.safetensors"
        hint = f"{kept} is the last good checkpoint." if kept.exists() else "No epoch was finished."
        raise EnvironmentFailedError(
            f"{what} became NaN or infinite in epoch {epoch + 1}, {where}. Lower --learning-rate. {hint}"
        )


class _InputsAsTheyAre(MixedPrecision):
    """Mixed precision that leaves inputs alone: Fabric's makes a half-precision copy of every token and pixel.

    Autocast converts what a product takes; tokens above 65,504 would be infinite in float16 before their norm.
    """

    def convert_input(self, data: Any) -> Any:
        """The same."""
        return data


def resolve_device(config: TrainConfig) -> tuple[str, str]:
    """The type of the device that a training runs on, and its precision.

    Raises:
        ConfigError: If there is no such device type, or it does not have the precision.
    """
    if config.device not in DEVICES:
        raise ConfigError(f"--device takes {', '.join(DEVICES)}; found {config.device!r}")
    device_type, precision = config.device, config.precision
    if device_type == "auto":
        # Processes of torchrun cannot share an MPS device.
        device_type = find_auto_device(may_be_mps=not TorchElasticEnvironment.detect())
    if precision == "fp16" and device_type != "cuda":
        # Fabric would take bf16 instead, with a mere note.
        raise ConfigError("--precision fp16 needs a CUDA GPU here: use bf16 or fp32")
    if precision is None:
        precision = "fp32"
        if device_type == "cuda" and torch.cuda.is_available():
            # Older GPUs emulate bfloat16, many times slower.
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device_type, precision


def _make_fabric(config: TrainConfig, device_type: str) -> Fabric:
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // num_local
    is_spread = TorchElasticEnvironment.detect()
    # Without torchrun one process, whatever a cluster's variables say: inside a job of several tasks Fabric would look
    # for them.
    plugins: list[Any] = [TorchElasticEnvironment() if is_spread else LightningEnvironment()]
    if config.precision != "fp32":
        plugins.append(_InputsAsTheyAre("bf16-mixed" if config.precision == "bf16" else "16-mixed", device_type))
    try:
        fabric = Fabric(
            accelerator=device_type,
            devices=num_local if is_spread else 1,
            num_nodes=num_nodes if is_spread else 1,
            strategy="ddp" if is_spread else "auto",
            plugins=plugins,
        )
        fabric.launch()
        return fabric
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {config.device} is not available here ({reason}). Use --device auto.") from error
