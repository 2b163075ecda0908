"""Which store a search is of, and as which run sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, RunNotFoundError, StoreNotFoundError

if TYPE_CHECKING:
    from ..store.reader import StoreReader


def find_newest_retrieval_run() -> Path | None:
    """The newest run in runs/ that was trained to embed frames beside texts; None where there is none."""
    from ..train.run_folder import find_newest_run
    from ..train.tasks import find_task

    try:
        return find_newest_run(accept=lambda run: find_task(run.shape.task).embeds_frames and not run.is_imported)
    except RunNotFoundError:
        return None


def require_run_of(checkpoint: str | None, run: Path | None) -> None:
    """Refuse a checkpoint of no run.

    Raises:
        ConfigError: If there is no run that it could be of.
    """
    if checkpoint is not None and run is None:
        raise ConfigError("--checkpoint has no effect without a run: name one with --run, or leave it out")


def open_searched_store(run: Path | None, features: Path | None) -> StoreReader:
    """The store that was named, the run's own, or the newest.

    Raises:
        StoreNotFoundError: If it is not there.
        StoreMismatchError: If it does not fit the run.
    """
    from ..store.reader import open_store

    if run is not None:
        from ..train.run_folder import open_run, open_store_of_run

        try:
            return open_store_of_run(open_run(run), features)
        except StoreNotFoundError as error:
            # --features alone would search another way, without the run.
            raise StoreNotFoundError(f"{error} Together with it, name the run: --run {run}.") from error
    from ..retrieve.search import find_newest_store

    return open_store(features or find_newest_store())
