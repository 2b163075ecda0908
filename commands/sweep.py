"""`s4v sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..terminal import print_lines
from ..train.config import TrainConfig
from ._options import Options, Spelling, parse_size, takes_options
from .front import Json, hush_all_but_first, run_command, say

_NUMBERS = "One or several, such as 1e-3,1e-2."


@takes_options(
    TrainConfig,
    leave_out=("seed", "order_seed", "resume", "wandb"),
    spellings={
        "out": Spelling(type=Path | None, default=None, help="Folder of the sweep. [runs/sweep-STORE-HEAD]"),
        "learning_rate": Spelling(
            type=str | None,
            parse=lambda text: _parse_numbers("--learning-rate", text),
            help=f"{_NUMBERS} [the head's own]",
        ),
        "weight_decay": Spelling(
            type=str | None,
            parse=lambda text: _parse_numbers("--weight-decay", text),
            help=f"{_NUMBERS} [the head's own]",
        ),
        "hold_out": Spelling(help="Share of the training videos to choose on. [0.1]"),
        "with_compile": Spelling(option="compile"),
        "cache_size": Spelling(type=str | None, parse=lambda text: parse_size("--cache-size", text)),
        "set": Spelling(type=list[str] | None, default=None, parse=lambda words: tuple(words or ())),
    },
)
def sweep(
    options: Options,
    seeds: Annotated[str, typer.Option(help="Initialisations: one or several seeds, such as 0,1.")] = "0",
    heads_per_read: Annotated[
        int | None, typer.Option(help="Heads trained together. [as many as half of the memory holds]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train several rates, decays and seeds in one read of a store, and the best on all of train."""
    is_first = hush_all_but_first()
    with run_command("sweep", as_json and is_first) as result:
        values = options.parse()
        rates, decays = values.pop("learning_rate"), values.pop("weight_decay")
        numbers = _parse_numbers("--seeds", seeds, int)
        from ..store.reader import open_store

        store = open_store(values["features"])
        if not options.is_typed("task"):
            from ..train.tasks import choose_task

            values["task"] = choose_task(store)
        base = TrainConfig(**{**values, "out": values["out"] or Path()})
        from ..train.allocator import keep_freed_memory
        from ..train.sweep import render_sweep, sweep_heads, train_winner
        from ..train.tasks import find_task

        keep_freed_memory()
        if values["out"] is None:
            name = f"sweep-{base.features.name.removesuffix('.zarr')}-{base.stem}"
            base = TrainConfig(**{**values, "out": Path("runs") / name})
        task = find_task(base.task)

        def report(metrics: list[dict[str, Any]], epochs: int) -> None:
            if metrics:
                top = max(one.get(task.figure, 0.0) for one in metrics)
                say(f"epoch {metrics[0]['epoch']}/{epochs}: {len(metrics)} heads, highest {task.figure} {top:.1%}")

        def report_winner(metrics: dict[str, Any], epochs: int) -> None:
            say(f"winner, epoch {metrics['epoch']}/{epochs}: {task.describe_shares(metrics)}")

        result_of_sweep = sweep_heads(
            base,
            learning_rates=rates,
            weight_decays=decays,
            seeds=numbers or [],
            heads_per_read=heads_per_read,
            say=say if is_first else lambda _: None,
            report=report,
        )
        summary = train_winner(base, result_of_sweep, report_winner)
        result.update(result_of_sweep.describe(), run=summary["run"], last=summary["last"], best=summary["best"])
        if is_first and not as_json:
            print_lines(*render_sweep(result_of_sweep))
            print_lines(f"{summary['run']}, on all training videos: {task.describe_shares(summary['last'])}")


def _parse_numbers(option: str, text: str | None, kind: type = float) -> list[Any] | None:
    """`1e-3,1e-2` to numbers, as they were given; None stays None."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes one or several numbers such as 1,3; found {text!r}") from None
