"""What a network is to the rest of s4v: a kind in the table, a shape in a run's folder, a module that is trained.

A new network is one file here: a `NetworkKind`, and the `Network` that it builds. docs/extending.md has an example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...errors import ConfigError
from ...store.class_texts import read_class_texts
from ...store.needs import NOTHING, StoreNeeds
from ..recipe import Optimisation, ParameterGroup, Preset, Recipe

if TYPE_CHECKING:
    from ...store.codecs.contract import Codec
    from ...store.reader import StoreReader
    from ..clips import ClipBatch, ClipPlan


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a task wants to come out of a network, as far as the store decides it."""

    task: str
    num_classes: int = 0
    """Of class scores; 0 where there are none."""
    embed_dim: int | None = None
    """E, where frames are embedded beside texts."""


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """Everything that a network's sizes follow from; saved with the run."""

    name: str
    """Of its kind."""
    num_classes: int
    """0 where the task knows no classes."""
    layers: tuple[int, ...]
    """Backbone blocks that it reads, ascending."""
    width: int
    """D, the backbone's."""
    num_patches: int
    patch_px: int
    task: str = "recognition"

    @property
    def compares_words(self) -> bool:
        """Whether a text is compared with a video word by word, and not as a whole."""
        return False

    @property
    def clip_frames(self) -> int | None:
        """T, where the weights are of so many frames; None takes clips of any length."""
        return None


@dataclass(frozen=True)
class NoOptions:
    """Of a network that has none."""


class Network(nn.Module):
    """What is trained: a module, and what a training and an evaluation must know of it.

    Its output is what its task takes: (B, classes) logits for recognition, (B, T, E) frames for retrieval. Buffers are
    state that is no weight (the texts of classes, say): `prepare` fills them, checkpoints hold them.
    """

    arrays: tuple[str, ...]
    """Of a store, that it reads: patches, cls, pixels."""
    pixel_offsets: tuple[int | str, ...] = (0,)
    """Of the pixels that it reads, 0 the frame that the backbone saw: of several, pixels are (B, T, O, 3, H, W).

    A number counts frames of the source; `"0.5step"` is half the distance of the clip's frames.
    """
    frames_per_token: int = 1
    """It reads tokens of every so-manieth frame of its clip, from the first on, and pixels of all."""
    text_arrays: tuple[str, ...] = ()
    """Of a store's texts, that its loss reads."""
    reads_texts: bool = False
    """Whether its forward pass reads them too: an evaluation then hands them over."""
    draws_by_example: bool = False
    """Whether it drops by keys of its clips (`ClipBatch.draws`, train/networks/draws.py)."""
    checkpoints_activations: bool = False
    """Whether each layer is computed again in the backward pass: less memory, a third more time."""

    def inputs(self, batch: ClipBatch) -> tuple[Any, ...]:
        """What `forward` takes of a batch, before the codec."""
        return batch.pixels, batch.patches, batch.cls

    def prepare(self, store: StoreReader) -> None:
        """Take from the store what is not learnt, before the first step. By default nothing.

        Raises:
            StoreMismatchError: If it is of another size.
        """

    def fit_clips(self, store: StoreReader, num_frames: int, lengths: np.ndarray) -> int:
        """Settle how it reads the clips of a store, which may be another one than it was trained on.

        Called before loaders are made: `pixel_offsets` and `frames_per_token` may follow from the store.

        Args:
            store: Whose clips it will read.
            num_frames: T, the run's.
            lengths: (n,) frames of the clips as they are cached.

        Returns:
            Frames of a clip that is read, those without tokens among them. By default T.

        Raises:
            StoreMismatchError: If the store has no clips for it.
        """
        return num_frames

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """What is trained, by its share of the rate. By default all that wants gradients, at the whole rate."""
        return [ParameterGroup(tuple(p for p in self.parameters() if p.requires_grad))]

    def own_losses(self, output: Any, batch: ClipBatch) -> Mapping[str, torch.Tensor]:
        """Losses () beside the task's, weighted, by name; they are added to it. By default none."""
        return {}

    def begin_with(self, other: Network) -> None:
        """Take the weights of a trained network, of this kind or one that it knows (`--init`).

        Raises:
            StoreMismatchError: If it is none that this one can begin with.
        """
        raise NotImplementedError(f"{type(self).__name__} begins with random weights: its kind says so")

    def reverse_plan(self, plan: ClipPlan) -> ClipPlan:
        """The same clips from their last frame to their first.

        Raises:
            ConfigError: If that cannot be read from a store.
        """
        return replace(plan, places=plan.places[:, ::-1])

    def reverse_batch(self, batch: ClipBatch) -> ClipBatch:
        """What is left to turn around once frames are in reverse order: what lies inside a frame, such as offsets."""
        return batch

    def folded(self, codec: Codec | None) -> AbstractContextManager[None]:
        """What may be computed once for a whole evaluation, and not in training where weights move. By default nothing.

        Args:
            codec: Of the layers that it reads, its arrays on the network's device.
        """
        return nullcontext()


