"""`s4v index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..progress import show_progress
from ..terminal import print_lines
from ._searched_store import open_searched_store, require_run_of
from .front import LOADING, Checkpoint, Json, run_command, say


def index(
    features: Annotated[Path | None, typer.Option(help="The store. [the run's]")] = None,
    run: Annotated[Path | None, typer.Option(help="A retrieval run. [none: the frozen backbone alone]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the index. [STORE.index beside the store, or in the run]")
    ] = None,
    checkpoint: Checkpoint = None,
    device: Annotated[str, typer.Option(help="Where the run's network computes: auto, cpu, cuda.")] = "auto",
    export: Annotated[
        Path | None, typer.Option(help="Also write vectors as clip-retrieval's index reads them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build what `s4v retrieve` searches, ahead of the first query; an index that is up to date stays."""
    with run_command("index", as_json) as result:
        if features is None and run is None:
            raise ConfigError("index wants --features STORE, --run RUN, or both")
        require_run_of(checkpoint, run)
        with show_progress("index", LOADING) as report:
            store = open_searched_store(run, features)
            from ..device import find_device
            from ..retrieve.index_reader import open_index
            from ..retrieve.trained_frames import TrainedFrames
            from ..store.info import count_rows, describe_files, describe_unfinished

            trained = None if run is None else TrainedFrames(run, store.path, find_device(device), checkpoint or "best")
            report("opening the index", 0, 0)
            built = open_index(store, out, report, trained=trained)
        counts = count_rows(store)
        result.update(index=str(built.path), videos=built.facts.videos, rows=counts.rows)
        if (lack := describe_unfinished(store.path, counts.rows)) is not None:
            say(lack)
        if export is not None:
            from ..retrieve.export import export_vectors

            result.update(export=str(export), exported=export_vectors(store, built, export))
        if not as_json:
            print_lines(f"{built.path}: {describe_files(built.facts.videos, counts.files['ok'])}")
