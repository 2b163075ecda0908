"""What a store holds, as plain figures (rows, arrays, bytes), and those figures in lines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from ..errors import StoreDamagedError, StoreMismatchError
from ..files import describe_bytes
from .class_texts import describe_class_texts
from .fidelity import NOTABLE_LOSS, read_fidelity
from .layout import CODEC_GROUPS, CODED_ARRAY
from .offsets import DEFAULT_PIXEL_EDGE, PixelOffset, describe_offsets
from .reader import StoreReader
from .records import Status, count_augmented
from .text_choice import CLASSES_NAME, TEXT_NAME
from .texts import TextReader, has_current_texts

_SHOWN_VIDEOS = 20
_CODED = (("layers", "layers", "--channels"), ("cls_layers", "class tokens of layers", "--cls-channels"))
"""What fidelity tells of: its key, in words, and the option that keeps more."""
_LEFT_OUT = ("moments", "pending", "pixels", "input", "cls")
"""Lines that are not there where there is nothing to tell."""
_CLASS_TOKENS: Mapping[str, str] = {
    "own": "",
    "mean": "means of patch tokens, in the place of class tokens",
    "none": "none: the backbone has no class token",
}
"""In words, where they are not the tower's own."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of a store, and the files that they are of: segments of one file are rows of their own."""

    rows: dict[str, int]
    """By status: ok, failed, pending."""
    files: dict[str, int]
    """Files with a row of that status."""


def count_rows(store: StoreReader) -> RowCounts:
    """Count the rows of a store, and their files, as it is now."""
    return count_table(store.read_manifest(["path", "status"]))


def try_count_rows(store: StoreReader) -> RowCounts | None:
    """The same; None where the manifest is damaged."""
    try:
        return count_rows(store)
    except StoreDamagedError:
        return None


def count_statuses(store: StoreReader) -> dict[str, int]:
    """Count the rows of a store by status alone, which is less to read."""
    return _by_status(store.read_manifest(["status"]).group_by("status").aggregate([("status", "count")]))


def count_table(table: pa.Table) -> RowCounts:
    """Count rows and files of a manifest's columns path and status."""
    files = table.select(["path", "status"]).group_by("status").aggregate([("path", "count_distinct")])
    rows = table.group_by("status").aggregate([("status", "count")])
    return RowCounts(_by_status(rows), _by_status(files))


def _by_status(counts: pa.Table) -> dict[str, int]:
    """A table of statuses and one count as a dict, with zeros for statuses that no row has."""
    (name,) = set(counts.column_names) - {"status"}
    count_by_status = dict(zip(counts["status"].to_pylist(), counts[name].to_pylist(), strict=True))
    return {status: count_by_status.get(status, 0) for status in get_args(Status)}


def count_reasons(table: pa.Table, status: Status) -> dict[str, int]:
    """How many rows of a status have a reason, by its code, the most frequent first.

    Args:
        table: A manifest's columns status and reason.
        status: Rows that are pending may have a reason, too: the machine failed, not the video.
    """
    reasons = table.filter(pa.compute.equal(table["status"], status))["reason"].to_pylist()
    return dict(Counter(reason.partition(":")[0] for reason in reasons if reason).most_common())