class FrameNetwork(Network):
    """A network that embeds frames, (B, T, E), not normalised."""

    interaction: nn.Module
    """Compares `TextBatch` (A) with frames (B, T, E), and of clips that lack frames a mask (B, T); see
    train/networks/text_interaction.py."""
    normalises_frames: bool = True
    """Whether the mean of a video's frames is that of their directions, as where a search looks for it first."""
    logit_scale: nn.Parameter | None
    """() as a logarithm, what similarities are multiplied with in the loss; None takes the backbone's, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("logit_scale", None)


class TextNetwork(Network):
    """A network that classifies by text: logits are a factor times the cosine of a clip's vector and each class's text.

    Args:
        num_classes: Of the texts that it is trained with.
        embed_dim: E, of texts.
    """

    class_texts: torch.Tensor
    """(classes, E), not normalised."""
    logit_scale: torch.Tensor
    """() as a logarithm, the backbone's own."""

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("class_texts", torch.zeros(num_classes, embed_dim))
        self.register_buffer("logit_scale", torch.zeros(()))

    def prepare(self, store: StoreReader) -> None:
        """Take the texts of the store's classes, and its backbone's factor of similarities."""
        self.take_class_texts(read_class_texts(store).embedding)
        self.logit_scale.fill_(float(store.head["logit_scale"]))

    def take_class_texts(self, embedding: np.ndarray) -> None:
        """Classify as these from now on: (classes, E), of any number of classes."""
        self.class_texts = torch.from_numpy(np.array(embedding)).to(self.class_texts)

    def compare_texts(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, E) -> (B, classes) logits, in the precision of the texts whatever the rest is computed in.

        Scores of 16 bits tie where those of float32 do not.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            texts = F.normalize(self.class_texts, dim=-1)
            return self.logit_scale.exp() * F.linear(F.normalize(embedding.to(texts.dtype), dim=-1), texts)


