"""The demo's report: one HTML file with everything in it, pictures included."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from ..pages import (
    ACCENT,
    INK,
    MUTED,
    draw_confusion,
    draw_picture,
    draw_share,
    draw_strip,
    draw_table,
    escape,
    render_figure,
    write_page,
)
from ..store.manifest import read_table
from ..store.reader import StoreReader
from .scenes import PAIRS, SHAPES
from .scores import split_label

_COLOURS = {
    "side network": ACCENT,
    "pixels only": "#d1782f",
    "tokens only": "#5a9e4b",
    "linear probe": MUTED,
    "zero-shot": "#8a6fb0",
}
_MEANINGS = {
    "side network": "all tokens and pixels",
    "pixels only": "the same network, every token zero",
    "tokens only": "the same network without its pixel stem",
    "linear probe": "mean class token of all frames: blind to their order",
    "zero-shot": "tiny-clip asked in words, averaged over frames, nothing trained",
}

_WRONG = " class='wrong'"


def write_report(
    path: Path,
    *,
    result: dict[str, Any],
    answers: Mapping[str, Sequence[tuple[str, str]]],
    curves: Mapping[str, list[dict[str, Any]]],
    store: StoreReader,
    extract_stats: dict[str, Any],
    predictions: Path,
    query: str,
    found: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Write the report.

    Args:
        path: The HTML file.
        result: The demo's summary.
        answers: Label and answer for each held-out video, by method, for the first seed.
        curves: metrics.jsonl of each run, by method, for the first seed.
        store: The store, for frame strips.
        extract_stats: The store's stats.json.
        predictions: The side network's predictions on held-out videos.
        query: The text that was searched for.
        found: What it found: `frozen` and `trained`.
    """
    methods, num_val = result["methods"], result["videos"]["val"]
    world = result["world"]
    sections = [
        "<h1>s4v demo</h1>",
        f"<p class='note'>The small world: {sum(result['videos'].values())} generated {world['codec'].upper()} videos "
        f"in {len(store.classes.names)} classes, a shape and its motion. Motions come in pairs that are each other "
        "played backwards. Tokens come from tiny-clip, the world's own CLIP, run once.</p>",
        "<div class='row'>",
        *(
            draw_share(_mean(methods[name]["top1_by_seed"]), f"{name}: {_MEANINGS[name]}")
            for name in ("side network", "pixels only", "linear probe")
            if name in methods
        ),
        draw_share(result["chance"], "chance"),
        "</div>",
        f"<h2>What is right about the answers</h2><p>{num_val} held-out videos. <em>Pair</em> is the motion or its "
        "reversal; <em>direction</em> is the share, among answers with the right pair, that name the right one of the "
        "two: 50 % without a sense of time. In brackets 95 % intervals over videos"
        + (
            f"; shape and motion is the mean over {len(methods['side network']['top1_by_seed'])} seeds of training "
            "with the standard deviation, all else the first seed"
            if len(methods["side network"]["top1_by_seed"]) > 1
            else ""
        )
        + ".</p>",
        draw_table(
            ["", "shape and motion", "shape", "motion", "pair", "direction"],
            [[f"{name}: {_MEANINGS[name]}", *_row(methods[name])] for name in _COLOURS if name in methods],
        ),
        f"<p>Played backwards, {_percent(result['reversal'])} of the videos that the side network got right are taken "
        "for the paired motion."
        + (
            f" Asked about single frames, not their average, zero-shot names {result['zero_shot_frames']:.1%}."
            if result["zero_shot_frames"] is not None
            else ""
        )
        + "</p>",
        "<h2>Learning</h2>",
        draw_picture(_plot_curves(curves, result["chance"]), "held-out accuracy while training"),
        "<h2>Confusion of the side network</h2>",
        draw_picture(_plot_confusion(answers["side network"]), "confusion of motions and of shapes"),
        "<h2>Held-out videos</h2>",
        *_strips(store, predictions),
        *_describe_novel(result),
        *_describe_retrieval(result["retrieval"], num_val),
        *_describe_search(store, query, found),
        "<h2>Cost</h2>",
        draw_table(
            ["stage", "seconds"], [[name, f"{value:.1f}"] for name, value in result["seconds_by_stage"].items()]
        ),
        "<p>Inside <em>extract</em>: "
        + ", ".join(f"{name} {value:.1f} s" for name, value in extract_stats["seconds_by_stage"].items())
        + ".</p>",
        f"<p>The store takes {result['store_bytes'] / 1e6:.1f} MB: "
        + ", ".join(f"{name} {size / 1e3:.1f} kB" for name, size in store.layout.bytes_per_frame.items())
        + " a frame.</p>",
        "<p class='note'>How far the side network is above the probe is what time is worth here; how far above pixels "
        "alone (<code>--full</code>), what the tokens are worth. Neither says anything about accuracy on real videos: "
        "see docs/world.md.</p>",
        f"<p class='note'>{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.</p>",
    ]
    write_page(path, "s4v demo", sections)


def _row(method: dict[str, Any]) -> list[str]:
    by_seed = method["top1_by_seed"]
    parts = [_percent(method[name]) for name in ("both", "shape", "motion", "pair", "direction")]
    if len(by_seed) > 1:
        parts[0] = f"{_mean(by_seed):.1%} \u00b1 {np.std(by_seed, ddof=1):.1%}"
    return parts


