"""`s4v train`: the loop over epochs, from planned batches to checkpoints."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from ..errors import EnvironmentFailedError
from ..files import write_json
from ..progress import Report
from ..store.reader import StoreReader
from .bad_rows import BadRows
from .batches import StepShares
from .clips import ClipBatch, ClipLoader, ClipPlan, codec_for
from .config import TrainConfig
from .fabric import make_norm_groups
from .logs import Logger, make_loggers
from .mixing import Mixing, codec_after
from .networks import find_network
from .networks.contract import Network, NetworkKind
from .networks.draws import key_examples
from .networks.norms import count_in_groups
from .preparation import begin_heads
from .recipe import OPTIMIZERS, find_biases, learning_rate_at, make_optimizer
from .resume_state import STATE_NAME, Position, load_state, save_state
from .run_folder import append_metrics, cut_metrics, save_checkpoint
from .scorer import Scorer, Team, explain_full_device
from .settings import find_optimisation
from .stack import Head, Stack
from .step_log import StepLog, cut_steps
from .tasks.contract import Task

ReportEpoch = Callable[[dict[str, Any], int], None]
"""Called after each epoch with its metrics and the number of epochs."""

ReportHeads = Callable[[list[dict[str, Any]], int], None]
"""The same of several heads, with the metrics of those that still learn."""

OWN_OF_A_HEAD = ("out", "learning_rate", "weight_decay", "seed")
"""What heads that are trained together may differ in."""

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


def train_run(
    config: TrainConfig,
    report: ReportEpoch = lambda *_: None,
    *,
    progress: Report = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a head on a store and leave a run's folder.

    Under `torchrun` every process takes clips of its own in each step; the first one writes.

    Args:
        config: What to train, and how.
        report: Told about each epoch.
        progress: Told after each step.
        say: Told once how a step's clips are shared out, and how many videos are too short.

    Returns:
        run, preset, epochs, best (metrics of the best epoch), last, parameters, seconds, data_wait_share.

    Raises:
        StoreMismatchError: If the store lacks what the head reads, has no labelled training video, or its clips are
            shorter than was asked for.
        RunExistsError: If the run's folder holds anything; with `resume`, if it was begun with other settings.
        EnvironmentFailedError: If the loss is not finite, the last good checkpoint is kept; or if the device's memory
            does not suffice.
    """
    with _explain_full_device():
        training = _begin([config], config.out / STATE_NAME, say)
        (summary,) = training.fit(lambda metrics, num_epochs: report(metrics[0], num_epochs), progress)
    del summary["stopped"]
    return summary


