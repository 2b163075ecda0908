"""What a training tells while an epoch is under way: loss, rate, gradient, speed, waiting, memory, time left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from ..progress import Report
from .transfer import WaitMeter

STEPS_NAME = "steps.jsonl"

TELL_EVERY_S = 10.0
"""Where no number of steps was given."""

STAGE = "training"
"""What progress calls it; it counts steps."""


class StepLog:
    """Tells of the steps of runs that are trained together, in their first process.

    Asking a GPU for a number holds it up, so numbers are asked for only where they are told: the loss is the mean since
    they last were, and the gradient's norm is of that step alone.

    Args:
        logs: By a run's folder, which holds the lines, what else takes what is told of it.
        every: Steps between lines; None goes by the clock.
        total: Steps of the whole training.
        device: Whose memory is told.
        waiting: What steps waited.
        progress: Told after each step how far the training is.
    """

    def __init__(
        self,
        logs: Mapping[Path, Sequence[Callable[[dict[str, Any]], None]]],
        *,
        every: int | None,
        total: int,
        device: torch.device,
        waiting: WaitMeter,
        progress: Report = lambda *_: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._logs = logs
        self._every, self._total, self._device = every, total, device
        self._waiting, self._progress, self._clock = waiting, progress, clock
        self._told_at = clock()
        self._last = ""
        self._trained_s, self._trained_steps = 0.0, 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Count from here on: what lies between two epochs is no training."""
        self._losses: dict[Path, list[torch.Tensor]] = {path: [] for path in self._logs}
        self._clips = self._steps = 0
        self._since, self._waited = self._clock(), self._waiting.seconds

    def is_due(self, step: int) -> bool:
        """Whether the step that begins, from 1, will be told of."""
        if self._every is not None:
            return step % self._every == 0
        return self._clock() - self._told_at >= TELL_EVERY_S

    def add(self, losses: Mapping[Path, torch.Tensor], clips: int, step: int) -> None:
        """A step was queued: each run's loss (), and its clips of all processes."""
        for path, loss in losses.items():
            self._losses[path].append(loss)
        self._clips += clips
        self._steps += 1
        self._progress(STAGE, step, self._total, self._last)

    def tell(
        self,
        step: int,
        *,
        epoch: float,
        learning_rates: Mapping[Path, float],
        gradient_norms: Mapping[Path, torch.Tensor],
    ) -> None:
        """Ask for the numbers and tell them.

        Args:
            step: Of the whole training, from 1; `add` was told of it.
            epoch: Fractional: 1 is the end of the first.
            learning_rates: Of the step.
            gradient_norms: () of all trained parameters of a run, before it is cut.
        """
        paths = list(gradient_norms)
        losses = [torch.stack(self._losses[path]).mean() for path in paths]
        numbers = torch.stack([torch.stack(losses), torch.stack([gradient_norms[path] for path in paths])], dim=1)
        numbers = numbers.cpu()  # every step up to here has ended
        seconds = max(self._clock() - self._since, 1e-9)
        self._trained_s += seconds
        self._trained_steps += self._steps
        shared = {
            "clips_per_s": round(self._clips / seconds, 2),
            "data_wait_share": round(min(1.0, (self._waiting.seconds - self._waited) / seconds), 4),
            "memory_bytes": find_peak_memory(self._device),
            "seconds_left": round(self._trained_s / self._trained_steps * (self._total - step), 1),
        }
        all_facts = []
        for path, (loss, norm) in zip(paths, numbers.tolist(), strict=True):
            own = {"loss": loss, "learning_rate": learning_rates[path], "gradient_norm": norm}
            facts = {"step": step, "epoch": round(epoch, 4), **own, **shared}
            with (path / STEPS_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(facts) + "\n")
            for log in self._logs[path]:
                log(facts)
            all_facts.append(facts)
        self._last = describe_step(all_facts)
        self._progress(STAGE, step, self._total, self._last)
        self._told_at = self._clock()
        self.begin_epoch()


def describe_step(runs: Sequence[dict[str, Any]]) -> str:
    """`loss 1.234, rate 0.001, gradient 0.52, 120 clips/s, 3% waiting, 1.2 GB`; of several runs the losses."""
    first, losses = runs[0], [one["loss"] for one in runs]
    own = f"loss {first['loss']:.4g}, rate {first['learning_rate']:.3g}, gradient {first['gradient_norm']:.3g}"
    if len(runs) > 1:
        own = f"{len(runs)} heads, loss {min(losses):.4g} to {max(losses):.4g}"
    memory = "" if first["memory_bytes"] is None else f", {first['memory_bytes'] / 1e9:.1f} GB"
    return f"{own}, {first['clips_per_s']:.4g} clips/s, {first['data_wait_share']:.0%} waiting{memory}"


def find_peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in use so far: of a GPU by torch, else of this process; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def find_gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm () of all gradients that there are; nothing is changed."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())


def cut_steps(run: Path, num_steps: int) -> None:
    """Keep the lines of the first steps, where there are more: the others are trained again."""
    path = run / STEPS_NAME
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _read_step(line) <= num_steps]
    if len(kept) < len(lines):
        write_text(path, "".join(kept))


def _read_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):  # cut off, as by a kill or a full disk
        return float("inf")


def read_steps(run: Path) -> list[dict[str, Any]]:
    """All whole lines in a run's folder; none of a run from before there were any."""
    path = run / STEPS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _read_step(line) != float("inf")]
