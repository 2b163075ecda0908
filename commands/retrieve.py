"""`s4v retrieve`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..progress import show_progress
from ..terminal import print_lines
from ._searched_store import find_newest_retrieval_run, open_searched_store, require_run_of
from .front import Checkpoint, Json, run_command, say

if TYPE_CHECKING:
    from ..retrieve.search import Answer, Searcher
    from ..store.reader import StoreReader


def retrieve(
    query: Annotated[str | None, typer.Option(help="What to look for, in words.")] = None,
    queries: Annotated[Path | None, typer.Option(help="A text file of queries, one a line.")] = None,
    like: Annotated[str | None, typer.Option(help="A video's id: find videos like it.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="The store. [the run's; without a run the newest in store/]")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A retrieval run. [without --features the newest in runs/, if there is one]")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Only rows such as \"split = 'val' and duration_s < 30\".")] = None,
    top: Annotated[int, typer.Option(help="Answers wanted.")] = 10,
    index_path: Annotated[
        Path | None,
        typer.Option("--index", help="Folder of the index. [beside the store or in the run, made at first use]"),
    ] = None,
    checkpoint: Checkpoint = None,
    device: Annotated[str, typer.Option(help="Where the towers compute: auto, cpu, cuda, mps.")] = "auto",
    page: Annotated[Path | None, typer.Option("--html", help="Write a gallery with frame strips.")] = None,
    weights: Annotated[str | None, typer.Option(help="Where the backbone's weights are. [as recorded]")] = None,
    as_json: Json = False,
) -> None:
    """Search a store's videos by text, or by a video."""
    with run_command("retrieve", as_json) as result:
        _require_one_question(query, queries, like)
        run = run or (find_newest_retrieval_run() if features is None else None)
        require_run_of(checkpoint, run)
        store = open_searched_store(run, features)
        from ..device import find_device
        from ..retrieve.search import Searcher, render_answers

        # What is no UTF-8 in an argument arrives as halves of characters, which no file and no tokenizer takes.
        query, like, where = (text and text.encode(errors="replace").decode() for text in (query, like, where))
        with (
            show_progress("retrieve") as report,
            Searcher(
                store,
                index=index_path,
                run=run,
                checkpoint=checkpoint or "best",
                where=where,
                weights=weights,
                device=find_device(device),
                report=report,
            ) as searcher,
        ):
            found = _find(searcher, query, queries, like, top)
        answers = {text: [asdict(answer) for answer in one] for text, one in found.items()}
        left_out = {text: searcher.left_out[text] for text in answers if searcher.left_out.get(text)}
        result.update(_tell_store(store, run, searcher.text_tower_seconds), left_out=left_out)
        result.update(_name_answers(answers, query, queries, like))
        if like is None and store.facts.backbone.has_random_weights:
            say("the backbone of this store has random weights: its ranking says nothing about the videos")
        if page is not None:
            from ..retrieve.gallery import write_gallery

            write_gallery(page, store, found, left_out=left_out)
            result.update(html=str(page))
        if not as_json:
            for text, one in answers.items():
                print_lines(*([text] if queries is not None else []), *render_answers(one))


def _require_one_question(*options: object) -> None:
    if sum(option is not None for option in options) != 1:
        raise ConfigError("retrieve wants one of --query TEXT, --queries FILE and --like VIDEO")


def _find(
    searcher: Searcher, query: str | None, queries: Path | None, like: str | None, top: int
) -> dict[str, list[Answer]]:
    """Answers by what was asked."""
    if like is not None:
        return {f"like {like}": searcher.find_like(like, top)}
    texts = _read_queries(queries) if queries is not None else [query or ""]
    return {text: searcher.find_text(text, top) for text in texts}


def _name_answers(
    answers: dict[str, list[dict[str, Any]]], query: str | None, queries: Path | None, like: str | None
) -> dict[str, Any]:
    """For `--json`: of a file of queries a list, else the one."""
    if queries is not None:
        return {"queries": [{"query": text, "answers": one} for text, one in answers.items()]}
    return {"query": query, "like": like, "answers": next(iter(answers.values()))}


def _tell_store(store: StoreReader, run: Path | None, seconds: float | None) -> dict[str, Any]:
    """Say on stderr what was searched and what it lacks; the same for `--json`."""
    from ..store.info import count_statuses, describe_unfinished

    loaded = "" if seconds is None else f"; text tower loaded in {seconds:.1f} s"
    say(f"{store.path}, {'the frozen backbone alone' if run is None else f'as {run} sees it'}{loaded}")
    rows = count_statuses(store)
    if (lack := describe_unfinished(store.path, rows)) is not None:
        say(lack)
    return {
        "store": str(store.path),
        "run": None if run is None else str(run),
        "text_tower_seconds": seconds,
        "rows": rows,
    }


def _read_queries(path: Path) -> list[str]:
    try:
        queries = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} (--queries) is not UTF-8 text: {error}") from error
    if not any(queries):
        raise ConfigError(f"{path} (--queries) holds no query: expected one a line")
    return list(dict.fromkeys(query for query in queries if query))
