"""The paper's networks and the reference's recipes by name, such as `b16-light-ssv2`: `--preset`.

A preset is a size (which layers, S) and a recipe (epochs, rate, warm-up, weight decay, label smoothing, frames of a
clip, clips in a step and those that a batch norm counts, views of a video in a step, which videos are too short to
train on, for retrieval also where gradients are cut, what steps and what does not decay). One of retrieval compares
words with frames. Options that were given win over it.

Source:
    Sizes: Side4Video, https://arxiv.org/abs/2311.15769. Recipes: the scripts and configurations of HJYao00/Side4Video
    at 5d72352. Of TDS-CLIP, https://arxiv.org/abs/2408.10688: those of BBYL9413/TDS-CLIP at cf4e58c. Of DiST,
    https://arxiv.org/abs/2309.07911: those of alibaba-mmai-research/DiST at 4b3a09b, README and configs/projects/dist.
    Ours differ where train/recipe.py differs: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...backbone.facts import read_side_family
from ...store.reader import StoreReader
from ..choices import Family
from ..recipe import Preset, Recipe


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

    def beside(self, task: str, name: str, dataset: str, recipe: Recipe, sizes: Mapping[str, Any]) -> Preset:
        """Its preset for a data set."""
        return Preset(
            name=f"{name}-{dataset}",
            task=task,
            dataset=dataset,
            family=self.family,
            width=self.width,
            depth=self.depth,
            patch_px=self.patch_px,
            layers=self.layers,
            recipe=recipe,
            sizes=sizes,
        )


SIZES = {
    "b16": Size("clip", 768, 12, 16, 320, 1, "b"),
    "b16-light": Size("clip", 768, 12, 16, 192, 2, "b"),
    "l14": Size("clip", 1024, 24, 14, 512, 1, "l"),
    "l14-light": Size("clip", 1024, 24, 14, 320, 2, "l"),
    "e14": Size("eva", 1792, 64, 14, 576, 2, "e"),
}


def _on_8_gpus(clips: int, recipe: Recipe) -> Recipe:
    """With as many clips on each GPU in a step."""
    return replace(recipe, step_clips=8 * clips, norm_clips=clips)


# Something-Something's steps hold two augmented samples of each of 16 (for E 8) videos. A GPU's norms count its own
# clips. E on Kinetics is released with one clip on each of 8 GPUs; where no preset was named, the eight are one
# device's. Of Kinetics alone it drops training videos that are shorter than 8 frames.
_RECIPES = {
    ("b", "k400"): _on_8_gpus(32, Recipe(30, 1e-3, min_video_frames=8)),
    ("b", "ssv1"): _on_8_gpus(32, Recipe(40, 1e-3, views_per_video=2)),
    ("b", "ssv2"): _on_8_gpus(32, Recipe(30, 1e-3, views_per_video=2)),
    ("l", "k400"): _on_8_gpus(32, Recipe(30, 1e-4, min_video_frames=8)),
    ("l", "ssv1"): _on_8_gpus(32, Recipe(30, 1e-4, views_per_video=2)),
    ("l", "ssv2"): _on_8_gpus(32, Recipe(30, 1e-4, views_per_video=2)),
    ("e", "k400"): _on_8_gpus(1, Recipe(20, 1e-4, batch_size=8, min_video_frames=8)),
    ("e", "ssv1"): _on_8_gpus(16, Recipe(30, 1e-4, warmup_epochs=6.0, batch_size=16, views_per_video=2)),
    ("e", "ssv2"): _on_8_gpus(16, Recipe(25, 1e-4, warmup_epochs=6.0, batch_size=16, views_per_video=2)),
}

# The reference's of MSR-VTT, MSVD and VATEX, whatever the backbone.
RETRIEVAL_RECIPE = Recipe(
    5,
    1e-4,
    weight_decay=0.2,
    label_smoothing=None,
    batch_size=128,
    clip_norm=1.0,
    frames=12,
    warmup_share=0.1,
    is_batch_of_all=True,
    step_clips=128,
    norm_clips=16,
    optimizer="uncorrected-adam",
    undecayed="biases",
)
RETRIEVAL_SIDE_WIDTH = 320
_RETRIEVAL_SIZES = {"side_width": RETRIEVAL_SIDE_WIDTH, "interaction": "wti"}
_RETRIEVAL_DATASETS = ("msrvtt", "msvd", "vatex")

PAPER_SIDE_WIDTHS = {size.width: size.side_width for name, size in SIZES.items() if not name.endswith("-light")}
"""S of the paper's full networks, by the backbone's width."""


def _list_presets() -> Iterator[Preset]:
    for name, size in SIZES.items():
        for dataset in sorted({dataset for _, dataset in _RECIPES}):
            sizes = {"side_width": size.side_width}
            yield size.beside("recognition", name, dataset, _RECIPES[size.recipe, dataset], sizes)
        for dataset in _RETRIEVAL_DATASETS:
            yield size.beside("retrieval", name, dataset, RETRIEVAL_RECIPE, _RETRIEVAL_SIZES)


PRESETS = tuple(_list_presets())
"""The full network comes before the light one of the same backbone: every layer in a store is the full one's."""


def _list_tds_clip_presets() -> Iterator[Preset]:
    """Sizes and recipes are those of Side4Video's full networks; of Kinetics, too, a step holds videos twice."""
    for name in ("b16", "l14"):
        size = SIZES[name]
        for dataset in ("k400", "ssv1", "ssv2"):
            recipe = replace(_RECIPES[size.recipe, dataset], views_per_video=2)
            yield size.beside("recognition", f"tds-clip-{name}", dataset, recipe, {"side_width": size.side_width})


TDS_CLIP_PRESETS = tuple(_list_tds_clip_presets())

DIST_RECIPE = Recipe(36, 3.2e-4, warmup_epochs=6.0, weight_decay=1e-4, undecayed="vectors")
"""Of all networks and data sets; a step has 256 clips of as many videos."""
DIST_SIDE_WIDTH = 384
_DIST_TEMPORAL_WIDTH = 96
_DIST_POOLING_LAYERS = {"k400": 4, "ssv2": 2}
_DIST_FRAMES = {"b16": (8, 16, 32), "l14": (32,)}


def _list_dist_presets() -> Iterator[Preset]:
    """Of a backbone and data set they differ in T alone, which `auto` takes from the store: it names the first one."""
    for name, lengths in _DIST_FRAMES.items():
        for dataset, pooling_layers in _DIST_POOLING_LAYERS.items():
            for frames in lengths:
                yield SIZES[name].beside(
                    "recognition",
                    f"dist-{name}-{frames}f",
                    dataset,
                    replace(DIST_RECIPE, step_clips=256, frames=frames),
                    {
                        "side_width": DIST_SIDE_WIDTH,
                        "temporal_width": _DIST_TEMPORAL_WIDTH,
                        "pooling_layers": pooling_layers,
                    },
                )


DIST_PRESETS = tuple(_list_dist_presets())


def side_family(store: StoreReader) -> Family:
    """Which side blocks the reference puts beside a store's backbone: EVA's beside EVA, else CLIP's."""
    return read_side_family(store.attributes["backbone"])


def is_of_paper(store: StoreReader) -> bool:
    """Whether a store's backbone is one of the paper's."""
    return any(preset.is_beside(*describe_backbone(store)) for preset in PRESETS)


def describe_backbone(store: StoreReader) -> tuple[str, int, int, int]:
    """What a preset is beside: family, width, blocks and patches of a store's backbone."""
    backbone = store.facts.backbone
    return side_family(store), backbone.width, backbone.depth, backbone.patch_size[0]
