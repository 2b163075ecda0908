"""Names of models: the short ones, open_clip's, and our own configurations in `models/`."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name

from ..errors import BackboneError

_MODELS = Path(__file__).parent / "tiny_clip"

# The -quickgelu architectures: OpenAI's weights in a model with plain GELU compute something else.
ALIASES: dict[str, tuple[str, str | None]] = {
    "vit-e": ("EVA02-E-14", "laion2b_s4b_b115k"),
    "vit-e-plus": ("EVA02-E-14-plus", "laion2b_s9b_b144k"),
    "vit-l": ("ViT-L-14-quickgelu", "openai"),
    "vit-b16": ("ViT-B-16-quickgelu", "openai"),
    "vit-b32": ("ViT-B-32-quickgelu", "openai"),
    "tiny-clip": ("tiny-clip", "world"),
}
"""Short names: the open_clip architecture, and the weights taken when the user names none."""

SHIPPED: dict[tuple[str, str], Path] = {("tiny-clip", "world"): _MODELS / "tiny-clip.safetensors"}
"""Weights that come with s4v, by architecture and tag."""


def resolve_model(name: str) -> tuple[str, str | None]:
    """The open_clip architecture of a model name, and its default weights.

    Raises:
        BackboneError: If there is no such model, with the closest names.
    """
    _register_models()
    if name in ALIASES:
        return ALIASES[name]
    known = open_clip.list_models()
    if name in known:
        return name, None
    by_lower = {candidate.lower(): candidate for candidate in [*ALIASES, *known]}
    close = difflib.get_close_matches(name.lower(), by_lower, n=4, cutoff=0.5)
    hint = f"Closest: {', '.join(by_lower[c] for c in close)}. " if close else ""
    raise BackboneError(
        f"unknown model {name!r}. {hint}Short names: {', '.join(ALIASES)}; others are open_clip architectures."
    )


@cache
def _register_models() -> None:
    open_clip.add_model_config(_MODELS)


@cache
def read_architecture(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture that `resolve_model` returned."""
    config = open_clip.get_model_config(architecture)
    assert config is not None and parse_model_name(architecture)[0] is None
    # Never let a config fetch weights on its own.
    return {**config, "vision_cfg": {**config["vision_cfg"], "timm_model_pretrained": False}}