class NetworkStack(nn.Module):
    """Several networks of one shape as one module, for heads that learn from the same batches."""

    def inputs(self, batch: ClipBatch) -> tuple[Any, ...]:
        """What `forward` takes of a batch, before the codec: what each of the networks takes."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Sequence[Any]:
        """The output of each network, in their order.

        On a CPU it is, as its gradients are, what the network gives alone, to the bit. No network's output depends on
        the parameters of another.
        """
        raise NotImplementedError


class NetworkKind(ABC):
    """What `--head NAME` trains, before there is one: facts, options, and how it fits a store."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    """That it serves, by name."""
    reads: ClassVar[str]
    """What it reads and what it is blind to, in a phrase for tables."""
    extraction: ClassVar[Mapping[str, Any]] = {}
    """What `s4v extract --for NAME` sets, by field of an extraction's config, where nobody says otherwise."""
    needs: ClassVar[Mapping[str, StoreNeeds]] = {}
    """By task: what a store must have for it, with its options as they are by default. A store that lacks it is refused
    before anything is read."""
    options: ClassVar[type] = NoOptions
    """A dataclass of its options, each with a default. One that is named like a field of `TrainConfig` is given by that
    field's option, the others by `--set name=value`."""
    shape: ClassVar[type[NetworkShape]] = NetworkShape
    presets: ClassVar[Sequence[Preset]] = ()
    """Of papers; of two that fit a store, the first is taken."""
    is_trained: ClassVar[bool] = True
    """Whether there is anything to train; one that is not has `score`."""
    can_begin_with_a_run: ClassVar[bool] = False
    """Whether `--init` has a meaning: its networks have `begin_with`."""
    classifies_by_text: ClassVar[bool] = False
    """Whether its networks are `TextNetwork`: they are evaluated on other classes without training."""
    can_checkpoint_activations: ClassVar[bool] = False
    """Whether its networks heed `checkpoints_activations`."""
    optimisation: ClassVar[Mapping[str, Optimisation]] = {}
    """By task: what it wants otherwise than the task (schedule, moments, what decays)."""

    tried_rates: ClassVar[Sequence[float]] = ()
    """What `s4v compare` chooses its learning rate from, on held-out training videos; none takes its recipe's."""
    tried_decays: ClassVar[Sequence[float]] = ()
    """The same of weight decay."""

    def find_recipe(self, task: str, width: int) -> Recipe | None:
        """How it is trained without a preset, beside a backbone of a width; None takes the task's own recipe."""
        return None

    def find_needs(self, task: str, options: Any) -> StoreNeeds:
        """What a store must have for it with these options; by default what `needs` says.

        Args:
            task: By name.
            options: An instance of `options`, or a shape, which has fields of the same names.
        """
        return self.needs.get(task, NOTHING)

    def find_sizes(self, task: str, store: StoreReader) -> Mapping[str, Any]:
        """Options that it takes without a preset, beside this store's backbone: those are written into the run."""
        return {}

    def check_step(self, num_clips: int) -> None:
        """Refuse a step of so few clips that it teaches nothing.

        Raises:
            ConfigError: With what to do.
        """

    @abstractmethod
    def plan(self, store: StoreReader, outputs: Outputs, options: Any, layers: tuple[int, ...]) -> NetworkShape:
        """Fit it to a store.

        Args:
            store: Whose tokens it will read.
            outputs: What the task wants.
            options: An instance of `options`.
            layers: Backbone blocks to use; the store holds them.

        Raises:
            ConfigError: If an option does not fit.
            StoreMismatchError: If the store lacks what it reads.
        """

    def go_on_with(self, planned: Any, begun: Any) -> NetworkShape:
        """The shape that a run goes on with, of what is planned now and what it began with.

        They differ where s4v has come to plan otherwise; what a user asks for otherwise is refused later. By default
        what is planned.
        """
        return planned

    def find_differences(self, shape: Any, store: StoreReader) -> list[str]:
        """What an imported network was built for and a store's backbone is not, in words. By default nothing."""
        return []

    def build(self, shape: Any) -> Network:
        """A freshly initialised network of that shape; seed torch before for the same weights."""
        raise NotImplementedError(f"{self.name} is nothing that is trained")

    def stack(self, networks: Sequence[Any]) -> NetworkStack | None:
        """Networks of one shape, freshly built, as one module: they learn from the same batches in one step.

        They may share what is no parameter and is the same in all, such as a norm's statistics. None, the default, has
        them learn one after another from each batch.
        """
        return None

    def score(self, store: StoreReader, split: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of a kind that is not trained: scores (n, classes) of a split's good, labelled rows, and their labels (n,).

        Raises:
            S4vError: If this store's backbone cannot be asked.
        """
        raise NotImplementedError(f"{self.name} is trained")

    def describe_shape(self, store: StoreReader, outputs: Outputs, layers: tuple[int, ...], **own: Any) -> NetworkShape:
        """Its shape, with what every network takes from a store filled in."""
        return self.shape(
            name=self.name,
            task=outputs.task,
            num_classes=outputs.num_classes,
            layers=layers,
            width=store.layout.width,
            num_patches=store.layout.num_patches,
            patch_px=store.facts.backbone.patch_size[0],
            **own,
        )

    def read_options(self, given: Mapping[str, Any], others: Mapping[str, str]) -> Any:
        """An instance of `options`.

        Args:
            given: Values of options that have a name of their own on the command line.
            others: Those of `--set`, as text.

        Raises:
            ConfigError: If it has no such option, or a value is not of its type.
        """
        known = {one.name: one for one in fields(self.options)}
        values = {name: value for name, value in given.items() if name in known}
        for name, text in others.items():
            if name not in known or name in given:
                own = ", ".join(sorted(set(known) - set(given))) or "none"
                raise ConfigError(f"--set {name}: --head {self.name} has no such option; it has {own}. Leave it out.")
            values[name] = _parse_value(f"--set {name}", text, get_type_hints(self.options)[name])
        return self.options(**values)

    def read_shape(self, saved: Mapping[str, Any]) -> NetworkShape:
        """Its shape as a run saved it; runs from before networks had shapes of their own hold all fields of all."""
        known = {one.name for one in fields(self.shape)}
        strange = {name for name in saved if name not in known and name not in _FIELDS_OF_OLD_RUNS}
        if strange:
            raise TypeError(f"{self.name} has no {', '.join(sorted(strange))}")
        values = {name: value for name, value in saved.items() if name in known}
        return self.shape(**{**values, "layers": tuple(saved["layers"])})


_FIELDS_OF_OLD_RUNS = frozenset(
    ("side_width", "inputs", "family", "embed_dim", "norm_eps", "has_projection_bias", "interaction", "task")
)


def _parse_value(option: str, text: str, kind: Any) -> Any:
    """A text as a whole number, a number, yes or no, or a word; of `int | None` the number."""
    kind = next((one for one in get_args(kind) if one in (bool, int, float)), kind)
    try:
        if kind is bool:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (ValueError, KeyError):
        raise ConfigError(f"{option} takes a value of type {kind.__name__}; found {text!r}") from None


def name_all(kinds: Iterable[NetworkKind]) -> str:
    """`side4video, linear`."""
    return ", ".join(kind.name for kind in kinds)
