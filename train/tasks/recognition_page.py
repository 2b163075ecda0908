"""The results page of an evaluated run: one HTML file, `results_SPLIT.html`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ...pages import (
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
from ...store.reader import StoreReader
from ..run_folder import METRICS_NAME, Run, read_metrics
from ..step_log import read_steps
from .recognition_metrics import Evaluation, find_calibration, find_interval

_MOST_SHOWN_CLASSES = 60
_MOST_PAIRS = 15
_STRIPS = 6


def write_results(run: Run, store: StoreReader, result: Evaluation, figures: dict[str, Any], name: str) -> None:
    """Write the page into the run's folder.

    Args:
        run: The run.
        store: What it was evaluated on.
        result: The scores.
        figures: What `evaluate_run` returns.
        name: Of the split, and whether it was played backwards.
    """
    top1 = figures["top1"]
    low, high = find_interval(top1, figures["videos"])
    shares = [("top1", f"top-1, 95 % [{100 * low:.1f}, {100 * high:.1f}]"), ("top5", "top-5")]
    shares += [("mean_class_accuracy", "mean over classes"), ("calibration_error", "calibration error")]
    sections = [
        f"<h1>{escape(run.path.name)}</h1>",
        f"<p class='note'>{figures['videos']} videos of {escape(name)}, {escape(store.path)}, "
        f"{escape(figures['checkpoint'])} checkpoint, clips per video: {figures['clips_per_video']}.</p>",
        "<div class='row'>",
        *(draw_share(figures[key], caption) for key, caption in shares if key in figures),
        "</div>",
        *_describe_training(run),
        *_describe_steps(run),
        "<h2>Confusion</h2>",
        *_describe_confusion(result, run.classes),
        "<h2>Classes</h2>",
        draw_table(
            ["class", "videos", "right", "right when said"],
            [
                [one["class"], one["videos"], f"{one['accuracy']:.1%}", _percent(one["precision"])]
                for one in sorted(figures["per_class"], key=lambda one: one["accuracy"])
            ],
        ),
        "<h2>Calibration</h2><p>Of answers given with a probability, the share that is right: on the diagonal they "
        "can be taken at their word.</p>",
        draw_picture(_plot_calibration(result), "probability of answers, and the share that is right"),
        *_describe_mistakes(result, store, run.classes),
        "<h2>How it was trained</h2>",
        draw_table(["", ""], [[key, value] for key, value in sorted(run.config.items()) if value is not None]),
    ]
    write_page(run.path / f"results_{name}.html", f"s4v {run.path.name}", sections)


def _percent(share: float | None) -> str:
    return "never said" if share is None else f"{share:.1%}"


def _describe_training(run: Run) -> list[str]:
    metrics = read_metrics(run) if (run.path / METRICS_NAME).is_file() else []
    if not metrics:
        return []
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    epochs = [one["epoch"] for one in metrics]
    _plot_curve(left, epochs, [one["train_loss"] for one in metrics], color=MUTED, label="training loss")
    if validated := [one for one in metrics if "val_loss" in one]:
        then = [one["epoch"] for one in validated]
        _plot_curve(left, then, [one["val_loss"] for one in validated], color=ACCENT, label="validation loss")
        top1 = [100 * one["val_top1"] for one in validated]
        _plot_curve(right, then, top1, color=ACCENT, label="validation top-1, %")
    if told := [one for one in metrics if "train_top1" in one]:  # of clips that are mixed in training
        top1 = [100 * one["train_top1"] for one in told]
        _plot_curve(right, [one["epoch"] for one in told], top1, color=INK, label="training top-1, %")
    rates = [100 * one["learning_rate"] / _peak(metrics) for one in metrics]
    _plot_curve(right, epochs, rates, color=MUTED, linestyle=":", label="learning rate, % of its peak")
    for axes in (left, right):
        axes.set(xlabel="epoch", xlim=(0.5, 1.5) if epochs[-1] == 1 else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)  # on no curve
    return ["<h2>Training</h2>", draw_picture(render_figure(figure), "losses and accuracy by epoch")]


def _plot_curve(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A curve; one of a single point is a dot, for a line of it shows nothing."""
    axes.plot(x, y, marker="o" if len(x) == 1 else None, markersize=4, **style)