def train_heads(
    configs: Sequence[TrainConfig],
    state_path: Path,
    report: ReportHeads = lambda *_: None,
    *,
    progress: Report = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Train several heads on the batches of one read of the store, each into a run's folder of its own.

    A head whose loss or weights are not finite stops alone, as does one that gets no better for its patience.

    Args:
        configs: One for each head. They differ in what `OWN_OF_A_HEAD` lists alone; of seeds that differ, `order_seed`
            says which orders the clips.
        state_path: The file that holds what all of them go on from.
        report: Told about each epoch.
        progress: Told after each step.
        say: Told once how a step's clips are shared out, and how many videos are too short.

    Returns:
        Of each head what `train_run` returns, and `stopped`: why it stopped alone, else None.

    Raises:
        ValueError: If the configurations differ in anything else, or their clips would be ordered differently.
        StoreMismatchError, RunExistsError: As `train_run`.
    """
    shared = {name: getattr(configs[0], name) for name in TrainConfig.__dataclass_fields__ if name not in OWN_OF_A_HEAD}
    is_shared = all(getattr(config, name) == value for config in configs for name, value in shared.items())
    if not is_shared or len({config.seed_of_order for config in configs}) > 1:
        raise ValueError(f"heads of one training differ in {', '.join(OWN_OF_A_HEAD)} alone, and share an order_seed")
    with _explain_full_device():
        return _begin(configs, state_path, say).fit(report, progress)


def _begin(configs: Sequence[TrainConfig], state_path: Path, say: Callable[[str], None]) -> _Training:
    return _Training(*begin_heads(configs, state_path, say), state_path)


def _explain_full_device() -> AbstractContextManager[None]:
    return explain_full_device(
        "train with --checkpoint-activations, or with a smaller --batch-size and more of --accumulate"
    )


class _Training:
    """Heads from their first epoch, or from where they were killed, to their last; each batch is read once for all."""

    def __init__(self, heads: Sequence[Head], store: StoreReader, task: Task, fabric: Fabric, state_path: Path) -> None:
        self._heads = heads
        self._config = config = heads[0].config
        self._optimisation = find_optimisation(config)
        self._store = store
        self._task = task
        self._fabric = fabric
        self._state_path = state_path
        self._norms = make_norm_groups(StepShares.of_config(config, fabric.world_size))
        assert config.optimizer is not None
        self._rate_place = OPTIMIZERS[config.optimizer].rate_place
        self._stacks = self._make_stacks(find_network(config.head))
        network, layers = heads[0].network, heads[0].run.shape.layers
        self._layers = layers
        self._codec = None
        if "patches" in network.arrays:
            self._codec = codec_after(codec_for(store, layers, fabric.device), Mixing.of_config(config, epoch=0))
        self._bad = BadRows(config.max_bad)
        self._loader = ClipLoader.for_network(
            network, store, layers=layers, device=fabric.device, with_texts=True, bad=self._bad
        )
        self._saved_at = time.monotonic()
        self._began = time.perf_counter()
        self._wait_share = 0.0
        self._log: StepLog | None = None  # of the first process

    def _make_stacks(self, kind: NetworkKind) -> list[Stack]:
        """One of all heads where their kind has it, else one of each."""
        heads, config = self._heads, self._config
        for head in heads:
            head.network.checkpoints_activations |= config.checkpoint_activations
            if self._norms is not None:
                count_in_groups(head.network, self._norms)
        together = kind.stack([head.network for head in heads]) if len(heads) > 1 else None
        members = [[head] for head in heads] if together is None else [heads]
        stacks = []
        for own in members:
            module = own[0].network if together is None else together
            if config.with_compile:
                module.compile()
            stacks.append(Stack(own, module, [self._make_optimizer(head) for head in own], self._fabric))
        return stacks

    def _make_optimizer(self, head: Head) -> torch.optim.Optimizer:
        groups, biases = head.network.parameter_groups(), find_biases(head.network)
        is_fused = self._fabric.device.type == "cpu"
        return make_optimizer(groups, head.config, self._optimisation, biases, is_fused=is_fused)

    @property
    def _active(self) -> list[Head]:
        """Heads that still learn; all of them stand at the same step."""
        return [head for stack in self._stacks for head in stack.active]

    @property
    def _position(self) -> Position:
        """Of those that still learn; else that of the last one that did."""
        heads = self._active or sorted(self._heads, key=lambda head: head.position.steps)
        return heads[-1].position

    def fit(self, report: ReportHeads, progress: Report) -> list[dict[str, Any]]:
        start = time.perf_counter()
        if self._config.resume:
            self._go_on()
        self._began = start - self._position.seconds
        loggers = self._begin_logs(progress) if self._fabric.is_global_zero else {}
        num_epochs = self._config.epochs
        assert num_epochs is not None
        while (epoch := self._position.epoch) < num_epochs and self._active:
            metrics = self._train_epoch(epoch)
            self._require_finite_weights(epoch)
            if (epoch + 1) % self._config.validate_every == 0 or epoch + 1 == num_epochs:
                figures = self._validate(epoch)
                metrics = {head: {**metrics[head], **figures[head]} for head in self._active}
            # Times differ from run to run: they are told, and not kept among the metrics.
            wait = {"data_wait_share": round(self._wait_share, 4)}
            kept = self._keep_epoch([metrics[head] for head in self._active], loggers)
            if self._fabric.is_global_zero:
                report([{**one, **wait} for one in kept], num_epochs)
            self._fabric.barrier()
        seconds = time.perf_counter() - start
        summaries = [self._summarise(head, seconds) for head in self._heads]
        if self._fabric.is_global_zero:
            for head, summary in zip(self._heads, summaries, strict=True):
                write_json(head.run.path / "stats.json", summary)
        return summaries

    def _begin_logs(self, progress: Report) -> dict[Head, list[Logger]]:
        """Of each head; what is told of steps goes there too."""
        config, position = self._config, self._position
        loggers = {
            # TensorBoard has a thread and files for each head: of several, metrics.jsonl has all of it.
            head: make_loggers(head.run, config, position.epoch, position.steps) if len(self._heads) == 1 else []
            for head in self._active
        }
        num_steps, _ = self._count_steps(self._plan_epoch(position.epoch))
        assert config.epochs is not None
        self._log = StepLog(
            {head.run.path: [logger.log_step for logger in own] for head, own in loggers.items()},
            every=config.log_every,
            total=num_steps * config.epochs,
            device=self._fabric.device,
            waiting=self._loader.waiting,
            progress=progress,
        )
        return loggers

    def _keep_epoch(self, metrics: list[dict[str, Any]], loggers: Mapping[Head, list[Logger]]) -> list[dict[str, Any]]:
        """Write what each active head came to, then where all of them stand; the metrics as every process has them."""
        metrics = self._fabric.broadcast(metrics)
        for head, own in zip(self._active, metrics, strict=True):
            is_best = head.note_epoch(own, self._task.figure)
            if self._fabric.is_global_zero:
                append_metrics(head.run, own)
                for logger in loggers[head]:
                    logger.log_epoch(own)
                # The state holds the weights of several heads: their files are written when there is no other epoch.
                is_last = own["epoch"] == head.config.epochs or head.is_done(self._task.figure)
                if is_last or len(self._heads) == 1:
                    save_checkpoint(head.run, "last", head.network, own)
                if is_best:
                    save_checkpoint(head.run, "best", head.network, own)
        self._note_seconds()
        self._drop_done()
        if self._fabric.is_global_zero:
            self._save_state()
        return metrics

    def _note_seconds(self) -> None:
        for head in self._active:
            head.position.seconds = time.perf_counter() - self._began

    def _drop_done(self) -> None:
        """Let heads that are done learn no more."""
        for stack in self._stacks:
            for head in [head for head in stack.active if head.is_done(self._task.figure)]:
                stack.drop(head)

    def _summarise(self, head: Head, seconds: float) -> dict[str, Any]:
        """What a run comes to; its seconds are those of all its parts, as far as their states were saved."""
        position = head.position
        return {
            "run": str(head.run.path),
            "preset": head.config.preset,
            "epochs": position.epoch,
            "videos": {
                name: len(np.unique(data.rows))
                for name, data in (("train", self._task.training), ("val", self._task.validation))
            },
            "steps": position.steps,
            "best": position.best,
            "last": position.metrics,
            "parameters": sum(p.numel() for p in head.network.parameters()),
            "seconds": round(position.seconds, 3),
            "data_wait_share": round(self._loader.waiting.seconds / seconds, 4),
            "stopped": head.stopped,
            **({"bad_rows": sorted(self._bad.rows)} if self._bad.rows else {}),
        }

    def _go_on(self) -> None:
        """Be where the heads were when their state was last saved; at the start, if it never was."""
        if self._state_path.is_file():
            self._load_state()
        if self._fabric.is_global_zero:
            for head in self._heads:
                cut_metrics(head.run, head.position.epoch)
                cut_steps(head.run.path, head.position.steps)

    def _load_state(self) -> None:
        states = load_state(self._state_path, [stack.describe_state() for stack in self._stacks])
        for stack, (heads, precision) in zip(self._stacks, states, strict=True):
            for head, (position, stopped) in zip(stack.heads, heads, strict=True):
                position.losses = [loss.to(self._fabric.device) for loss in position.losses]
                head.position, head.stopped = position, stopped
                self._bad.take_over(position.bad_rows)
            stack.load_precision(precision)
        self._drop_done()
        position = self._position
        _log.info("going on in epoch %d, step %d", position.epoch + 1, position.step_in_epoch)

    def _save_state(self) -> None:
        self._note_seconds()
        for head in self._active:
            head.position.bad_rows = sorted(self._bad.rows)
        save_state(self._state_path, [stack.describe_state() for stack in self._stacks])
        self._saved_at = time.monotonic()

    def _train_epoch(self, epoch: int) -> dict[Head, dict[str, Any]]:
        config, step_in_epoch = self._config, self._position.step_in_epoch
        plans = self._plan_epoch(epoch)
        num_steps, accumulate = self._count_steps(plans)
        # Where the rate of each step is read off the schedule.
        places = [epoch + (step + self._rate_place) / num_steps for step in range(num_steps)]
        for stack in self._stacks:
            stack.train()
        batches = self._loader.load(plans[step_in_epoch * accumulate : num_steps * accumulate])
        waiting = self._loader.waiting
        began, waited = time.perf_counter(), waiting.seconds
        if self._log is not None:
            self._log.begin_epoch()
        for step in range(step_in_epoch, num_steps):
            is_told = self._log is not None and self._log.is_due(self._position.steps + 1)
            norms = self._step(batches, accumulate, places[step], with_norms=is_told)
            for head in self._active:
                head.position.steps += 1
                head.position.step_in_epoch = step + 1
            clips = sum(plan.num_clips for plan in plans[step * accumulate : (step + 1) * accumulate])
            self._tell_step(clips * self._fabric.world_size, epoch + (step + 1) / num_steps, places[step], norms)
            if step % _CHECK_EVERY == _CHECK_EVERY - 1 or step + 1 == num_steps:
                self._require_finite(epoch, plans, accumulate)
            is_due = time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
            if is_due and step + 1 < num_steps and self._fabric.is_global_zero:
                self._save_if_finite(epoch, plans, accumulate)
        if self._fabric.world_size > 1:
            self._bad.share()
        self._wait_share = (waiting.seconds - waited) / (time.perf_counter() - began)
        return {
            head: {
                "epoch": epoch + 1,
                "train_loss": float(torch.stack(head.position.losses).mean()),
                "learning_rate": learning_rate_at(places[-1], head.config, self._optimisation.schedule),
            }
            for head in self._active
        }

    def _plan_epoch(self, epoch: int) -> list[ClipPlan]:
        """Batches of this process, with keys of what is drawn where the network wants them and the task set none."""
        plans = self._task.plan_epoch(
            epoch,
            num_frames=self._heads[0].num_frames,
            rank=self._fabric.global_rank,
            num_ranks=self._fabric.world_size,
        )
        if not self._heads[0].network.draws_by_example:
            return plans
        seed = self._config.seed_of_order
        return [
            plan if plan.draws is not None else replace(plan, draws=key_examples(seed, epoch, plan.rows, plan.labels))
            for plan in plans
        ]

    def _count_steps(self, plans: Sequence[ClipPlan]) -> tuple[int, int]:
        """Steps of an epoch, and batches of a step.

        Like clips that do not fill a batch, batches that do not fill a step are left out of an epoch.
        """
        accumulate = min(self._config.accumulate, len(plans))
        return len(plans) // accumulate, accumulate

    def _tell_step(self, clips: int, epoch: float, place: float, norms: Mapping[Head, torch.Tensor]) -> None:
        """Note a step of so many clips, and tell of it where gradients' norms were asked for."""
        if self._log is None:
            return
        step, heads = self._position.steps, self._active
        self._log.add({head.run.path: head.position.losses[-1] for head in heads}, clips, step)
        if norms:
            schedule = self._optimisation.schedule
            rates = {head.run.path: learning_rate_at(place, head.config, schedule) for head in heads}
            gradients = {head.run.path: norms[head] for head in heads}
            self._log.tell(step, epoch=epoch, learning_rates=rates, gradient_norms=gradients)

    def _save_if_finite(self, epoch: int, plans: Sequence[ClipPlan], accumulate: int) -> None:
        """Save the state between epochs; one that is not finite ends a training of one head, and is never saved."""
        if len(self._heads) == 1:
            self._require_finite(epoch, plans, accumulate)
            self._require_finite_weights(epoch)
        # Which of several heads goes on is for all processes to decide at once, at their next check.
        if all(head.find_bad_loss() is None and head.has_finite_weights() for head in self._active):
            self._save_state()

    def _step(
        self, batches: Iterator[ClipBatch], accumulate: int, epoch: float, *, with_norms: bool
    ) -> dict[Head, torch.Tensor]:
        """One step of all heads on `accumulate` batches; notes their mean losses of all processes.

        Returns:
            The norm () of each head's gradient before it is cut; none unless they were asked for.
        """
        stacks = [stack for stack in self._stacks if stack.active]
        losses: dict[Head, list[torch.Tensor]] = {head: [] for head in self._active}
        for place in range(accumulate):
            if self._norms is not None:
                self._norms.batch, self._norms.num_batches = place, accumulate
            batch = next(batches)
            for stack in stacks:
                found = stack.learn(
                    batch, self._codec, self._compute_loss, num_batches=accumulate, is_last=place + 1 == accumulate
                )
                for head, loss in zip(stack.active, found, strict=True):
                    losses[head].append(loss)
        norms: dict[Head, torch.Tensor] = {}
        for stack in stacks:
            if with_norms:
                norms |= zip(stack.active, stack.find_gradient_norms(), strict=True)
            stack.set_rates(epoch, self._optimisation.schedule)
            stack.step(self._config.clip_norm)
            if self._norms is not None and self._fabric.world_size > 1:
                stack.average_statistics()
        own = torch.stack([torch.stack(found).mean() for found in losses.values()])
        mean = own.clone()
        if self._fabric.world_size > 1:
            # Not Fabric's, which waits for all processes first: this one is only queued on a GPU.
            dist.all_reduce(mean)
            mean /= self._fabric.world_size
        for head, ours, all_of_them in zip(losses, own, mean, strict=True):
            head.own_losses.append(ours)
            head.position.losses.append(all_of_them)
        return norms

    def _compute_loss(self, network: Network, output: Any, batch: ClipBatch) -> torch.Tensor:
        """The task's loss and the network's own, ()."""
        loss = self._task.compute_loss(network, output, batch, self._gather)
        for own in network.own_losses(output, batch).values():
            loss = loss + own
        return loss

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """(B, ...) of this process to those of all, (B of all, ...), in the order of the processes."""
        if self._fabric.world_size == 1:
            return values
        gathered: torch.Tensor = self._fabric.all_gather(values, sync_grads=True)  # type: ignore[assignment]
        if gathered.requires_grad:
            # torch hands a gradient's memory over as it lies, and takes it for contiguous where it is not.
            gathered.register_hook(torch.Tensor.contiguous)
        return gathered.flatten(0, 1)

    def _validate(self, epoch: int) -> dict[Head, dict[str, float]]:
        """Every process scores its share of the clips, in the precision of training; they are read once."""
        heads, task = self._active, self._task
        if not heads:
            return {}
        figures = {}
        for head, scorer in zip(heads, self._make_scorer(heads[0]).share([h.network for h in heads]), strict=True):
            try:
                figures[head] = task.score_training(scorer, self._bad.rows)
                figures[head] |= task.validate(scorer) if len(task.validation) else {}
            except EnvironmentFailedError:
                self._stop(head, "a validation score", epoch, f"at or before step {head.position.steps}")
        return figures

    def _make_scorer(self, head: Head) -> Scorer:
        fabric = self._fabric
        assert head.config.batch_size is not None
        return Scorer(
            head.network,
            self._store,
            layers=self._layers,
            num_frames=head.num_frames,
            batch_size=head.config.batch_size,
            device=fabric.device,
            team=Team(fabric.global_rank, fabric.world_size, fabric.autocast),
        )

    def _require_finite(self, epoch: int, plans: Sequence[ClipPlan], accumulate: int) -> None:
        """Check the losses since the last time; the first bad one names its step and the videos of its batches."""
        for head in self._active:
            bad, own, position = head.find_bad_loss(), head.own_losses, head.position
            if bad is None:
                own.clear()
                continue
            step = len(position.losses) - len(own) + bad  # in this epoch
            where = f"in step {position.steps - len(position.losses) + step + 1}"
            if bool(torch.isfinite(own[bad])):
                where += " (on the videos of another process)"
            else:
                batches = plans[step * accumulate : (step + 1) * accumulate]
                rows = list(dict.fromkeys(np.concatenate([plan.rows for plan in batches]).tolist()))
                ids = self._store.read_manifest(["video_id"])["video_id"].take(rows[:_MOST_NAMED]).to_pylist()
                more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
                where += f" (videos {', '.join(ids)}{more})"
            self._stop(head, "the loss", epoch, where)

    def _require_finite_weights(self, epoch: int) -> None:
        for head in self._active:
            if not head.has_finite_weights():
                self._stop(head, "a weight", epoch, f"at or before step {head.position.steps}")

    def _stop(self, head: Head, what: str, epoch: int, where: str) -> None:
        """Let a head that diverged learn no more; one that is alone ends the training."""
        kept = head.run.path / f"{'last' if len(self._heads) == 1 else 'best'}.safetensors"
        hint = f"{kept} is the last good checkpoint." if kept.exists() else "No epoch was finished."
        message = f"{what} became NaN or infinite in epoch {epoch + 1}, {where}. Lower --learning-rate. {hint}"
        if len(self._heads) == 1:
            raise EnvironmentFailedError(message)
        _log.warning("%s stops, the others go on: %s", head.run.path, message)
        head.stopped = message
        head.position.losses, head.own_losses = [], []
        self._drop_done()
