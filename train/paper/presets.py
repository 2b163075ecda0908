"""The paper's networks and the reference's recipes by name, such as `b16-light-ssv2`: `--preset`.

A preset is a size (which layers, S) and a recipe (epochs, rate, warm-up, weight decay, label smoothing, frames of a
clip, clips in a step of a process, views of a video in a step, for retrieval also where gradients are cut). Options
that were given win over it.

Source:
    Sizes: Side4Video, https://arxiv.org/abs/2311.15769. Recipes: the scripts and configurations of HJYao00/Side4Video
    at 5d72352. Ours differ where train/recipe.py differs: docs/decisions.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...backbone.facts import read_side_family
from ...errors import ConfigError, StoreMismatchError
from ...store.reader import StoreReader
from ..config import Family, Task, TrainConfig
from ..recipe import reference_learning_rate


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
    """How long and how fast a network is trained, and on what in each step."""

    epochs: int
    learning_rate: float
    warmup_epochs: float = 4.0
    weight_decay: float = 0.15
    label_smoothing: float | None = 0.1
    batch_size: int = 32
    """Clips in a step: of one process, for retrieval of all."""
    clip_norm: float | None = None
    frames: int = 8
    """T of the released configurations; the paper tests with 8 and 16."""
    views_per_video: int = 1


SIZES = {
    "b16": Size("clip", 768, 12, 16, 320, 1, "b"),
    "b16-light": Size("clip", 768, 12, 16, 192, 2, "b"),
    "l14": Size("clip", 1024, 24, 14, 512, 1, "l"),
    "l14-light": Size("clip", 1024, 24, 14, 320, 2, "l"),
    "e14": Size("eva", 1792, 64, 14, 576, 2, "e"),
}

# Something-Something's steps hold two augmented samples of each of 16 (for E 8) videos. E on Kinetics is released with
# one clip on each of 8 GPUs: here the eight are one device's.
_RECIPES = {
    ("b", "k400"): Recipe(30, 1e-3),
    ("b", "ssv1"): Recipe(40, 1e-3, views_per_video=2),
    ("b", "ssv2"): Recipe(30, 1e-3, views_per_video=2),
    ("l", "k400"): Recipe(30, 1e-4),
    ("l", "ssv1"): Recipe(30, 1e-4, views_per_video=2),
    ("l", "ssv2"): Recipe(30, 1e-4, views_per_video=2),
    ("e", "k400"): Recipe(20, 1e-4, batch_size=8),
    ("e", "ssv1"): Recipe(30, 1e-4, warmup_epochs=6.0, batch_size=16, views_per_video=2),
    ("e", "ssv2"): Recipe(25, 1e-4, warmup_epochs=6.0, batch_size=16, views_per_video=2),
}

# The reference's of MSR-VTT, MSVD and VATEX, whatever the backbone.
_RETRIEVAL_RECIPE = Recipe(5, 1e-4, weight_decay=0.2, label_smoothing=None, batch_size=128, clip_norm=1.0, frames=12)
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
    return read_side_family(store.attributes["backbone"])


def resolve_preset(config: TrainConfig, store: StoreReader, *, num_processes: int = 1) -> TrainConfig:
    """Fill in what a configuration leaves open, from a preset or from s4v's defaults.

    `auto` is the preset of the store's backbone and data set whose layers are those at hand, or the full one of a
    store that holds every layer; `none` where there is no such preset, or the head is not the side network.

    Args:
        config: Options as given; what was not given is None.
        store: What it trains on.
        num_processes: That train together; a batch of retrieval is shared out among them.

    Returns:
        The configuration with the preset's name, and neither rate, epochs, warm-up, weight decay, batch size nor, for
        recognition, label smoothing None. `layers` and `side_width` stay None without a preset: they follow from the
        store. `frames` stays None unless a preset was named, and `views_per_video` in any case: they follow from the
        rows, `resolve_views`.

    Raises:
        ConfigError: If there is no such preset, the head has no use for one, or a batch of retrieval cannot be shared
            out.
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
    values = {**sizes, **asdict(recipe), "views_per_video": None}
    if config.preset in ("auto", "none"):
        values["frames"] = None  # as many as the rows hold, up to the task's default
    if is_retrieval:
        values["warmup_epochs"] = _RETRIEVAL_WARMUP * (config.epochs or recipe.epochs)
        values["batch_size"], rest = divmod(recipe.batch_size, num_processes)
        if rest and config.batch_size is None:
            raise ConfigError(
                f"a step of {recipe.batch_size} pairs cannot be shared out evenly among {num_processes} processes: "
                "give --batch-size, the pairs of each"
            )
    chosen = {field: value for field, value in values.items() if getattr(config, field) is None}
    return replace(config, preset=name, **chosen)


def resolve_views(config: TrainConfig, num_views: np.ndarray, num_processes: int = 1) -> int:
    """Views of a video in a step: those asked for, else the preset's where every training row holds as many, else 1.

    Args:
        config: As `resolve_preset` left it.
        num_views: Of each training row.
        num_processes: That train together: their batch norms take it that all have as many clips.

    Raises:
        StoreMismatchError: If no row holds as many as were asked for, or, of several processes, not every row.
    """
    if config.views_per_video is not None:
        held = int(num_views.max() if num_processes == 1 else num_views.min())
        if config.views_per_video > held:
            raise StoreMismatchError(
                f"{config.views_per_video} views of a video were asked for (--views-per-video), training rows of "
                f"{config.features} hold {held}: extract with --views train=flip or train=three"
            )
        return config.views_per_video
    wanted = _look_up(config.preset)[1].views_per_video if config.preset != "none" else 1
    return wanted if int(num_views.min()) >= wanted else 1


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