def describe_store(store: StoreReader) -> dict[str, Any]:
    """Count a store's rows and bytes.

    Returns:
        what reads it here (reader), rows (and files) by status, rows by split, failures and pending rows by reason
        code, arrays with shape, dtype and bytes on disk (of texts what was asked for too), bytes of one cached frame,
        backbone, codec, cls_codec (where class tokens are coded) and what they cost (fidelity; None where that is not
        known), layers, pixel_format (None without pixels), pixel_offsets (none without), pixel_edge, class_tokens (own,
        mean of patch tokens in their place, or none), frames (frame_range by split where rows are as long as their
        videos), sampling, resize, clips, views, augmentation, validation_clip and recipe (None where there was none),
        classes, captions.
    """
    table = store.read_manifest(["path", "split", "status", "reason", "num_cached_frames", "num_views"])
    attributes, facts = store.attributes, store.facts
    by_split: dict[str, dict[str, int]] = {}
    for split, status in zip(table["split"].to_pylist(), table["status"].to_pylist(), strict=True):
        counts = by_split.setdefault(split, {"ok": 0, "failed": 0, "pending": 0})
        counts[status] += 1
    totals = count_table(table)
    arrays = {
        spec.name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype,
            "bytes": _folder_bytes(os.fspath(store.path / spec.name)),
        }
        for spec in store.layout.array_specs()
    }
    views = zip(table["num_cached_frames"].to_pylist(), table["num_views"].to_pylist(), strict=True)
    if has_current_texts(store.path):
        for name, array in TextReader(store).describe().items():
            folder = os.fspath(store.path / TEXT_NAME / name)
            arrays[f"{TEXT_NAME}/{name}"] = {**array, "bytes": _folder_bytes(folder)}
    if (classes := describe_class_texts(store)) is not None:
        folder = os.fspath(store.path / TEXT_NAME / CLASSES_NAME)
        arrays[f"{TEXT_NAME}/{CLASSES_NAME}"] = {**classes, "bytes": _folder_bytes(folder)}
    return {
        "store": str(store.path),
        "format_version": facts.format_version,
        "created": facts.created,
        "dataset": attributes["dataset"],
        "reader": store.describe_reading(),
        "videos": totals.rows,
        "files": totals.files,
        "splits": by_split,
        "failures": count_reasons(table, "failed"),
        "pending_reasons": count_reasons(table, "pending"),
        "cached_frames": sum((frames or 0) * (num_views or 0) for frames, num_views in views),
        "arrays": arrays,
        "bytes": _folder_bytes(os.fspath(store.path)),
        "bytes_per_frame": store.layout.bytes_per_frame,
        "backbone": attributes["backbone"],
        "layers": list(store.layout.layers),
        "pixel_format": store.layout.pixel_format if store.layout.with_pixels else None,
        "pixel_offsets": [offset.recorded for offset in store.layout.pixel_offsets] * store.layout.with_pixels,
        "pixel_edge": facts.pixel_edge,
        "class_tokens": store.layout.class_tokens,
        "frames": attributes["frames"],
        **({"frame_range": _find_frame_range(table)} if facts.is_open_ended else {}),
        "sampling": facts.sampling,
        "resize": facts.resize,
        **{name: getattr(facts, name) for name in ("clips", "views", "augmentation", "validation_clip", "recipe")},
        **_count_channels(store),
        "fidelity": read_fidelity(store.path),
        "classes": len(store.classes.names),
        "captions": len(store.read_captions()),
        "moments": _count_moments(store),
        "libraries": attributes["libraries"],
    }


def _count_channels(store: StoreReader) -> dict[str, Any]:
    """The codecs, `codec` of patches and `cls_codec` of class tokens that are coded, with what they keep of a token."""
    layouts = {CODED_ARRAY: store.layout, "cls": store.layout.of_cls()}
    return {
        CODEC_GROUPS[array]: {
            **store.attributes[CODEC_GROUPS[array]],
            "channels": layouts[array].channels,
            "width": store.layout.width,
            "keep_bits": layouts[array].keep_bits,
        }
        for array in store.facts.codecs
    }


def _find_frame_range(table: pa.Table) -> dict[str, list[int]]:
    """By split the fewest and the most frames that a good row holds."""
    good = table.filter(pa.compute.equal(table["status"], "ok")).group_by("split")
    ranges = good.aggregate([("num_cached_frames", "min"), ("num_cached_frames", "max")]).to_pylist()
    return {one["split"]: [one["num_cached_frames_min"], one["num_cached_frames_max"]] for one in ranges}


def _describe_frames(facts: Mapping[str, Any], split: str) -> str:
    """Of a row of a split: their number, or the fewest and the most."""
    if "frame_range" not in facts:
        return str(_find_of(facts["frames"], split))
    return " to ".join(map(str, facts["frame_range"].get(split, ["none"])))


def _count_moments(store: StoreReader) -> dict[str, int] | None:
    """Queries with windows, and with scored clips; None where the store does not say where its captions are shown."""
    try:
        moments = store.read_moments()
    except StoreMismatchError:
        return None
    return {"windows": int(moments.has_windows.sum()), "scores": int(moments.has_scores.sum())}