def _percent(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{share['value']:.1%} [{100 * low:.0f}, {100 * high:.0f}]" if share["total"] else "none"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _describe_novel(result: dict[str, Any]) -> list[str]:
    if not result["novel"]:
        return []
    rows = [
        [name, *(_percent(shares[part]) for part in ("both", "shape", "motion", "pair", "direction"))]
        for name, shares in result["novel"].items()
    ]
    return [
        f"<h2>Novel combinations</h2><p>{result['videos']['novel']} videos of colours on textures that neither a "
        "training video nor a still of tiny-clip shows together.</p>",
        draw_table(["", "shape and motion", "shape", "motion", "pair", "direction"], rows),
    ]


def _describe_retrieval(retrieval: dict[str, Any], num_val: int) -> list[str]:
    rows = []
    for name, meaning in (("trained", "the side network"), ("frozen", "tiny-clip alone, frames averaged")):
        measured = retrieval[name]
        there, back = measured["text_to_video"], measured["video_to_text"]
        rows.append(
            [
                f"{name}: {meaning}",
                *(f"{there[k]:.1%}" for k in ("r1", "r5", "r10")),
                f"{there['median_rank']:.0f}",
                f"{back['r1']:.1%}",
                _percent(measured["reversed"]),
                _percent(measured["motion"]),
            ]
        )
    header = ["", "R@1", "R@5", "R@10", "median rank", "video to text R@1", "or its reversal", "of 12 motions"]
    return [
        f"<h2>Retrieval</h2><p>{retrieval['trained']['text_to_video']['queries']} captions of the {num_val} held-out "
        "videos, each a query; ties count against us. Captions leave things out, so several videos may fit one. "
        "<em>Or its reversal</em>: of two captions that differ in nothing but the motion, the video's own is closer "
        "than that of the paired one (chance 50 %); <em>of 12 motions</em>: it is the closest of all (chance 8.3 "
        "%).</p>",
        draw_table(header, rows),
    ]


def _describe_search(store: StoreReader, query: str, found: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    row_of = _number_rows(store)

    def column(title: str, answers: Sequence[dict[str, Any]]) -> str:
        strips = "".join(
            draw_strip(
                store,
                row_of[answer["video_id"]],
                f"<span{'' if answer['is_right'] else _WRONG}>{escape(answer['class_name'])}</span> "
                f"<span class='note'>{answer['score']:.3f}</span>",
            )
            for answer in answers
        )
        return f"<div><h3>{title}</h3>{strips or '<p>Nothing.</p>'}</div>"

    return [
        f"<h2>A query</h2><p>&ldquo;{escape(query)}&rdquo;, asked of the held-out videos. By its frames alone the "
        "frozen model finds what looks like the query; no single frame says which way it moves. Under each strip its "
        "true class, red where it is not what was asked, and the cosine.</p>",
        "<div class='two'>",
        column("the frozen model", found["frozen"]),
        column("trained", found["trained"]),
        "</div>",
    ]


def _plot_curves(curves: Mapping[str, list[dict[str, Any]]], chance: float) -> bytes:
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for name, points in curves.items():
        # Share of its training: the probe takes more, far shorter, epochs.
        done = [100 * point["epoch"] / len(points) for point in points]
        accuracy = [100 * point["val_top1"] for point in points]
        axes.plot(done, accuracy, color=_COLOURS[name], marker="o", markersize=3, label=name)
    axes.axhline(100 * chance, color=INK, linewidth=0.8, linestyle=":", label="chance")
    axes.set(xlabel="training done, %", ylabel="held-out top-1, %", ylim=(0, 102))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return render_figure(figure)


def _plot_confusion(told: Sequence[tuple[str, str]]) -> bytes:
    """Motions, each pair side by side, and shapes."""
    motions = [motion for pair in PAIRS for motion in pair]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(12, 6.5))
    for axes, names, part in ((left, motions, 1), (right, list(SHAPES), 0)):
        counts = np.zeros((len(names), len(names)), dtype=int)
        for label, answer in told:
            counts[names.index(split_label(label)[part]), names.index(split_label(answer)[part])] += 1
        draw_confusion(axes, counts, names)
    figure.tight_layout()
    return render_figure(figure)


def _strips(store: StoreReader, predictions: Path, num_right: int = 6, num_wrong: int = 4) -> list[str]:
    """Frame strips of some right answers, spread over the classes, and of some wrong ones."""
    answers = read_table(predictions).to_pylist()
    right = [answer for answer in answers if answer["is_correct"]]
    wrong = [answer for answer in answers if not answer["is_correct"]]
    strips, row_of = [], _number_rows(store)
    for title, group, wanted in (("Right", right, num_right), ("Wrong", wrong, num_wrong)):
        shown = group[:: max(1, len(group) // wanted)][:wanted]
        strips.append(f"<h3>{title}: {len(shown)} of {len(group)}</h3>")
        for answer in shown:
            verdict = "" if answer["is_correct"] else _WRONG
            caption = (
                f"<span{verdict}>{escape(answer['class_name'])}, predicted {escape(answer['predicted'])} "
                f"({answer['probability']:.0%})</span> <span class='note'>{escape(answer['video_id'])}</span>"
            )
            strips.append(draw_strip(store, row_of[answer["video_id"]], caption))
    return strips


def _number_rows(store: StoreReader) -> dict[str, int]:
    ids = store.read_manifest(["video_id"])["video_id"].to_pylist()
    return {video_id: row for row, video_id in enumerate(ids)}
