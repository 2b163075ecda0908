"""The paper's networks and the reference's recipes by name, such as `b16-light-ssv2`: `--preset`.

A preset is a size (which layers, S) and a recipe (epochs, rate, warm-up, weight decay, label smoothing, for retrieval
also clips in a step and where gradients are cut). Options that were given win over it. What the facts that we hold do
not state stays at s4v's default: frames of a clip (8; the paper tests with 8 and 16) and, for recognition, clips in a
step (32; the reference takes 256 over 8 GPUs, for E/14 fewer).

Source:
    Sizes: Side4Video, https://arxiv.org/abs/2311.15769. Recipes: the scripts and configurations of HJYao00/Side4Video
    at 5d72352. Ours differ where train/recipe.py differs: docs/decisions.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ConfigError, StoreMismatchError
from ..store.reader import StoreReader
from .config import Family, Task, TrainConfig
from .recipe import reference_learning_rate


@dataclass(frozen=True, slots=True)
class Size:
    """A side network of the paper, and the backbone beside which it stands."""

    family: Family
    """CLIP or EVA, and so the side blocks."""
    width: int
    """D."""
    depth: int
    """Blocks of the backbone."""
    patch_px: int
    side_width: int
    """S."""
    every: int
    """1 taps every block, 2 every second one; the last is always tapped."""
    recipe: str
    """Which rows of `_RECIPES` are its own."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Tapped blocks, 0-based."""
        return tuple(range(self.every - 1, self.depth, self.every))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast a network is trained."""

    epochs: int
    learning_rate: float
    warmup_epochs: float = 4.0
    weight_decay: float = 0.15
    label_smoothing: float | None = 0.1
    batch_size: int = 32
    clip_norm: float | None = None


SIZES = {
    "b16": Size("clip", 768, 12, 16, 320, 1, "b"),
    "b16-light": Size("clip", 768, 12, 16, 192, 2, "b"),
    "l14": Size("clip", 1024, 24, 14, 512, 1, "l"),
    "l14-light": Size("clip", 1024, 24, 14, 320, 2, "l"),
    "e14": Size("eva", 1792, 64, 14, 576, 2, "e"),
}

_RECIPES = {
    ("b", "k400"): Recipe(30, 1e-3),
    ("b", "ssv1"): Recipe(40, 1e-3),
    ("b", "ssv2"): Recipe(30, 1e-3),
    ("l", "k400"): Recipe(30, 1e-4),
    ("l", "ssv1"): Recipe(30, 1e-4),
    ("l", "ssv2"): Recipe(30, 1e-4),
    ("e", "k400"): Recipe(20, 1e-4),
    ("e", "ssv1"): Recipe(30, 1e-4, warmup_epochs=6.0),
    ("e", "ssv2"): Recipe(25, 1e-4, warmup_epochs=6.0),
}

# The reference's of MSR-VTT, MSVD and VATEX, whatever the backbone.
_RETRIEVAL_RECIPE = Recipe(5, 1e-4, weight_decay=0.2, label_smoothing=None, batch_size=128, clip_norm=1.0)
_RETRIEVAL_SIDE_WIDTH = 320
_RETRIEVAL_WARMUP = 0.1
"""Of all epochs."""
_RETRIEVAL_DATASETS = ("msrvtt", "msvd", "vatex")

PAPER_SIDE_WIDTHS = {size.width: size.side_width for name, size in SIZES.items() if not name.endswith("-light")}
"""S of the paper's full networks, by the backbone's width."""

DATASETS: dict[Task, tuple[str, ...]] = {
    "recognition": tuple(sorted({dataset for _, dataset in _RECIPES})),
    "retrieval": _RETRIEVAL_DATASETS,
}

PRESETS = tuple(f"{size}-{dataset}" for size in SIZES for sets in DATASETS.values() for dataset in sets)
"""Names that `--preset` takes beside auto and none."""


def side_family(store: StoreReader) -> Family:
    """Which side blocks the reference puts beside a store's backbone: EVA's beside EVA, else CLIP's."""
    return "eva" if store.attributes["backbone"]["architecture"].startswith("EVA") else "clip"


