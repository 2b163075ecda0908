"""`s4v retrieve --html`: answers as a page, with the frames around the moment."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..pages import draw_strip, write_page
from ..store.reader import StoreReader
from .search import Answer


def write_gallery(path: Path, store: StoreReader, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Write one HTML file.

    Args:
        path: The file.
        store: Where the frames are; without pixels the page shows words alone.
        answers: By query.
    """
    sections = [f"<h1>s4v retrieve</h1><p class='note'>{html.escape(str(store.path))}</p>"]
    for query, found in answers.items():
        sections.append(f"<h2>{html.escape(query)}</h2>")
        sections += [_describe(store, answer) for answer in found] or ["<p>Nothing.</p>"]
    write_page(path, "s4v retrieve", sections)


def _describe(store: StoreReader, answer: Answer) -> str:
    moment = "" if answer.start_s is None else f", {describe_moment(answer)}"
    caption = (
        f"{answer.rank}. {html.escape(answer.path)}{moment} "
        f"<span class='note'>score {answer.score:.3f}, best frame {answer.frame_score:.3f}</span>"
    )
    if not store.layout.with_pixels:
        return f"<p>{caption}</p>"
    return draw_strip(store, answer.row, caption)


def describe_moment(answer: Answer) -> str:
    """`3.1 to 4.7 s`; `not known` where frames have no times."""
    return "not known" if answer.start_s is None else f"{answer.start_s:.1f} to {answer.end_s:.1f} s"
