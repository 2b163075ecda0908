"""What an extraction caches where nobody says otherwise: as the store that is there records it, else a recipe's.

A recipe fills new stores alone. Whoever goes on with a store (a resume, an append, a repair, a part) takes what it
records; what is given against that is refused where the two are compared.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ..backbone.facts import describe_size
from ..store.offsets import DEFAULT_PIXEL_EDGE, SEEN_FRAME, describe_offsets
from .config import RECIPE_FIELDS, ExtractConfig
from .datasets import find_protocol
from .datasets.report import list_cached
from .target import Target


def settle_recipe(config: ExtractConfig, target: Target) -> ExtractConfig:
    """The same extraction with every field of its recipe filled in.

    Args:
        config: As it was asked for.
        target: What stands at its place.

    Returns:
        With what the store that is there records, else what `config.recipe` has; as it was where a store is half
        appended to, which cannot be read yet.
    """
    if target.is_half_appended:
        return config
    if target.reader is None:
        source: Any = config.recipe
        protocol = config.protocol or find_protocol(config.dataset, config.root, config.annotations)
    else:
        source = target.reader.facts
        protocol = config.protocol or source.dataset.protocol
    values = {name: getattr(source, name) for name in RECIPE_FIELDS if getattr(config, name) is None}
    if target.reader is None:
        values.pop("augmentation", None)  # the recipe has it, and only where it was given it is told as given
    if target.reader is not None and target.reader.facts.backbone.own_image_size is not None:
        values["input_size"] = target.reader.facts.backbone.image_size  # `Target.find` refuses another one
    return replace(config, protocol=protocol, **values, **_settle_offsets(config, target))


def _settle_offsets(config: ExtractConfig, target: Target) -> dict[str, Any]:
    """Pixel offsets and what stands beyond a row's ends, as the store has them where nobody says otherwise."""
    reader = target.reader
    if reader is None:
        return {"pixel_offsets": config.cached_offsets, "pixel_edge": config.cached_edge}
    # Where no pixels are asked for, the comparison with the store says what is wrong with that.
    own = reader.layout.pixel_offsets if config.with_pixels else (SEEN_FRAME,)
    offsets = own if config.pixel_offsets is None else config.cached_offsets
    edge = reader.facts.pixel_edge if config.pixel_edge is None and config.with_pixels else config.cached_edge
    return {"pixel_offsets": offsets, "pixel_edge": edge}


def describe_recipe(config: ExtractConfig, target: Target) -> str | None:
    """In a line what an extraction caches, and where that comes from; None where that is s4v's own, or not known yet.

    Args:
        config: As it was asked for.
        target: What stands at its place.
    """
    chosen = settle_recipe(config, target)
    settled, protocol = chosen.recipe, f", protocol {chosen.protocol}" if chosen.protocol else ""
    if target.reader is not None:
        whose = f"as {config.out} was begun{protocol}"
    elif settled.name is None or target.is_half_appended:
        return None
    else:
        given = [f"--{name.replace('_', '-')}" for name in RECIPE_FIELDS if getattr(config, name) is not None]
        whose = f"the recipe of {config.dataset}{protocol} ({settled.told_as})"
        whose += f", with {', '.join(given)} as given" if given else ""
    told = [*list_cached(asdict(settled)), *_list_offsets(chosen)]
    if chosen.input_size is not None:
        told.append(f"input {describe_size(chosen.input_size)}")
    return f"{whose}: {'; '.join(told)}"


def _list_offsets(config: ExtractConfig) -> list[str]:
    """Where more is stored than the frames that the backbone sees."""
    if config.cached_offsets == (SEEN_FRAME,):
        return []
    edge = "" if config.cached_edge == DEFAULT_PIXEL_EDGE else f", edge {config.cached_edge}"
    return [f"pixels at {describe_offsets(config.cached_offsets)} of each frame{edge}"]
