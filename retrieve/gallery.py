"""`s4v retrieve --html`: answers as a page, with the frames around the moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..pages import draw_strip, escape, write_page
from ..store.reader import StoreReader
from .search import Answer

_FRAMES_SHOWN = 8


def write_gallery(
    path: Path,
    store: StoreReader,
    answers: Mapping[str, Sequence[Answer]],
    *,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Write one HTML file.

    Args:
        path: The file.
        store: Where the frames are; without pixels the page shows words alone.
        answers: By query.
        left_out: What the text tower did not read of a query, by query.
    """
    sections = [f"<h1>s4v retrieve</h1><p class='note'>{escape(store.path)}</p>"]
    times = store.read_manifest(["timestamps_s"])["timestamps_s"]
    for query, found in answers.items():
        sections.append(f"<h2>{escape(query)}</h2>")
        if left_out and query in left_out:
            sections.append(f"<p class='note'>Not read, for it is too long: {escape(left_out[query])}</p>")
        sections += [_describe(store, answer, times[answer.row].as_py()) for answer in found] or ["<p>Nothing.</p>"]
    write_page(path, "s4v retrieve", sections)


def _describe(store: StoreReader, answer: Answer, times: Sequence[float]) -> str:
    moment = "" if answer.start_s is None else f", {describe_moment(answer)}"
    caption = (
        f"{answer.rank}. {escape(answer.path)}{moment} "
        f"<span class='note'>score {answer.score:.3f}, best frame {answer.frame_score:.3f}</span>"
    )
    if not store.layout.with_pixels:
        return f"<p>{caption}</p>"
    places, in_moment = choose_frames(times, answer.start_s, answer.end_s)
    if in_moment:
        caption += " <span class='note'>(outlined: the moment)</span>"
    strip = draw_strip(store, answer.row, caption, places=places, outlined=in_moment)
    return f"<div style='--width: {100 * len(places) / _FRAMES_SHOWN:.0f}%'>{strip}</div>"


def choose_frames(
    times: Sequence[float], start_s: float | None, end_s: float | None, most: int = _FRAMES_SHOWN
) -> tuple[list[int], list[int]]:
    """Which cached frames show a moment: its own and one on each side; of more than `most` some, evenly.

    Args:
        times: (F,) seconds of a row's frames.
        start_s: The moment; None where times are not known: all frames are chosen from, and none is the moment's.
        end_s: Its end.
        most: At least 2.

    Returns:
        Places on the axis F, and those of them that are in the moment.
    """
    inside = (
        [] if start_s is None or end_s is None else [p for p, time_s in enumerate(times) if start_s <= time_s <= end_s]
    )
    first, last = (max(0, inside[0] - 1), min(len(times) - 1, inside[-1] + 1)) if inside else (0, len(times) - 1)
    places = np.linspace(first, last, min(most, last - first + 1)).round().astype(int).tolist()
    return places, [place for place in places if place in inside]


def describe_moment(answer: Answer) -> str:
    """`3.1 to 4.7 s`; `not known` where frames have no times."""
    return "not known" if answer.start_s is None else f"{answer.start_s:.1f} to {answer.end_s:.1f} s"
