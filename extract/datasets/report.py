"""What is known of a data set, and what of it a folder holds, in lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...store.records import count_augmented

_SHOWN_PATHS = 20


def render_facts(facts: Mapping[str, Any]) -> list[str]:
    """The facts of one data set: fields of `DatasetFacts` by name."""
    first, *others = facts["layout"]
    lines = [
        f"{facts['name']}: {facts['title']}",
        f"source     {facts['source']}",
        f"layout     {first}",
        *(f"           {line}" for line in others),
        *(
            f"expected   {protocol + ': ' if protocol else ''}{_describe_counts(counts)}"
            for protocol, counts in facts["counts"].items()
        ),
    ]
    lines += [
        f"queries    {protocol + ': ' if protocol else ''}{_describe_counts(counts)}"
        for protocol, counts in facts["query_counts"].items()
    ]
    if facts["num_classes"]:
        lines.append(f"classes    {facts['num_classes']}")
    if facts["protocols"]:
        lines.append(f"protocols  {', '.join(facts['protocols'])} (--protocol; the first is the default)")
    return [*lines, f"clips      {facts['clip_settings']}", *_render_recipe(facts["recipe"])]


def list_cached(recipe: Mapping[str, Any]) -> list[str]:
    """What is cached of a row, split by split, and how its frames are chosen and resized.

    Args:
        recipe: Fields of an `ExtractionRecipe` by name.
    """
    frames, clips, views, held = (recipe[name] for name in ("frames", "clips", "views", "validation_clip"))
    parts = []
    for split in _list_splits(frames, clips, views, held):
        count = frames.get(split, frames.get(""))
        if not frames:
            parts.append(
                f"{split or 'all splits'}: as many frames as a video is long, views {views.get(split, 'centre')}"
            )
        if count is None:
            continue
        own, more = (1, 0) if split == "train" else (clips.get(split, clips.get("", 1)), int(split in held))
        told = f"{count} frames"
        if own + more > 1:
            told += f" ({own} clips of {count // (own + more)}{', one more for validation in training' * more})"
        name = views.get(split, views.get("", "centre"))
        drawn = f" ({', '.join(recipe['augmentation'])})" if count_augmented(name) else ""
        parts.append(f"{split or 'other splits'}: {told}, views {name}{drawn}")
    return [*parts, f"sampling {recipe['sampling']}, resize {recipe['resize']}"]


def _list_splits(*named: Iterable[str]) -> list[str]:
    """Names of splits in the order in which they are told: training first, what is not named last."""
    splits = {split for names in named for split in names}
    return sorted(splits, key=lambda split: (split == "", split != "train", split))


def _render_recipe(recipe: Mapping[str, Any]) -> list[str]:
    """What a new store caches where no option says otherwise."""
    presets = f", trained by the presets of {recipe['name']}" if recipe["name"] else ""
    network = f", for {recipe['network']} (--for)" if recipe["network"] else ""
    return [
        f"recipe     {recipe['told_as']}{presets}{network}",
        *(f"           {line}" for line in list_cached(recipe)),
    ]


def render_check(check: Mapping[str, Any]) -> list[str]:
    """What `check_folder` found."""
    lines = [f"{check['dataset']} in {check['root']}" + (f", {check['protocol']}" if check["protocol"] else "")]
    for split, counts in check["splits"].items():
        expected = "" if counts["expected"] is None else f", {counts['expected']} expected"
        lines.append(f"{split:8} {counts['listed']} listed{expected}, {counts['missing']} not on the disk")
    for split, counts in check["queries"].items():
        expected = "" if counts["expected"] is None else f", {counts['expected']} expected"
        lines.append(f"{split:8} {counts['listed']} queries{expected}, {counts['missing']} of videos that are missing")
    if check["expected_classes"]:
        lines.append(f"classes  {check['classes']} found, {check['expected_classes']} expected")
    if check["unlisted"]:
        lines.append(f"{check['unlisted']} videos below the root are in no row")
    lines += [f"  missing: {path}" for path in check["missing"][:_SHOWN_PATHS]]
    if len(check["missing"]) > _SHOWN_PATHS:
        lines.append(f"  and {len(check['missing']) - _SHOWN_PATHS} more: --json lists them all")
    return lines


def _describe_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in counts.items())
