"""The side network: a light spatial-temporal ladder beside the frozen backbone's tapped layers.

Four variants from the same parts: for recognition (`SideNetwork`) or retrieval (`RetrievalSideNetwork`), beside CLIP or
EVA. The two families differ in where a block and a tap normalise; docs/networks.md has all of it as formulas.
Token-major throughout: activations are (B, T, N, S), so every projection is one matrix product over the last axis.

Source:
    Side4Video, https://arxiv.org/abs/2311.15769; reference code HJYao00/Side4Video at 5d72352,
    Recognition/clip/model.py, Recognition/eva_clip/eva_vit_model.py, Retrieval/modules/module_clip.py and
    Retrieval/eva_clip/eva_vit_model.py. Ours differs in layout (the reference permutes between five of them in each
    block), in computing the stem and the temporal convolution as matrix products and shifted sums, in one product for
    queries, keys and values, and in taking cached tokens or their codes instead of running the backbone. Outputs and
    gradients agree: tests/golden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NotRequired, TypedDict, Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from ...errors import ConfigError, StoreMismatchError
from ...store.codecs.contract import Codec
from ...store.needs import StoreNeeds, require_needs
from ...store.reader import StoreReader
from ..choices import Family, Inputs, Similarity
from ..paper.presets import PAPER_SIDE_WIDTHS, PRESETS, RETRIEVAL_SIDE_WIDTH, is_of_paper, side_family
from ..recipe import ParameterGroup
from .contract import FrameNetwork, Network, NetworkKind, NetworkShape, Outputs
from .norms import BatchNorm, recomputing
from .parts import (
    HEAD_WIDTH,
    Classifier,
    FrameAttention,
    Mlp,
    PixelStem,
    Tap,
    TemporalConv,
    TowerEnd,
    draw_linear,
    normalise_channels,
    normalise_tokens,
)
from .text_interaction import MeanInteraction, WeightedTokenInteraction

_BACKBONE_RATE_SHARE = 1e-3
"""Of the rate, for what is trained of the backbone."""

_HIGHEST_LOGIT_SCALE = math.log(100)
"""CLIP's, and the reference's: similarities are multiplied with 100 at most."""

_POSITION_STD: dict[Family, float] = {"clip": 0.01, "eva": 0.02}

_INSTEAD: Mapping[str, str] = {
    "pixels": "train with --inputs tokens or --head linear",
    "cls": "train with --head attentive",
}
"""What recognition can do with a store that lacks it."""

ARRAYS: dict[str, tuple[str, ...]] = {
    "all": ("patches", "cls", "pixels"),
    "tokens": ("patches", "cls"),
    "pixels": ("pixels",),
}
"""By what a side network sees: the arrays of a store that it reads."""


class LadderSizes(TypedDict):
    """What every variant is built from; `SideLadder` says what each means."""

    num_layers: int
    width: int
    side_width: int
    num_patches: int
    patch_px: int
    family: NotRequired[Family]
    inputs: NotRequired[Inputs]


class SideLadder(Network):
    """What all variants share: the stem on the pixels, then a tap and a block for each layer.

    Args:
        num_layers: L, tapped layers; one block each.
        width: D, the backbone's.
        side_width: S, a multiple of 64.
        num_patches: N, patches of a frame.
        patch_px: Side of a patch, as in the backbone.
        family: `clip` has pre-norm blocks and taps Linear(LN(h)), `eva` post-norm blocks and taps LN(Linear(h)).
        inputs: `all`, or for ablations `pixels` (every token is zero) or `tokens` (the stem's output is zero).
        has_class_position: Whether the class token has a position embedding too, before those of the patches.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        side_width: int,
        num_patches: int,
        patch_px: int,
        family: Family = "clip",
        inputs: Inputs = "all",
        has_class_position: bool = False,
    ) -> None:
        super().__init__()
        self.arrays = ARRAYS[inputs]
        self.width = width
        self.num_patches = num_patches
        self.is_post_norm = family == "eva"
        self._position_std = _POSITION_STD[family]
        self.stem = self.make_stem(side_width, patch_px) if "pixels" in self.arrays else None
        self.position = nn.Parameter(torch.empty(num_patches + has_class_position, side_width))
        self.taps = nn.ModuleList(Tap(width, side_width, self.is_post_norm) for _ in range(num_layers))
        self.blocks = nn.ModuleList(self.make_block(side_width) for _ in range(num_layers))

    def make_stem(self, side_width: int, patch_px: int) -> nn.Module:
        """What turns pixels into side tokens, (B, T, N, S); a ladder of another paper has its own."""
        return PixelStem(side_width, patch_px)

    def make_block(self, side_width: int) -> nn.Module:
        """What follows each tap; it takes what `SideBlock` takes."""
        return SideBlock(side_width, self.is_post_norm)

    def draw_position(self) -> None:
        """Initialise the position embedding: last of all, so that a seed gives the weights that it always gave."""
        nn.init.normal_(self.position, std=self._position_std)

    def climb(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor | None,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Side tokens after the last block.

        Args:
            pixels: (B, T, 3, H, W), normalised as for the backbone; None where `inputs` leaves them out. A ladder with
                `pixel_offsets` takes (B, T, O, 3, H, W).
            patches: (B, T, L, N, D) patch tokens or, with a codec, (B, T, L, N, K) codes; None as above.
            cls: (B, T, L, D) class tokens of the same layers; None as above.
            codec: Decodes the codes of each layer when its tap needs them; arrays on the same device.

        Returns:
            (B, T, N, S).

        Raises:
            StoreMismatchError: If the number of layers or patches is not this network's.
        """
        if "patches" not in self.arrays:
            assert pixels is not None
            # Of zeros one patch serves for all: a tap makes the same of each.
            patches = pixels.new_zeros(1, 1, len(self.taps), 1, self.width)
            cls = pixels.new_zeros(*pixels.shape[:2], len(self.taps), self.width)
            codec = None
        assert patches is not None and cls is not None
        if "patches" in self.arrays and patches.shape[2:4] != (len(self.taps), self.num_patches):
            raise StoreMismatchError(
                f"this network takes {len(self.taps)} layers of {self.num_patches} patches; "
                f"found {patches.shape[2]} layers of {patches.shape[3]}"
            )
        if self.stem is None:
            x = cls.new_zeros(*cls.shape[:2], self.num_patches, self.position.shape[1])
        else:
            x = self.stem(pixels)  # (B, T, N, S)
        for layer in range(len(self.taps)):
            if self.checkpoints_activations and self.training:
                x = recompute_in_backward(
                    self._climb_one,
                    *(x, layer, patches, cls, codec),
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing is drawn, and asking a GPU for its state holds it up
                    context_fn=recomputing,
                )
            else:
                x = self._climb_one(x, layer, patches, cls, codec)
        return x

    def _climb_one(
        self, x: torch.Tensor, layer: int, patches: torch.Tensor, cls: torch.Tensor, codec: Codec | None
    ) -> torch.Tensor:
        tap, tokens = self.taps[layer], patches[:, :, layer]
        assert isinstance(tap, Tap)
        read = tap(tokens.to(cls.dtype)) if codec is None else tap.read_codes(tokens, codec, layer)
        mean = (x + read).mul_(0.5)
        return self.blocks[layer](mean, tap(cls[:, :, layer]), self.position)

    def begin_with(self, other: Network) -> None:
        """Begin where another side network ended, whatever its task: stem, taps, blocks, norm, positions of patches.

        Raises:
            StoreMismatchError: If it is none, or a tensor is missing or of another size; the first few named.
        """
        if not isinstance(other, SideLadder):
            raise StoreMismatchError("its network is no side network")
        own, state = self.state_dict(), other.state_dict()
        names = [name for name in own if name.split(".")[0] in ("stem", "taps", "blocks", "norm")]
        wrong = [name for name in names if name not in state or state[name].shape != own[name].shape]
        ours, theirs = own["position"][-self.num_patches :], state["position"][-self.num_patches :]
        if wrong or ours.shape != theirs.shape:
            raise StoreMismatchError(
                f"its network has other sizes: {', '.join(wrong[:3]) or 'position'} of {len(names)} tensors"
            )
        with torch.no_grad():
            for name in names:
                own[name].copy_(state[name])
            ours.copy_(theirs)


class SideNetwork(SideLadder):
    """Recognition: the mean over time and space, then a classifier.

    Beside CLIP a batch norm comes before the mean, beside EVA none.

    Args:
        num_classes: Classes to tell apart.

    The others are those of `SideLadder`.
    """

    def __init__(self, *, num_classes: int, **sizes: Unpack[LadderSizes]) -> None:
        super().__init__(**sizes)
        side_width = sizes["side_width"]
        self.norm = None if self.is_post_norm else BatchNorm(side_width)
        self.classifier = Classifier(side_width, num_classes)
        self.draw_position()

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor | None,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Score clips, from what `SideLadder.climb` takes: (B, num_classes) logits."""
        x = self.climb(pixels, patches, cls, codec)
        pooled = x.mean(dim=(1, 2)) if self.norm is None else normalise_channels(self.norm, x).mean(dim=(2, 3))
        return self.classifier(pooled)


class RetrievalSideNetwork(SideLadder, FrameNetwork):
    """Retrieval: the mean over space, added to the backbone's last class token, through the frozen tower's own end.

    The last tapped layer must be the backbone's last block: its class token is the one that is added to.

    Args:
        embed_dim: E, the backbone's.
        norm_eps: Of the tower's final norm: 1e-5 for CLIP, 1e-6 for EVA.
        has_projection_bias: Whether the tower's projection has a bias: EVA's has.
        interaction: How its frames are compared with texts, by the module of that name; `forward` does not use it.
        normalises_frames: Whether frames are normalised before their mean is taken.
        decorrelation: Weight of the channel decorrelation loss, of `wti`.
        trains_end: Whether the tower's final norm and projection are trained too.
        trains_logit_scale: Whether the factor of similarities is trained too; else it is the backbone's.

    What is trained of the backbone is so at a thousandth of the rate. The others are those of `SideLadder`.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        norm_eps: float,
        has_projection_bias: bool,
        interaction: Similarity = "mean",
        normalises_frames: bool = False,
        decorrelation: float = 0.0,
        trains_end: bool = True,
        trains_logit_scale: bool = True,
        **sizes: Unpack[LadderSizes],
    ) -> None:
        super().__init__(**sizes, has_class_position=sizes.get("family", "clip") == "clip")
        width, side_width = sizes["width"], sizes["side_width"]
        self.norm = BatchNorm(side_width)
        self.widen = nn.Linear(side_width, width, bias=False)
        self.end = TowerEnd(width, embed_dim, norm_eps, has_projection_bias)
        # Before training, frames are embedded as the backbone alone embeds them.
        nn.init.zeros_(self.widen.weight)
        self.end.requires_grad_(trains_end)
        self.draw_position()
        self.interaction = (
            WeightedTokenInteraction(embed_dim, decorrelation=decorrelation, heeds_frame_mask=self.is_post_norm)
            if interaction == "wti"
            else MeanInteraction(normalises_frames=normalises_frames)
        )
        self.text_arrays = self.interaction.text_arrays
        self.normalises_frames = normalises_frames
        if trains_logit_scale:
            self.logit_scale = nn.Parameter(torch.tensor(_HIGHEST_LOGIT_SCALE))
        if not self.is_post_norm:
            self._draw_linear_layers()

    def _draw_linear_layers(self) -> None:
        """Draw all linear layers again, as the reference does beside CLIP when all else is built."""
        for block in self.blocks:
            assert isinstance(block, SideBlock)
            block.draw_linear_layers()
        for layer in (*self.taps.modules(), *self.interaction.modules()):
            if isinstance(layer, nn.Linear):
                draw_linear(layer)

    def forward(
        self,
        pixels: torch.Tensor | None,
        patches: torch.Tensor | None,
        cls: torch.Tensor,
        codec: Codec | None = None,
    ) -> torch.Tensor:
        """Embed the frames of clips, from what `SideLadder.climb` takes: (B, T, E), not normalised."""
        x = self.climb(pixels, patches, cls, codec)
        x = normalise_channels(self.norm, x).mean(dim=3).transpose(1, 2)  # (B, S, T, N) -> (B, T, S)
        return self.end(self.widen(x) + cls[:, :, -1])

    def prepare(self, store: StoreReader) -> None:
        """Take the final norm and the projection of the store's backbone, and its factor of similarities."""
        self.end.load_arrays(store.head)
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, float(store.head["logit_scale"]))

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """What is trained of the backbone, at a thousandth of the rate, and all the rest."""
        scale = () if self.logit_scale is None else (self.logit_scale,)
        of_end = {id(parameter) for parameter in self.end.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        own = tuple(p for p in trained if id(p) not in of_end | {id(p) for p in scale})
        return [
            ParameterGroup(own),
            ParameterGroup(tuple(p for p in trained if id(p) in of_end), _BACKBONE_RATE_SHARE),
            ParameterGroup(scale, _BACKBONE_RATE_SHARE, highest=_HIGHEST_LOGIT_SCALE),
        ]


class SideBlock(nn.Module):
    """Temporal convolution, attention inside each frame with the shifted class token, MLP; all residual.

    Pre-norm each branch is x + f(norm(x)), post-norm x + norm(f(x)): the sum itself is never normalised.
    """

    def __init__(self, side_width: int, is_post_norm: bool = False) -> None:
        super().__init__()
        self.is_post_norm = is_post_norm
        self.temporal_norm = BatchNorm(side_width)
        self.temporal = TemporalConv(side_width)
        self.attention_norm = nn.LayerNorm(side_width)
        self.attention = FrameAttention(side_width)
        if not is_post_norm:
            self.attention.draw_weights()
        self.mlp_norm = BatchNorm(side_width)
        self.mlp = Mlp(side_width)
        if not is_post_norm:
            self.mlp.draw_weights()

    def draw_linear_layers(self) -> None:
        """Initialise as the reference's retrieval does beside CLIP; attention's first product is no layer there."""
        self.temporal.draw_weights()
        for layer in (self.attention.project, *self.mlp):
            if isinstance(layer, nn.Linear):
                draw_linear(layer)

    def convolve_time(self, x: torch.Tensor) -> torch.Tensor:
        """The temporal branch of a pre-norm block: (B, T, N, S) -> (B, T, N, S)."""
        return self.temporal(x, self.temporal_norm)

    def forward(self, x: torch.Tensor, cls: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Side tokens (B, T, N, S), the tap's class tokens (B, T, S), position (N or 1+N, S) -> (B, T, N, S)."""
        if self.is_post_norm:
            x = x + normalise_tokens(self.temporal_norm, self.temporal(x))
            x = x + self.attention_norm(self.attention(x, cls, position))
            return x + normalise_tokens(self.mlp_norm, self.mlp(x))
        x = x + self.convolve_time(x)
        x = x + self.attention(x, cls, position, self.attention_norm)
        return x + self.mlp(x, self.mlp_norm)


@dataclass(frozen=True)
class SideOptions:
    """What a command says of a side network."""

    side_width: int | None = None
    """S; None takes the paper's for this backbone, about 0.4 D for others."""
    inputs: Inputs = "all"
    """What it sees."""
    interaction: Similarity | None = None
    """Of retrieval, as the others: how frames are compared with texts; None takes their means."""
    normalises_frames: bool = False
    """Whether frames are normalised before their mean is taken."""
    decorrelation: float = 0.0
    """Weight of the channel decorrelation loss, of `wti`; the reference's is 0.001 where it is switched on."""
    trains_end: bool = True
    """Whether the tower's final norm and projection are trained too, at a thousandth of the rate."""
    trains_logit_scale: bool = True
    """Whether the factor of similarities is trained too, at a thousandth of the rate."""


@dataclass(frozen=True, kw_only=True)
class SideShape(NetworkShape):
    """Of a side network."""

    side_width: int
    """S."""
    inputs: Inputs = "all"
    family: Family = "clip"
    """Its blocks; runs from before there was a choice have CLIP's, whatever their backbone."""
    embed_dim: int | None = None
    """E, of retrieval."""
    norm_eps: float | None = None
    """Of the tower's final norm, of retrieval."""
    has_projection_bias: bool = False
    """Whether the tower's projection has a bias, of retrieval."""
    interaction: Similarity = "mean"
    """How frames are compared with texts, of retrieval."""
    normalises_frames: bool = True
    """As in `SideOptions`, as are the next three; what is absent is as runs had it before there was a choice."""
    decorrelation: float = 1e-3
    trains_end: bool | None = None
    """None trains it beside EVA and not beside CLIP."""
    trains_logit_scale: bool = False

    @property
    def compares_words(self) -> bool:
        """Whether by weighted token-wise interaction."""
        return self.interaction == "wti"


class Side4Video(NetworkKind):
    """The side network: see above."""

    name = "side4video"
    tasks = ("recognition", "retrieval")
    reads = "patch and class tokens of all layers, pixels, order"
    options = SideOptions
    shape: ClassVar[type[NetworkShape]] = SideShape
    presets = PRESETS
    needs: ClassVar[Mapping[str, StoreNeeds]] = {
        "recognition": StoreNeeds(arrays=ARRAYS["all"], instead=_INSTEAD),
        "retrieval": StoreNeeds(
            arrays=ARRAYS["all"], head=True, text_tower=True, instead={"pixels": "train with --inputs tokens"}
        ),
    }
    can_begin_with_a_run = True
    can_checkpoint_activations = True

    def find_needs(self, task: str, options: SideOptions | SideShape) -> StoreNeeds:
        """Of the arrays what its inputs are."""
        return replace(self.needs[task], arrays=ARRAYS[options.inputs])

    def find_sizes(self, task: str, store: StoreReader) -> Mapping[str, Any]:
        """For retrieval the paper has one S, whatever the backbone."""
        return {"side_width": RETRIEVAL_SIDE_WIDTH} if task == "retrieval" and is_of_paper(store) else {}

    def plan(self, store: StoreReader, outputs: Outputs, options: SideOptions, layers: tuple[int, ...]) -> NetworkShape:
        """Fit it to a store: blocks of the backbone's family, and for retrieval the end of its tower."""
        require_needs(store, self.find_needs(outputs.task, options), f"--head {self.name}")
        _require_effect(options, is_retrieval=outputs.embed_dim is not None)
        side_width = find_side_width(options.side_width, store)
        if "pixels" in ARRAYS[options.inputs]:
            require_square_patches(store, "Take --inputs tokens.")
        ends: dict[str, Any] = {}
        if outputs.embed_dim is not None:
            last = store.facts.backbone.depth - 1
            if layers[-1] != last:
                raise StoreMismatchError(
                    f"retrieval adds to the class token of the backbone's last block, {last}; --layers ends with "
                    f"{layers[-1]}"
                )
            ends = {
                "embed_dim": outputs.embed_dim,
                "norm_eps": float(store.head["norm_eps"]),
                "has_projection_bias": "proj_bias" in store.head,
                "interaction": options.interaction or "mean",
                "normalises_frames": options.normalises_frames,
                "decorrelation": options.decorrelation,
                "trains_end": options.trains_end,
                "trains_logit_scale": options.trains_logit_scale,
            }
        return self.describe_shape(
            store, outputs, layers, side_width=side_width, inputs=options.inputs, family=side_family(store), **ends
        )

    def find_differences(self, shape: SideShape, store: StoreReader) -> list[str]:
        """Blocks of the other family. A run of ours from before there was a choice has CLIP's beside any backbone."""
        if (family := side_family(store)) == shape.family:
            return []
        return [f"side blocks: {family.upper()}'s beside the store's, {shape.family.upper()}'s in the run"]

    def build(self, shape: SideShape) -> SideNetwork | RetrievalSideNetwork:
        """The variant for the shape's task."""
        sizes: LadderSizes = {
            "num_layers": len(shape.layers),
            "width": shape.width,
            "side_width": shape.side_width,
            "num_patches": shape.num_patches,
            "patch_px": shape.patch_px,
            "family": shape.family,
            "inputs": shape.inputs,
        }
        if shape.embed_dim is None:
            return SideNetwork(**sizes, num_classes=shape.num_classes)
        assert shape.norm_eps is not None
        return RetrievalSideNetwork(
            **sizes,
            embed_dim=shape.embed_dim,
            norm_eps=shape.norm_eps,
            has_projection_bias=shape.has_projection_bias,
            interaction=shape.interaction,
            normalises_frames=shape.normalises_frames,
            decorrelation=shape.decorrelation,
            trains_end=shape.family == "eva" if shape.trains_end is None else shape.trains_end,
            trains_logit_scale=shape.trains_logit_scale,
        )


def _require_effect(options: SideOptions, *, is_retrieval: bool) -> None:
    """Refuse options of retrieval that nothing would heed.

    Raises:
        ConfigError: With what to do.
    """
    names = ("normalises_frames", "decorrelation", "trains_end", "trains_logit_scale")
    idle = [name for name in names if getattr(options, name) != type(options).__dataclass_fields__[name].default]
    if idle and not is_retrieval:
        raise ConfigError(f"--set {idle[0]} has no effect but on --task retrieval: leave it out")
    if options.decorrelation and options.interaction != "wti":
        raise ConfigError("--set decorrelation has no effect on means: leave it out, or take --interaction wti")
    if not 0 <= options.decorrelation < math.inf:
        raise ConfigError(f"--set decorrelation takes a number from 0 up; found {options.decorrelation:g}")


def find_side_width(given: int | None, store: StoreReader) -> int:
    """S: what was given, else the paper's beside a backbone of this width, else about 0.4 of that.

    Raises:
        ConfigError: If it is no whole number of attention heads.
    """
    width = store.layout.width
    side_width = given or PAPER_SIDE_WIDTHS.get(width) or max(HEAD_WIDTH, round(0.4 * width / HEAD_WIDTH) * HEAD_WIDTH)
    if side_width % HEAD_WIDTH:
        raise ConfigError(f"--side-width must be a multiple of 64 (one attention head); found {side_width}")
    return side_width


def require_square_patches(store: StoreReader, instead: str) -> None:
    """Refuse a backbone whose patches are not square, as a stem on pixels takes them.

    Args:
        store: Of the backbone.
        instead: What to do, as a sentence.

    Raises:
        StoreMismatchError: With the patch's sides.
    """
    height, width = store.facts.backbone.patch_size
    if height != width:
        raise StoreMismatchError(
            f"the pixel stem takes square patches; those of {store.path} have {height} x {width} pixels. {instead}"
        )
