"""`s4v compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_lines
from ..train.config import TrainConfig
from ._options import Options, Spelling, takes_options
from .front import Json, run_command, say


@takes_options(
    TrainConfig,
    only=("features", "out", "frames", "epochs", "batch_size", "learning_rate", "device"),
    spellings={
        "out": Spelling(type=Path | None, default=None, help="Folder of all its runs. [runs/compare-STORE]"),
        "frames": Spelling(help="Frames of a clip. [8]"),
        "epochs": Spelling(help="Of each training. [the side network's preset, else 30]"),
        "batch_size": Spelling(help="Clips in a step. [the side network's preset, else 32]"),
        "learning_rate": Spelling(
            help="The same for all. [the side network's own; of probes chosen on a tenth of train]"
        ),
    },
)
def compare(
    options: Options,
    methods: Annotated[
        str, typer.Option(help="Of side4video, linear, attentive, tds-clip, zero-shot.")
    ] = "side4video,attentive,linear,zero-shot",
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 1,
    prompt: Annotated[str, typer.Option(help="Of zero-shot; {} is a class's name.")] = "a video of {}",
    weights: Annotated[str | None, typer.Option(help="Of zero-shot: the backbone's. [as recorded]")] = None,
    run: Annotated[
        list[Path] | None, typer.Option(help="Train nothing: compare this run with the others. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of --run: which videos.")] = "val",
    checkpoint: Annotated[str, typer.Option(help="Of --run: best or last.")] = "best",
    as_json: Json = False,
) -> None:
    """Train the side network and its baselines from one store, and put them into one table; or compare runs."""
    with run_command("compare", as_json) as result:
        from ..store.reader import open_store

        values = options.parse()
        features = values["features"]
        open_store(features)
        from ..train.allocator import keep_freed_memory
        from ..train.compare import compare_methods, compare_runs, render_notes, render_runs, render_table

        keep_freed_memory()
        if run:
            pairs = compare_runs(
                run,
                features=features,
                split=split,
                checkpoint=checkpoint,
                device=values["device"],
                out=values["out"],
                say=say,
            )
            result.update(runs=pairs, out=None if values["out"] is None else str(values["out"]))
            if not as_json:
                print_lines(*render_runs(pairs))
            return
        values["out"] = values["out"] or Path("runs") / f"compare-{features.name.removesuffix('.zarr')}"
        base = TrainConfig(**values)
        names = [name.strip() for name in methods.split(",")]
        untrained = {"prompt": prompt, "weights": weights}
        lines = compare_methods(base, methods=names, seeds=seeds, untrained=untrained, say=say)
        result.update(out=str(base.out), methods=[asdict(line) for line in lines])
        if not as_json:
            print_lines(*render_table(lines), *render_notes(lines))
