"""`s4v train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import show_progress
from ..terminal import print_lines
from ..train.config import TrainConfig
from ._options import Options, Spelling, parse_size, takes_options
from .front import Json, hush_all_but_first, run_command, say

if TYPE_CHECKING:
    from ..store.reader import StoreReader


@takes_options(
    TrainConfig,
    spellings={
        "out": Spelling(type=Path | None, default=None),
        "with_compile": Spelling(option="compile"),
        "cache_size": Spelling(type=str | None, parse=lambda text: parse_size("--cache-size", text)),
        "set": Spelling(type=list[str] | None, default=None, parse=lambda words: tuple(words or ())),
    },
)
def train(options: Options, as_json: Json = False) -> None:
    """Train a side network (or a baseline) from a store alone: no backbone, no video."""
    is_first = hush_all_but_first()
    with run_command("train", as_json and is_first) as result:
        values = options.parse()
        out = values["out"]
        from ..store.reader import open_store

        store = open_store(values["features"])  # a wrong path is told before torch is imported
        if not options.is_typed("task"):
            values["task"] = _choose_task(store, values["task"], is_told=is_first)
        config = TrainConfig(**{**values, "out": out or Path()})
        from ..train.allocator import keep_freed_memory
        from ..train.loop import default_run_path, train_run
        from ..train.tasks import find_task

        keep_freed_memory()
        path = out or default_run_path(config.features, config.stem, resume=config.resume)
        task = find_task(config.task)

        def report(metrics: dict[str, Any], epochs: int) -> None:
            loss, shares = f"loss {metrics['train_loss']:.4f}", task.describe_shares(metrics)
            parts = [loss, shares, f"{metrics['data_wait_share']:.1%} waiting for data"]
            say(f"epoch {metrics['epoch']}/{epochs}: {', '.join(part for part in parts if part)}")

        with show_progress("train") if is_first else nullcontext(lambda *_: None) as progress:
            tell = (lambda text: say(f"s4v train: {text}")) if is_first else (lambda _: None)
            summary = train_run(replace(config, out=path), report, progress=progress, say=tell)
        result.update(summary)
        if is_first and not as_json:
            print_lines(f"{summary['run']}: {describe_outcome(summary, task.describe_shares)}")


def describe_outcome(summary: Mapping[str, Any], describe_shares: Callable[[Mapping[str, Any]], str]) -> str:
    """A run's last line: what its best and its last checkpoint came to, with their epochs."""
    counts = summary["videos"]
    videos = f"({counts['train']} training videos, {counts['val']} validation videos)"
    best, last = summary["best"], summary["last"]
    if not describe_shares(best):
        return f"{summary['epochs']} epochs, none validated {videos}"
    if best["epoch"] == last["epoch"]:
        return f"best and last {describe_shares(last)} (epoch {last['epoch']}) {videos}"
    shares = describe_shares(last)
    last_words = f"last {shares} (epoch {last['epoch']})" if shares else f"{last['epoch']} epochs"
    return f"best {describe_shares(best)} (epoch {best['epoch']}), {last_words} {videos}"


def _choose_task(store: StoreReader, usual: str, *, is_told: bool) -> str:
    """The task that a store was made for, where nobody names one; another one than usual is told."""
    from ..train.tasks import choose_task

    task = choose_task(store)
    if task != usual and is_told:
        say(f"s4v train: {store.path} is made for {task}: training for that (--task)")
    return task