def _describe_moments(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return ""
    return f"{counts['windows']} captions with windows, {counts['scores']} with scored clips"


def _folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder."""
    total = 0
    if not os.path.isdir(folder):  # noqa: PTH112
        raise StoreDamagedError(f"{folder} is missing. Extract the store anew (--overwrite).")
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)  # a link to a folder above would never end
            total += _folder_bytes(entry.path) if is_folder else entry.stat(follow_symlinks=False).st_size
    return total


def _find_of(by_split: Mapping[str, Any], split: str) -> Any:
    return by_split.get(split, by_split.get(""))


def _describe_views(facts: Mapping[str, Any], split: str) -> str:
    """Of a split with more than the centre."""
    views = _find_of(facts["views"], split) or "centre"
    drawn = f": {', '.join(facts['augmentation'] or ())}" if count_augmented(views) else ""
    return "" if views == "centre" else f", views {views}{drawn}"


def _describe_activation(backbone: Mapping[str, Any]) -> str:
    """Of its MLPs; nothing where the store does not tell it."""
    return f", {backbone['activation']}" if "activation" in backbone else ""


def _describe_input(backbone: Mapping[str, Any]) -> str:
    """What the backbone sees, where that is another size than its weights were made for; else nothing."""
    if "own_image_size" not in backbone:
        return ""
    size, grid, own = (" x ".join(map(str, backbone[name])) for name in ("image_size", "grid", "own_image_size"))
    return f"{size} pixels, {grid} patches; its weights were made for {own}"


def render_info(facts: Mapping[str, Any]) -> list[str]:
    """What `describe_store` found, in lines."""
    backbone = facts["backbone"]
    lines = {
        "store": f"{facts['store']} (format {facts['format_version']}, {facts['created']})",
        "videos": _describe_counts(facts["videos"], facts["files"]),
        "splits": "; ".join(
            f"{name}: {sum(counts.values())} (frames {_describe_frames(facts, name)}{_describe_views(facts, name)})"
            for name, counts in sorted(facts["splits"].items())
        ),
        "failures": _describe_reasons(facts["failures"]) or "none",
        "pending": _describe_reasons(facts["pending_reasons"]),
        "classes": f"{facts['classes']}, captions {facts['captions']}",
        "moments": _describe_moments(facts["moments"]),
        "backbone": f"{backbone['name']} ({backbone['architecture']}), weights {backbone['weights']}, "
        f"{backbone['precision']} on {backbone['device_type']}{_describe_activation(backbone)}",
        "layers": f"{','.join(map(str, facts['layers']))} of {backbone['depth']}, width {backbone['width']}",
        "input": _describe_input(backbone),
        "cls": _describe_class_tokens(facts),
        "codec": _describe_codec(facts["codec"]),
        "frames": f"{facts['cached_frames']} cached, {facts['sampling']} sampling, resize {facts['resize']}"
        + (f", by the recipe of {facts['recipe']}" if facts["recipe"] else ""),
        "pixels": _describe_pixels(facts),
        "a frame": ", ".join(f"{name} {describe_bytes(size)}" for name, size in facts["bytes_per_frame"].items()),
        "on disk": describe_bytes(facts["bytes"]),
        "read by": facts["reader"],
    }
    arrays = [
        f"  {name:10} {array['dtype']:8} {tuple(array['shape'])}  {describe_bytes(array['bytes'])}"
        + _describe_texts(array)
        for name, array in facts["arrays"].items()
    ]
    shown = [f"{name:9} {text}" for name, text in lines.items() if text or name not in _LEFT_OUT]
    return [*shown, *arrays, *([] if facts["fidelity"] is None else _render_fidelity(facts["fidelity"]))]


def _describe_texts(array: Mapping[str, Any]) -> str:
    """What was asked for of an array of texts; nothing of other arrays."""
    blocks = f", blocks {','.join(map(str, array['blocks']))} of the text tower" if "blocks" in array else ""
    return blocks + (f", in {array['template']!r}" if "template" in array else "")


def describe_poor_layers(facts: Mapping[str, Any]) -> str | None:
    """Name the layers that lost much by coding, in one line; None where none did."""
    fidelity = facts["fidelity"] or {}
    parts = []
    for name, what, option in _CODED:
        if poor := [one["layer"] for one in fidelity.get(name, ()) if 1 - one["variance_kept"] > NOTABLE_LOSS]:
            lost = f"{what} {','.join(map(str, poor))} lost more than {NOTABLE_LOSS:.0%} of their variance"
            parts.append(f"{lost}: keep more {option} if accuracy suffers")
    return "; ".join(parts) or None


def describe_rows(rows: Mapping[str, int], files: Mapping[str, int]) -> str:
    """`55 rows of 23 files ok, 1 failed, 0 pending`; videos, where each is a row of its own."""
    good = f"{describe_files(rows['ok'], files['ok'])} ok"
    return ", ".join([good, *(f"{count} {status}" for status, count in rows.items() if status != "ok")])


def describe_files(num_rows: int, num_files: int) -> str:
    """`55 rows of 23 files`; `23 videos`, where each is a row of its own."""
    return f"{num_rows} videos" if num_rows == num_files else f"{num_rows} rows of {num_files} files"


def describe_unfinished(store: Path, rows: Mapping[str, int]) -> str | None:
    """What a store lacks, in one line; None where it lacks nothing."""
    total, parts = sum(rows.values()), []
    if rows["pending"]:
        parts.append(f"{rows['pending']} of {total} rows are pending: the same extract command finishes them")
    if rows["failed"]:
        parts.append(f"{rows['failed']} of {total} rows failed: see s4v info {store}")
    return f"{store}: {'; '.join(parts)}" if parts else None


def render_reasons(rows: Sequence[Mapping[str, str]], elsewhere: str) -> list[str]:
    """The first videos with their reasons, in lines.

    Args:
        rows: video_id and reason of each.
        elsewhere: Where the others are told.
    """
    lines = [f"  {row['video_id']}: {row['reason']}" for row in rows[:_SHOWN_VIDEOS]]
    more = len(rows) - _SHOWN_VIDEOS
    return [*lines, f"  and {more} more: see {elsewhere}"] if more > 0 else lines


def _describe_counts(rows: Mapping[str, int], files: Mapping[str, int]) -> str:
    """`10 ok, 1 failed, 0 pending`, and the files where rows are parts of them."""
    counts = ", ".join(f"{count} {status}" for status, count in rows.items())
    if rows == files:
        return counts
    return f"{counts} rows; files with such rows: {', '.join(f'{count} {status}' for status, count in files.items())}"


def _describe_reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in reasons.items())


def _describe_pixels(facts: Mapping[str, Any]) -> str:
    """How they are held and which frames stand around each cached one; nothing of RGB that stands alone, or of none."""
    parts = [facts["pixel_format"]] if facts["pixel_format"] not in (None, "rgb") else []
    if len(facts["pixel_offsets"]) > 1:
        edge = "" if facts["pixel_edge"] == DEFAULT_PIXEL_EDGE else f", edge {facts['pixel_edge']}"
        offsets = describe_offsets([PixelOffset.of(one) for one in facts["pixel_offsets"]])
        parts.append(f"at {offsets} of each frame{edge}")
    return ", ".join(parts)


def _describe_class_tokens(facts: Mapping[str, Any]) -> str:
    """What stands in their place, and how they are coded; nothing where they are the tower's own, as they were."""
    kind = _CLASS_TOKENS[facts["class_tokens"]]
    coded = _describe_codec(facts["cls_codec"]) if "cls_codec" in facts else ""
    return "; ".join(text for text in (kind, coded) if text)


def _describe_codec(codec: Mapping[str, Any]) -> str:
    bits = f", {codec['keep_bits']} mantissa bits" if codec["keep_bits"] else ""
    return f"{codec['dtype']}{bits}, {codec['channels']} of {codec['width']} channels, sha256 {codec['sha256'][:12]}"


def _render_fidelity(fidelity: Mapping[str, Any]) -> list[str]:
    """What coding cost, layer by layer, and what the pixel format cost."""
    kind = (
        "that the codec was not fitted on"
        if fidelity["is_held_out"]
        else "that the codec was fitted on: there are no others"
    )
    heads = ("layer", "variance", "error: median", "worst", "normed: median", "worst", "cosine")
    lines = [f"after decoding, on {fidelity['videos']} videos {kind}:", "  " + "  ".join(heads)]
    lines = [*lines, *map(_render_layer, fidelity["layers"])] if fidelity["layers"] else []
    if cls_layers := fidelity.get("cls_layers"):
        lines += ["class tokens:", *map(_render_layer, cls_layers)]
    if clipped := fidelity.get("clipped"):
        lines.append("clipped codes: " + ", ".join(f"{view} {share:.3%}" for view, share in clipped.items()))
    if pixels := fidelity.get("pixels"):
        lines.append(f"pixels after decoding, on {fidelity['videos']} videos: {_describe_loss(pixels)}")
    return lines


def _describe_loss(pixels: Mapping[str, Any]) -> str:
    """Of frames that are no RGB: `41.3 dB PSNR, error of 255: mean 1.52, worst 87`."""
    psnr = "as they were" if pixels["psnr"] is None else f"{pixels['psnr']:.1f} dB PSNR"
    return f"{psnr}, error of 255: mean {pixels['error_mean']:.2f}, worst {pixels['error_worst']}"


def _render_layer(one: Mapping[str, Any]) -> str:
    errors = f"{one['error_median']:13.2%}  {one['error_worst']:5.1%}"
    normed = f"{one['normed_error_median']:14.2%}  {one['normed_error_worst']:5.1%}"
    return f"  {one['layer']:5}  {one['variance_kept']:8.2%}  {errors}  {normed}  {one['cosine_median']:6.4f}"
