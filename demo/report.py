"""The demo's report: one HTML file with everything in it, pictures included."""

from __future__ import annotations

import base64
import html
import io
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from ..store._files import write_atomic
from ..store.manifest import read_table
from ..store.reader import StoreReader

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_HEAD_NAMES = {"side4video": "side network", "linear": "linear probe"}
_INK, _ACCENT, _MUTED = "#1c2733", "#0b6e99", "#9aa7b2"

_STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {_INK}; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.5rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums }}
.big {{ font-size: 2.6rem; font-weight: 650 }} .pair {{ display: flex; gap: 4rem; margin: 1.5rem 0 }}
.note {{ color: #55636f }} img {{ max-width: 100% }} .strip {{ margin: .8rem 0 }}
.strip img {{ display: block; width: 100%; image-rendering: pixelated }} .wrong {{ color: #b3261e }}
"""


def write_report(
    path: Path,
    *,
    result: dict[str, Any],
    figures: dict[str, dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
    store: StoreReader,
    extract_stats: dict[str, Any],
    predictions: Path,
    query: str,
    answers: Sequence[dict[str, Any]],
) -> None:
    """Write the report.

    Args:
        path: The HTML file.
        result: The demo's summary.
        figures: What `evaluate_run` returned, by head.
        curves: metrics.jsonl of each run, by head.
        store: The store, for frame strips.
        extract_stats: The store's stats.json.
        predictions: The side network's predictions on held-out videos.
        query: The text that was searched for.
        answers: What it found.
    """
    side, linear = figures["side4video"], figures["linear"]
    sections = [
        "<h1>s4v demo</h1>",
        f"<p class='note'>{result['videos']} generated H.264 videos in {len(side['classes'])} classes; the class is a "
        "motion, and a frame by itself does not tell it. Tokens come from a small ViT with random weights, run once."
        "</p>",
        "<div class='pair'>"
        + _big(side["top1"], f"side network, {side['videos']} held-out videos")
        + _big(linear["top1"], "linear probe on mean class tokens: cannot see the order of frames")
        + _big(result["chance"], "chance")
        + "</div>",
        "<p class='note'>Shapes, colours and places are the same in all classes. An untrained backbone is enough here "
        "because the side network also sees the pixels: this shows that the pipeline works and that order matters, "
        "not how good tokens of a trained backbone are.</p>",
        "<h2>Learning</h2>",
        _picture(_plot_curves(curves, result["chance"])),
        "<h2>Confusion of the side network</h2>",
        _picture(_plot_confusion(np.asarray(side["confusion"]), side["classes"])),
        "<h2>Held-out videos</h2>",
        *_strips(store, predictions),
        "<h2>A query</h2>",
        f"<p>&ldquo;{html.escape(query)}&rdquo;: with random weights the text and image towers know nothing of each "
        "other, so this ranking is arbitrary. With trained weights the same command searches.</p>",
        _table(
            ["rank", "score", "best frame", "video"],
            [[a["rank"], f"{a['score']:.4f}", f"{a['time_s']:.2f} s", a["path"]] for a in answers],
        ),
        "<h2>Cost</h2>",
        _table(["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in result["seconds_by_stage"].items()]),
        "<p>Inside <em>extract</em>: "
        + ", ".join(f"{name} {value:.1f} s" for name, value in extract_stats["seconds_by_stage"].items())
        + ".</p>",
        f"<p>The store takes {result['store_bytes'] / 1e6:.1f} MB: "
        + ", ".join(f"{name} {size / 1e3:.1f} kB" for name, size in store.layout.bytes_per_frame.items())
        + " a frame.</p>",
        f"<p class='note'>{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.</p>",
    ]
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>s4v demo</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def _big(share: float, caption: str) -> str:
    return f"<div><div class='big'>{share:.1%}</div><div class='note'>{html.escape(caption)}</div></div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(tag: str, value: Any) -> str:
        is_number = str(value)[:1].isdigit() or str(value)[:2].lstrip("-")[:1].isdigit()
        return f"<{tag}{' class=n' if is_number and tag == 'td' else ''}>{html.escape(str(value))}</{tag}>"

    head = "".join(cell("th", name) for name in header)
    body = "".join("<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _picture(png: bytes, alt: str = "") -> str:
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _plot_curves(curves: dict[str, list[dict[str, Any]]], chance: float) -> bytes:
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for head, colour in (("side4video", _ACCENT), ("linear", _MUTED)):
        epochs = [point["epoch"] for point in curves[head]]
        accuracy = [100 * point["val_top1"] for point in curves[head]]
        axes.plot(epochs, accuracy, color=colour, marker="o", markersize=3, label=_HEAD_NAMES[head])
    axes.axhline(100 * chance, color=_INK, linewidth=0.8, linestyle=":", label="chance")
    axes.set(xlabel="epoch", ylabel="held-out top-1, %", ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    return _render(figure)


def _plot_confusion(confusion: np.ndarray, classes: Sequence[str]) -> bytes:
    figure, axes = plt.subplots(figsize=(6.2, 5.4))
    axes.imshow(confusion, cmap="Blues", vmin=0)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if count > confusion.max() / 2 else _INK
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return _render(figure)


def _render(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _strips(store: StoreReader, predictions: Path, num_right: int = 6, num_wrong: int = 4) -> list[str]:
    """Frame strips of some right answers, spread over the classes, and of some wrong ones."""
    row_of = {video_id: row for row, video_id in enumerate(store.read_manifest(["video_id"])["video_id"].to_pylist())}
    answers = read_table(predictions).to_pylist()
    right = [answer for answer in answers if answer["is_correct"]]
    wrong = [answer for answer in answers if not answer["is_correct"]]
    chosen = right[:: max(1, len(right) // num_right)][:num_right] + wrong[:num_wrong]
    strips = []
    for answer in chosen:
        row = row_of[answer["video_id"]]
        pixels = store.read_clips([row], [range(8)], arrays=("pixels",)).pixels
        assert pixels is not None
        strip = Image.fromarray(np.concatenate(list(pixels[0, :, 0]), axis=1))
        buffer = io.BytesIO()
        strip.save(buffer, format="png")
        verdict = "" if answer["is_correct"] else " class='wrong'"
        strips.append(
            f"<div class='strip'>{_picture(buffer.getvalue(), answer['video_id'])}"
            f"<span{verdict}>{html.escape(answer['class_name'])}, predicted {html.escape(answer['predicted'])} "
            f"({answer['probability']:.0%})</span> <span class='note'>{html.escape(answer['video_id'])}</span></div>"
        )
    return strips
