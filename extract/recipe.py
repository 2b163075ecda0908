"""What an extraction caches where nobody says otherwise: as the store that is there records it, else a recipe's.

A recipe fills new stores alone. Whoever goes on with a store (a resume, an append, a repair, a part) takes what it
records; what is given against that is refused where the two are compared.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from .config import RECIPE_FIELDS, ExtractConfig
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
    source: Any = config.recipe if target.reader is None else target.reader.facts
    return replace(config, **{name: getattr(source, name) for name in RECIPE_FIELDS if getattr(config, name) is None})


def describe_recipe(config: ExtractConfig, target: Target) -> str | None:
    """In a line what an extraction caches, and where that comes from; None where that is s4v's own, or not known yet.

    Args:
        config: As it was asked for.
        target: What stands at its place.
    """
    settled = settle_recipe(config, target).recipe
    if target.reader is not None:
        whose = f"as {config.out} was begun"
    elif settled.name is None or target.is_half_appended:
        return None
    else:
        given = [f"--{name.replace('_', '-')}" for name in RECIPE_FIELDS if getattr(config, name) is not None]
        whose = f"the recipe of {config.dataset} ({settled.told_as})"
        whose += f", with {', '.join(given)} as given" if given else ""
    return f"{whose}: {'; '.join(list_cached(asdict(settled)))}"
