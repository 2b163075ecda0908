"""Self-contained HTML pages: reports of the demo and of runs, and galleries."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from .files import write_text
from .store.reader import StoreReader
from .terminal import make_visible

matplotlib.use("Agg")
from matplotlib import pyplot as plt

plt.rcParams["text.usetex"] = False  # a user's own settings could have TeX read the names of classes

INK, ACCENT, MUTED, OUTLINE = "#1c2733", "#0b6e99", "#9aa7b2", "#f5a623"

_STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top }}
td.n {{ font-variant-numeric: tabular-nums; white-space: nowrap }}
.big {{ font-size: 2.6rem; font-weight: 650 }} .row {{ display: flex; flex-wrap: wrap; gap: 1rem 3rem }}
.note {{ color: #55636f }} img {{ max-width: 100% }} .strip {{ margin: .8rem 0 }}
.strip img {{ display: block; width: var(--width, 100%); image-rendering: pixelated }} .wrong {{ color: #b3261e }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 2rem }}
"""


_MOST_LABEL = 60
"""Characters of a name in a plot: one that is pages long would make the picture as large."""


def escape(text: object) -> str:
    """A name or a message as HTML shows it: no markup, and every character visible."""
    return html.escape(make_visible(text), quote=True)


def label(text: object) -> str:
    """A name as matplotlib shows it: no formula between dollars, and every character visible."""
    line = make_visible(text)
    line = line if len(line) <= _MOST_LABEL else f"{line[:_MOST_LABEL]}..."
    return line.replace("$", r"\$")


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write one HTML file, atomically, from pieces of HTML."""
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )
    write_text(path, text)


def draw_share(share: float, caption: str) -> str:
    """A share as a large number over its caption."""
    return f"<div><div class='big'>{share:.1%}</div><div class='note'>{escape(caption)}</div></div>"


def draw_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts and numbers."""

    def cell(tag: str, value: Any) -> str:
        is_number = re.match(r"-?\d", str(value))
        return f"<{tag}{' class=n' if is_number and tag == 'td' else ''}>{escape(value)}</{tag}>"

    head = "".join(cell("th", name) for name in header)
    body = "".join("<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def draw_picture(png: bytes, alt: str = "") -> str:
    """A PNG inside the page."""
    return f"<img alt='{escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def draw_strip(
    store: StoreReader,
    row: int,
    caption: str,
    *,
    places: Sequence[int] | None = None,
    outlined: Collection[int] = (),
) -> str:
    """Frames of a row side by side, over a caption in HTML.

    Args:
        store: With pixels.
        row: In the store.
        caption: In HTML.
        places: Which cached frames, on the axis F; None takes all.
        outlined: Those of them that get a coloured border.
    """
    if places is None:
        places = range(store.read_manifest(["num_cached_frames"])["num_cached_frames"][row].as_py())
    pixels = store.read_clips([row], [places], arrays=("pixels",), offsets=(0,)).pixels
    assert pixels is not None
    shown = store.decode_pixels(pixels[0, :, 0])
    strip = Image.fromarray(np.concatenate(list(shown), axis=1))
    height, width = shown.shape[1:3]
    for number, place in enumerate(places):
        if place in outlined:
            corners = (number * width, 0, (number + 1) * width - 1, height - 1)
            ImageDraw.Draw(strip).rectangle(corners, outline=OUTLINE, width=max(2, height // 40))
    buffer = io.BytesIO()
    strip.save(buffer, format="png")
    return f"<div class='strip'>{draw_picture(buffer.getvalue())}{caption}</div>"


def draw_confusion(axes: Any, counts: np.ndarray, names: Sequence[str]) -> None:
    """Counts on matplotlib axes: rows are true, columns predicted."""
    axes.imshow(counts, cmap="Blues", vmin=0)
    labels = [label(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) > 20:
        return
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if count > counts.max() / 2 else INK
            axes.text(column, row, str(count), ha="center", va="center", color=colour)


def render_figure(figure: Any) -> bytes:
    """A matplotlib figure as PNG; it is closed."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes; the tables beside the plot have them right.
        warnings.filterwarnings("ignore", message="(Glyph .* missing|Matplotlib currently does not support)")
        figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
