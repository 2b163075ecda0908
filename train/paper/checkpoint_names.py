"""Released checkpoints: which network a file holds, its weights under our names, and what else it tells.

The names in the file decide, and they alone. The file is mapped, not read: only the side network's tensors are touched.
Each network's names are in a file of their own beside this one.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import WeightsError
from ...store.class_texts import fill_template
from ..networks import find_network
from ..networks.contract import Network
from .checkpoint_file import CheckpointFile, describe_unused, group_names, open_checkpoint
from .dist_names import ReleasedDist
from .released import ReleasedNetwork
from .side4video_names import ReleasedSide4Video
from .tds_clip_names import ReleasedTdsClip

_log = logging.getLogger(__name__)

RELEASED: tuple[ReleasedNetwork, ...] = (ReleasedDist(), ReleasedTdsClip(), ReleasedSide4Video())
"""Whose files s4v reads. TDS-CLIP's hold all names of Side4Video's: of two that names tell, the first is meant."""

# What references call a side network's; no backbone has such a name.
_SIDE = re.compile(r"(?:^|[._])side|(?:^|\.)(?:dist_net|ladder_net)\.")

# Tensors that a message names.
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class OfficialCheckpoint:
    """What a released checkpoint holds, sorted; tensors are those of the mapped file."""

    path: Path
    shape: Any
    """Everything that the network's shapes follow from."""
    released: ReleasedNetwork
    """Whose it is."""
    state: dict[str, torch.Tensor]
    """The network's weights, under our names."""
    end: dict[str, torch.Tensor]
    """The frozen tower's own end, as far as the file carries it: norm.*, project.*."""
    depth: int | None
    """Blocks of the backbone that the file carries; None where it carries none."""
    text: dict[str, torch.Tensor]
    """A text tower that the network needs, under its own names."""
    unused: dict[str, int]
    """What nothing of ours takes: places in the file, and how many tensors lie there."""

    def with_classes(self, names: Sequence[str]) -> OfficialCheckpoint:
        """The same with names for its classes; of a network that classifies by text with their texts.

        Args:
            names: In the order of labels.

        Raises:
            WeightsError: If there are as many classes as there are not names, or the text tower is not CLIP's.
        """
        if not find_network(self.shape.name).classifies_by_text:
            if len(names) != self.shape.num_classes:
                raise WeightsError(f"{self.path} has {self.shape.num_classes} classes; {len(names)} names were given")
            return self
        from ...backbone.text_tower import encode_with_clip  # and with it open_clip

        texts = fill_template(self.shape.class_template, names)
        embedding = torch.from_numpy(encode_with_clip(self.text, str(self.path), texts))
        shape = replace(self.shape, num_classes=len(names))
        return replace(self, shape=shape, state={**self.state, "class_texts": embedding})

    def build(self) -> Network:
        """The network with the checkpoint's weights, in evaluation mode on the CPU.

        Raises:
            WeightsError: If a tensor is missing, left over, or of another size.
        """
        network = find_network(self.shape.name).build(self.shape)
        try:
            network.load_state_dict(self.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(f"{self.path} is not a whole {self.released.describe(self.shape)}: {reason}") from error
        return network.eval()


def load_official_checkpoint(
    path: str | Path, frames: int, layers: tuple[int, ...] | None = None, classes: Sequence[str] = ()
) -> Network:
    """Load the network of a released checkpoint; what the file holds beyond it is logged.

    Args:
        path: A released file of Side4Video, TDS-CLIP or DiST: a dict with `model_state_dict` or `model_state`, or a
            bare state dict, names with or without `module.` and `backbone.base_encoder.`.
        frames: Frames of the clips that it was trained on; all but DiST take any number.
        layers: Backbone blocks that it reads, where the names leave it open; see `read_official_checkpoint`.
        classes: Names in the order of labels. DiST's file has none: without them its network scores no class, until
            `take_class_texts` gives it texts.

    Returns:
        The network in evaluation mode: logits (B, classes) for recognition, (B, T, E) for retrieval.

    Raises:
        WeightsError: If the file holds anything but tensors, is of no network that s4v knows, or lacks a tensor.
    """
    if frames < 1:
        raise WeightsError(f"frames must be at least 1; found {frames}")
    official = read_official_checkpoint(path, layers)
    if official.shape.clip_frames not in (None, frames):
        raise WeightsError(f"{path} is of clips of {official.shape.clip_frames} frames; found frames={frames}")
    if classes:
        official = official.with_classes(classes)
    network = official.build()
    if official.unused:
        _log.info("%s: not used: %s", path, describe_unused(official.unused))
    return network


def read_official_checkpoint(path: str | Path, layers: tuple[int, ...] | None = None) -> OfficialCheckpoint:
    """Sort out what a released checkpoint holds, without reading the backbone in it.

    Which layers it taps follows from the number of side blocks and of backbone blocks in the file: all of them, or
    every second one up to the last. Where it is neither, or the file holds no backbone, `layers` must tell.

    Args:
        path: As in `load_official_checkpoint`.
        layers: 0-based backbone blocks.

    Raises:
        WeightsError: If the file holds anything but tensors, is of no network that s4v knows, holds a tensor of a side
            network that ours has no place for, or does not fit `layers`.
    """
    file = open_checkpoint(Path(path))
    released = recognise(file)
    new_names = released.translate(file.tensors)
    try:
        ours = released.rename(file.tensors)
        shape = released.read_shape(file, ours, layers)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{file.path} holds tensors of other shapes than {released.title}'s: {reason}") from error
    texts = {name: released.name_text(name, shape) for name in file.tensors if name not in new_names}
    text = {name: new_name for name, new_name in texts.items() if new_name is not None}
    kept = {name for name, new_name in new_names.items() if released.is_state(new_name, shape)}
    unused = [name for name in file.tensors if name not in kept and name not in text]
    places = Counter(new_names.values())
    doubled = [name for name, new_name in new_names.items() if places[new_name] > 1]
    _require_all_of_side(file, released, [name for name in (*unused, *text, *doubled) if _SIDE.search(name)])
    return OfficialCheckpoint(
        path=file.path,
        shape=shape,
        released=released,
        state=released.complete({name: t for name, t in ours.items() if released.is_state(name, shape)}, shape),
        end={name.removeprefix("end."): tensor for name, tensor in ours.items() if name.startswith("end.")},
        depth=released.count_backbone_blocks(file.tensors),
        text={new_name: file.tensors[name] for name, new_name in text.items()},
        unused=group_names(unused, file.others),
    )


def recognise(file: CheckpointFile) -> ReleasedNetwork:
    """Which network a file holds, by its names alone.

    Raises:
        WeightsError: If it is none that s4v knows.
    """
    found = _find_named(file.tensors)
    if found is None:
        titles = [released.title for released in RELEASED]
        raise WeightsError(
            f"{file.path} is not a checkpoint of {', '.join(titles[:-1])} or {titles[-1]}: none of its "
            f"{len(file.tensors)} tensors has a name of their side networks"
        )
    return found


def _find_named(names: Iterable[str]) -> ReleasedNetwork | None:
    names = tuple(names)
    return next((released for released in RELEASED if released.is_named_in(names)), None)


def rename_official(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of a reference under our names and in our shapes; the backbone's blocks are left out.

    Of a choice of names that tells no network they are Side4Video's.
    """
    return (_find_named(tensors) or ReleasedSide4Video()).rename(tensors)


def _require_all_of_side(file: CheckpointFile, released: ReleasedNetwork, unused: list[str]) -> None:
    """Refuse a file whose side network has more parts than ours: without them it would compute something else.

    Raises:
        WeightsError: With the first few of them.
    """
    if unused:
        more = f" and {len(unused) - _MOST_NAMED} more" if len(unused) > _MOST_NAMED else ""
        raise WeightsError(
            f"{file.path} holds {len(unused)} tensors of a side network that {released.title}'s has no place for: "
            f"{', '.join(unused[:_MOST_NAMED])}{more}. It is another network's: name a checkpoint of {released.title}."
        )