def _describe_steps(run: Run) -> list[str]:
    """What was told while epochs were under way; nothing of a short run, or of one from before that was told."""
    steps = read_steps(run.path)
    if not steps:
        return []
    curves = [
        [("loss", 1.0, "training loss")],
        [("learning_rate", 1.0, "learning rate"), ("gradient_norm", 1.0, "gradient norm")],
        [("clips_per_s", 1.0, "clips a second"), ("data_wait_share", 100.0, "waiting for data, %")],
    ]
    figure, panels = plt.subplots(1, len(curves), figsize=(12, 3.0))
    for axes, names in zip(panels, curves, strict=True):
        for place, (name, factor, label) in enumerate(names):
            own = axes if place == 0 else axes.twinx()
            colour = (ACCENT, MUTED)[place]
            _plot_curve(own, [one["epoch"] for one in steps], [factor * one[name] for one in steps], color=colour)
            own.set_ylabel(label, color=colour)
            own.spines[["top"]].set_visible(False)
        axes.set(xlabel="epoch")
    figure.tight_layout()
    return [draw_picture(render_figure(figure), "loss, rate, gradient, speed and waiting by step")]


def _peak(metrics: Sequence[dict[str, Any]]) -> float:
    return max(one["learning_rate"] for one in metrics) or 1.0


def _describe_confusion(result: Evaluation, classes: Sequence[str]) -> list[str]:
    counts = result.confusion()
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(wrong, axis=None)[::-1][:_MOST_PAIRS]
    pairs = [divmod(int(place), len(classes)) for place in order]
    rows = [
        [classes[true], classes[said], int(wrong[true, said]), f"{wrong[true, said] / counts[true].sum():.0%}"]
        for true, said in pairs
        if wrong[true, said]
    ]
    sections = [draw_table(["true", "predicted", "videos", "of the class"], rows)] if rows else ["<p>None.</p>"]
    if len(classes) <= _MOST_SHOWN_CLASSES:
        size = 3 + 0.22 * len(classes)
        figure, axes = plt.subplots(figsize=(size, size))
        draw_confusion(axes, counts, classes)
        sections.append(draw_picture(render_figure(figure), "confusion matrix"))
    return sections


def _plot_calibration(result: Evaluation) -> bytes:
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
    bins = find_calibration(result)
    axes.scatter(
        [one.confidence for one in bins],
        [one.accuracy for one in bins],
        s=[20 + 300 * one.count / len(result.labels) for one in bins],
        color=ACCENT,
        edgecolor=INK,
        linewidth=0.5,
    )
    axes.set(xlabel="mean probability of the answer", ylabel="share that is right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    return render_figure(figure)


def _describe_mistakes(result: Evaluation, store: StoreReader, classes: Sequence[str]) -> list[str]:
    wrong = np.flatnonzero(result.predictions != result.labels)
    if not store.layout.with_pixels or not len(wrong):
        return []
    surest = wrong[np.argsort(result.probabilities.max(axis=1)[wrong])[::-1][:_STRIPS]]
    ids = store.read_manifest(["video_id"])["video_id"]
    strips = []
    for place in surest:
        row = int(result.rows[place])
        true, said = classes[result.labels[place]], classes[result.predictions[place]]
        caption = f"{escape(true)}, predicted <span class='wrong'>{escape(said)}</span> "
        caption += f"({result.probabilities[place].max():.0%}) <span class='note'>{escape(ids[row].as_py())}</span>"
        strips.append(draw_strip(store, row, caption))
    return ["<h2>The surest mistakes</h2>", *strips]
