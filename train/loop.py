"""`s4v train`: the loop over epochs, from planned batches to checkpoints."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from ..errors import ConfigError, EnvironmentFailedError
from ..store._files import write_json
from ..store.reader import StoreReader, open_store
from .clips import (
    ClipBatch,
    ClipLoader,
    codec_for,
    plan_training_epoch,
    resolve_clip_frames,
)
from .config import TrainConfig
from .heads import HeadConfig, build_head, plan_head
from .logs import make_loggers
from .presets import resolve_preset
from .recipe import learning_rate_at, make_optimizer, set_learning_rate
from .run import (
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
)
from .state import STATE_NAME, Position, load_state, save_state
from .tasks import TASKS, Task

ReportEpoch = Callable[[dict[str, Any], int], None]
"""Called after each epoch with its metrics and the number of epochs."""

_log = logging.getLogger(__name__)

_FABRIC_PRECISION = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


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
        StoreMismatchError: If the store lacks what the head reads, or has no labelled training video.
        RunExistsError: If the run's folder holds anything; with `resume`, if it was begun with other settings.
        EnvironmentFailedError: If the loss is not finite; the last good checkpoint is kept.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    can_resume = config.resume and (config.out / CONFIG_NAME).is_file()
    if is_first and not can_resume:
        refuse_existing_run(config.out)
    store = open_store(config.features)
    config = resolve_preset(config, store)
    head_config = plan_head(
        config.head,
        store,
        layers=config.layers,
        side_width=config.side_width,
        inputs=config.inputs,
        task=config.task,
        interaction=config.interaction,
    )
    task = TASKS[config.task](config, store)
    available = np.concatenate([task.training.num_cached_frames, task.validation.num_cached_frames])
    frames = resolve_clip_frames(config.frames, available, store, task.default_frames)
    # Before anything is written: it may not fit.
    torch.manual_seed(config.seed)
    module = build_head(head_config)
    if config.init is not None:
        begin_with(config.init, module)
    text_arrays = task.prepare_head(module)
    fabric = _make_fabric(config)
    assert config.batch_size is not None
    if config.task == "retrieval" and config.batch_size * fabric.world_size < 2:
        raise ConfigError("a step of one pair has no negatives, and teaches nothing: --batch-size 2 or more")
    run = plan_run(config, frames, head_config, store, task.training.rows, fabric.world_size)
    fabric.barrier()  # no process looks at what the first one is about to write
    if fabric.is_global_zero:
        require_same_run(run) if can_resume else create_run(run)
    fabric.barrier()
    return _Training(config, run, head_config, store, task, module, text_arrays, fabric).fit(report)


class _Training:
    """One run from its first epoch, or from where it was killed, to its last."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        head_config: HeadConfig,
        store: StoreReader,
        task: Task,
        module: Any,
        text_arrays: tuple[str, ...],
        fabric: Fabric,
    ) -> None:
        self._config = config
        self._run = run
        self._layers = head_config.layers
        self._store = store
        self._task = task
        self._fabric = fabric
        self._module = module
        if config.checkpoint_activations:
            self._module.checkpoints_activations = True
        if config.with_compile:
            self._module.compile()
        self._head, self._optimizer = fabric.setup(self._module, make_optimizer(self._module, config))
        self._codec = codec_for(store, head_config.layers, fabric.device) if "patches" in self._module.arrays else None
        self._loader = ClipLoader(
            store,
            arrays=self._module.arrays,
            layers=head_config.layers,
            device=fabric.device,
            text_arrays=text_arrays,
        )
        self._position = Position()
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
        assert config.batch_size is not None
        plans = plan_training_epoch(
            self._task.training,
            num_frames=self._run.frames,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=self._fabric.global_rank,
            num_ranks=self._fabric.world_size,
        )
        # Like clips that do not fill a batch, batches that do not fill a step are left out of an epoch.
        accumulate = min(config.accumulate, len(plans))
        num_steps = len(plans) // accumulate

        def rate_at(step: int) -> float:
            # The middle of the step: at its end, the last step of a run would have a rate of zero.
            return learning_rate_at(epoch + (step + 0.5) / num_steps, config)

        self._head.train()
        batches = self._loader.load(plans[position.step_in_epoch * accumulate : num_steps * accumulate])
        began, waited = time.perf_counter(), self._wait_s
        for step in range(position.step_in_epoch, num_steps):
            set_learning_rate(self._optimizer, rate_at(step))
            position.losses.append(self._step(batches, accumulate))
            position.steps += 1
            position.step_in_epoch = step + 1
            if step % 50 == 49 or step + 1 == num_steps:
                self._require_finite(position.losses[-50:], epoch, plans[step * accumulate].rows)
            is_due = time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
            if is_due and step + 1 < num_steps and self._fabric.is_global_zero:
                self._require_finite(position.losses[-50:], epoch, plans[step * accumulate].rows)
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
                output = self._head(batch.pixels, batch.patches, batch.cls, self._codec)
                loss = self._task.compute_loss(self._module, output, batch, self._gather)
                self._fabric.backward(loss / accumulate)
            losses.append(loss.detach())
        if self._config.clip_norm is not None:
            # What is not finite is told by the loss and the weights; under fp16 such a step is left out, not an error.
            self._fabric.clip_gradients(
                self._head, self._optimizer, max_norm=self._config.clip_norm, error_if_nonfinite=False
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        mean: torch.Tensor = self._fabric.all_reduce(torch.stack(losses).mean(), reduce_op="mean")  # type: ignore[assignment]
        return mean

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, ...) of this process to those of all, (B of all, ...), in the order of the processes."""
        if self._fabric.world_size == 1:
            return values
        gathered: torch.Tensor = self._fabric.all_gather(values, sync_grads=True)  # type: ignore[assignment]
        return gathered.flatten(0, 1)

    def _validate(self, epoch: int) -> dict[str, float]:
        if not len(self._task.validation) or not self._fabric.is_global_zero:
            return {}
        try:
            return self._task.validate(
                self._module, layers=self._layers, num_frames=self._run.frames, device=self._fabric.device
            )
        except EnvironmentFailedError:
            self._stop_as_diverged("a validation score", epoch, "")

    def _require_finite(self, losses: list[torch.Tensor], epoch: int, rows: np.ndarray) -> None:
        """Checked every 50 steps: asking a GPU for each loss would hold it up."""
        if not bool(torch.isfinite(torch.stack(losses)).all()):
            ids = self._store.read_manifest(["video_id"])["video_id"].take(rows[:3]).to_pylist()
            self._stop_as_diverged("the loss", epoch, f" (videos {', '.join(ids)}, ...)")

    def _require_finite_weights(self, epoch: int) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._module.state_dict().values()):
            self._stop_as_diverged("a weight", epoch, "")

    def _stop_as_diverged(self, what: str, epoch: int, where: str) -> NoReturn:
        kept = self._run.path / "last.safetensors"
        hint = f"{kept} is the last good checkpoint." if kept.exists() else "No epoch was finished."
        raise EnvironmentFailedError(
            f"{what} became NaN or infinite in epoch {epoch + 1}, at or before step {self._position.steps}{where}. "
            f"Lower --learning-rate. {hint}"
        )


def _make_fabric(config: TrainConfig) -> Fabric:
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(config.device)
    if accelerator is None:
        raise ConfigError(f"--device takes auto, cpu, cuda, mps; found {config.device!r}")
    on_gpu = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    precision = config.precision
    if precision is None:
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "fp32"
    elif precision == "fp16" and not on_gpu:
        # Fabric would take bf16 instead, with a mere note.
        raise ConfigError("--precision fp16 needs a CUDA GPU here: use bf16 or fp32")
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // num_local
    is_spread = TorchElasticEnvironment.detect()
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=num_local if is_spread else 1,
            num_nodes=num_nodes if is_spread else 1,
            strategy="ddp" if is_spread else "auto",
            precision=_FABRIC_PRECISION[precision],  # type: ignore[arg-type]
            # Without torchrun one process, whatever a cluster's variables say: inside a job of several tasks Fabric
            # would look for them.
            plugins=[TorchElasticEnvironment() if is_spread else LightningEnvironment()],
        )
        fabric.launch()
        return fabric
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {config.device} is not available here ({reason}). Use --device auto.") from error
