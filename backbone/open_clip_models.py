"""open_clip's models: their names with our short ones, their configurations, and where their weights come from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from ..errors import BackboneError, WeightsError
from ..files import hash_file, hash_text
from .facts import Activation
from .weights import WeightsSource, find_file, find_random, parameters_on_meta

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

ACTIVATIONS: Mapping[Activation | None, str] = {"gelu": "plain GELU", "quick_gelu": "QuickGELU"}
"""In words."""

SHIPPED: dict[tuple[str, str], Path] = {("tiny-clip", "world"): _MODELS / "tiny-clip.safetensors"}
"""Weights that come with s4v, by architecture and tag."""


def list_models() -> list[str]:
    """open_clip's architectures, and those of configurations that come with s4v."""
    _register_models()
    return open_clip.list_models()


def resolve_model(name: str) -> tuple[str, str | None]:
    """The open_clip architecture of a model name, and its default weights.

    Args:
        name: An alias, one of `list_models`, or the path of a configuration's file (`is_file_name`).

    Raises:
        BackboneError: If the file is not there, or holds no configuration.
    """
    _register_models()
    if is_file_name(name):
        return _register_file(Path(name)), None
    return ALIASES.get(name, (name, None))


@cache
def _register_models() -> None:
    open_clip.add_model_config(_MODELS)


def is_file_name(name: str) -> bool:
    """Whether a model is named by the file of its configuration: `PATH.json`."""
    return name.endswith(".json")


_OF_FILES: dict[str, dict[str, Any]] = {}
"""Configurations of files, by architecture."""


def _register_file(path: Path) -> str:
    """The architecture of a configuration's file: its name and a hash of what it says, so that no two are mixed up.

    Raises:
        BackboneError: If it is not there, or holds no configuration of open_clip's.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BackboneError(f"--model {path}: the configuration cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BackboneError(f"--model {path} is not JSON: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("model_cfg"), dict):  # as models are laid on hubs
        config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg") or {}}
    parts = ("vision_cfg", "text_cfg", "preprocess_cfg")
    is_right = isinstance(config, dict) and isinstance(config.get("embed_dim"), int) and "vision_cfg" in config
    if not is_right or not all(isinstance(config.get(part, {}), dict) for part in parts):
        raise BackboneError(
            f"--model {path} is no configuration of open_clip's: it must hold embed_dim, vision_cfg and, for texts, "
            "text_cfg"
        )
    architecture = f"{path.stem}@{hash_text(json.dumps(config, sort_keys=True))[:12]}"
    if architecture not in _OF_FILES:
        _OF_FILES[architecture] = config
        if "text_cfg" in config:  # open_clip makes a tokenizer for a name that it knows
            with tempfile.TemporaryDirectory(prefix="s4v-model-") as folder:
                copy = Path(folder) / f"{architecture}.json"
                copy.write_text(json.dumps(config), encoding="utf-8")
                open_clip.add_model_config(copy)
    return architecture


@cache
def read_architecture(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture that `resolve_model` returned."""
    config = _OF_FILES.get(architecture) or open_clip.get_model_config(architecture)
    assert config is not None and parse_model_name(architecture)[0] is None
    # Never let a config fetch weights on its own.
    return {**config, "vision_cfg": {**config["vision_cfg"], "timm_model_pretrained": False}}


def resolve_weights(name: str, weights: str | None, seed: int) -> WeightsSource:
    """Find a model's weights: `random`, a local file, or an open_clip tag (downloaded when it is not cached).

    Raises:
        WeightsError: If they cannot be had, or belong to another activation than the architecture has.
    """
    architecture, default_tag = resolve_model(name)
    shipped = SHIPPED.get((architecture, weights or default_tag or ""))
    weights = weights or default_tag
    tags = [*(tag for name, tag in SHIPPED if name == architecture), *list_pretrained_tags_by_model(architecture)]
    if weights is None:
        known = f"an open_clip tag ({', '.join(tags)}), " if tags else ""
        raise WeightsError(f"{name} has no default weights: give --weights {known}a file, or `random`")
    if (source := find_random(weights, seed, architecture, read_architecture(architecture))) is not None:
        return source
    if shipped is not None:
        if not shipped.is_file():
            raise WeightsError(f"the weights that come with s4v are not there: {shipped}. Install s4v again.")
        return WeightsSource(weights, hash_file(shipped), shipped)
    if (source := find_file(weights)) is not None:
        _require_activation(source.label, source.activation, architecture)
        return source
    if weights not in tags:
        raise WeightsError(
            f"no weights {weights!r} for {name}: no such file, and its tags are {', '.join(tags) or 'none'}"
        )
    config: dict[str, Any] = get_pretrained_cfg(architecture, weights) or {}
    _require_activation(repr(weights), "quick_gelu" if config.get("quick_gelu") else "gelu", architecture)
    try:
        path = Path(download_pretrained(config))
    except Exception as error:  # hubs raise whatever their HTTP library raises
        raise WeightsError(
            f"the weights {weights!r} of {architecture} are not cached and cannot be downloaded "
            f"({type(error).__name__}). Copy their file here and name it: --weights FILE; or use --weights random."
        ) from error
    return WeightsSource(weights, hash_file(path), path, pretrained_cfg=config)


def read_activation(architecture: str) -> Activation | None:
    """What an architecture computes in its MLPs; None of towers of other libraries, whose names tell it."""
    config = read_architecture(architecture)
    if "timm_model_name" in config["vision_cfg"]:
        return None
    return "quick_gelu" if config.get("quick_gelu") else "gelu"


def find_other_activation(architecture: str) -> str | None:
    """The same architecture with the other activation, where there is one."""
    suffix = "-quickgelu"
    other = architecture.removesuffix(suffix) if architecture.endswith(suffix) else architecture + suffix
    return other if other in list_models() else None


def _require_activation(weights: str, activation: Activation | None, architecture: str) -> None:
    """Refuse weights that were trained with another activation than an architecture has.

    Raises:
        WeightsError: With the architecture to take.
    """
    computed: Activation = "quick_gelu" if read_architecture(architecture).get("quick_gelu") else "gelu"
    if activation in (None, computed):
        return
    other = find_other_activation(architecture)
    raise WeightsError(
        f"the weights {weights} were trained with {ACTIVATIONS[activation]} and {architecture} computes the other: "
        + (f"use the architecture {other}" if other else "open_clip has no architecture that computes it")
    )


def build_tower(
    name: str, build: Callable[..., nn.Module], embed_dim: int, tower_config: Any, config: Mapping[str, Any]
) -> Any:
    """One of open_clip's towers, without memory for its weights.

    Raises:
        BackboneError: If it cannot be built.
    """
    try:
        with parameters_on_meta():
            return build(embed_dim, tower_config, config.get("quick_gelu", False))
    except (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError, AssertionError) as error:
        # Towers that compute while they are built, and files with sizes that cannot be.
        reason = str(error).splitlines()[0]
        raise BackboneError(
            f"a tower of {name} cannot be built ({reason}); s4v needs a ViT such as {', '.join(ALIASES)}"
        ) from error