def resolve_preset(config: TrainConfig, store: StoreReader) -> TrainConfig:
    """Fill in what a configuration leaves open, from a preset or from s4v's defaults.

    `auto` is the preset of the store's backbone and data set whose layers are those at hand, or the full one of a
    store that holds every layer; `none` where there is no such preset, or the head is not the side network.

    Args:
        config: Options as given; what was not given is None.
        store: What it trains on.

    Returns:
        The configuration with the preset's name, and neither rate, epochs, warm-up, weight decay, batch size nor, for
        recognition, label smoothing None. `layers` and `side_width` stay None without a preset: they follow from the
        store.

    Raises:
        ConfigError: If there is no such preset, or the head has no use for one.
        StoreMismatchError: If a preset that was named is of another backbone, or its layers are not in the store.
    """
    name = config.preset
    if name == "auto":
        name = find_preset(config, store) or "none"
    elif name != "none":
        _require_fitting_preset(config, store)
    is_retrieval = config.task == "retrieval"
    recipe = _RETRIEVAL_RECIPE if is_retrieval else Recipe(30, reference_learning_rate(store.layout.width))
    sizes: dict[str, Any] = {"side_width": _RETRIEVAL_SIDE_WIDTH} if is_retrieval and _is_of_paper(store) else {}
    if name != "none":
        size, recipe = _look_up(name)
        sizes = {"layers": size.layers, "side_width": _RETRIEVAL_SIDE_WIDTH if is_retrieval else size.side_width}
    values = {**sizes, **asdict(recipe)}
    if is_retrieval:
        values["warmup_epochs"] = _RETRIEVAL_WARMUP * (config.epochs or recipe.epochs)
    chosen = {field: value for field, value in values.items() if getattr(config, field) is None}
    return replace(config, preset=name, **chosen)


def find_preset(config: TrainConfig, store: StoreReader) -> str | None:
    """The preset that `auto` takes; None where the backbone, the data set or the layers are in no preset."""
    dataset = store.attributes["dataset"]["name"]
    if config.head != "side4video" or dataset not in DATASETS[config.task]:
        return None
    layers = set(config.layers or store.layout.layers)
    # The full network comes before the light one of the same backbone: every layer in a store is the full one's.
    for name, size in SIZES.items():
        is_whole = not config.layers and len(layers) == size.depth
        if _is_beside(size, store) and (is_whole or layers == set(size.layers)):
            return f"{name}-{dataset}"
    return None


def _look_up(name: str) -> tuple[Size, Recipe]:
    size, _, dataset = name.rpartition("-")
    recipe = _RETRIEVAL_RECIPE if dataset in _RETRIEVAL_DATASETS else _RECIPES[SIZES[size].recipe, dataset]
    return SIZES[size], recipe


def _is_of_paper(store: StoreReader) -> bool:
    return any(_is_beside(size, store) for size in SIZES.values())


def _is_beside(size: Size, store: StoreReader) -> bool:
    backbone = store.attributes["backbone"]
    found = (side_family(store), backbone["width"], backbone["depth"], backbone["patch_size"][0])
    return found == (size.family, size.width, size.depth, size.patch_px)


def _require_fitting_preset(config: TrainConfig, store: StoreReader) -> None:
    if config.preset not in PRESETS:
        raise ConfigError(f"--preset takes auto, none, {', '.join(PRESETS)}; found {config.preset!r}")
    if config.head != "side4video":
        raise ConfigError(f"--preset has no effect on --head {config.head}: leave it out, or train --head side4video")
    if config.preset.rpartition("-")[2] not in DATASETS[config.task]:
        raise ConfigError(f"--preset {config.preset} is not for --task {config.task}")
    size, _ = _look_up(config.preset)
    if not _is_beside(size, store):
        backbone = store.attributes["backbone"]
        raise StoreMismatchError(
            f"--preset {config.preset} is for a {size.family.upper()} backbone of width {size.width}, {size.depth} "
            f"blocks, patches of {size.patch_px} px; {store.path} is of {backbone['architecture']}: width "
            f"{backbone['width']}, {backbone['depth']} blocks, {backbone['patch_size'][0]} px. Use --preset auto."
        )
    if config.layers is None:
        store.layer_places(size.layers)
