"""What an extraction caches where nobody says otherwise: as the store that is there records it, else a recipe's.

A recipe fills new stores alone. Whoever goes on with a store (a resume, an append, a repair, a part) takes what it
records; what is given against that is refused where the two are compared.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

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
    return replace(config, protocol=protocol, **values)


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
    return f"{whose}: {'; '.join(list_cached(asdict(settled)))}"
