"""`s4v import`: a run's folder from a released checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ...errors import ConfigError, StoreMismatchError
from ...files import hash_file, write_atomic
from ...store.needs import StoreNeeds, find_lacks, require_needs
from ...store.reader import StoreReader, open_store
from ..clips import DEFAULT_CLIP_FRAMES
from ..networks import find_network
from ..networks.parts import TOWER_END
from ..run_folder import (
    BACKBONE_IDENTITY,
    TEXT_NAME,
    Run,
    describe_source,
    refuse_existing_run,
    save_checkpoint,
    write_run_config,
)
from ..tasks.class_choice import read_class_names
from .checkpoint_names import OfficialCheckpoint, read_official_checkpoint
from .presets import side_family

_MOST_NAMED = 3

# Clips in a step of an evaluation; a checkpoint does not say, and it changes no figure.
_BATCH_SIZE = 32

# The reference sees pixels through CLIP's mean and standard deviation, whatever the backbone.
_PIXELS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}

# Released weights are float16 in places: 2^-11 of each number, and the same again in a store's float16.
_END_TOLERANCE = 2e-3


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    layers: tuple[int, ...] | None = None,
    frames: int | None = None,
    features: Path | None = None,
    classes: Path | None = None,
) -> dict[str, Any]:
    """Make a run's folder from a released checkpoint: of recognition, one that `s4v eval` takes.

    The names of the classes are in no checkpoint. They are those of a file, or of a store in their order (sorted);
    without either, each evaluation takes those of its own store, and warns. DiST cannot do without: a class is a name
    that the text tower in the file embeds. A retrieval run keeps its own final norm and projection and the networks
    that weigh words and frames, and its text tower as it is in text.safetensors.

    Args:
        checkpoint: The reference's file.
        out: The run's folder; it must not exist.
        layers: Backbone blocks that it reads, where the file leaves that open.
        frames: T, frames of a clip, where the file does not say; None takes 8.
        features: A store of the backbone that it was trained beside: what the file carries is checked against it.
        classes: A file of class names in the order of labels, one a line.

    Returns:
        run, variant, layers, parameters, checked (what was compared with the store), unused (tensors by place).

    Raises:
        WeightsError: If the file is not a whole checkpoint of a network that s4v knows.
        StoreMismatchError: If it does not fit the store; all differences in one message.
        ConfigError: If frames is below 1 or not what the file says, names of classes are needed, or have no effect.
        RunExistsError: If the run's folder holds anything.
    """
    if frames is not None and frames < 1:
        raise ConfigError(f"--frames must be at least 1; found {frames}")
    refuse_existing_run(out)
    store = None if features is None else open_store(features)
    official = read_official_checkpoint(checkpoint, layers)
    frames = _resolve_frames(official, frames)
    names = _find_class_names(official, classes, store)
    if classes is not None or find_network(official.shape.name).classifies_by_text:
        official = official.with_classes(names)
    network = official.build()
    checked = [] if store is None else require_fitting_store(official, store, names)
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "imported_from": str(checkpoint.resolve()),
        "checkpoint_sha256": hash_file(checkpoint),
        "frames": frames,
        "batch_size": _BATCH_SIZE,
    }
    source = _describe_unknown_source(official) if store is None else describe_source(store)
    run = Run(out, config, official.shape, names, source)
    if official.text and not find_network(official.shape.name).classifies_by_text:
        _save_text(out / TEXT_NAME, official.text)
    save_checkpoint(run, "best", network, {"imported_from": config["imported_from"]})
    write_run_config(run)  # last: without it the folder is no run
    return {
        "run": str(out),
        "network": official.shape.name,
        "variant": {"task": official.shape.task, "family": official.released.find_family(official.shape)},
        "layers": list(official.shape.layers),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "checked": checked,
        "unused": official.unused,
    }


def _resolve_frames(official: OfficialCheckpoint, frames: int | None) -> int:
    """T: what the file says, else what was asked for."""
    told = official.shape.clip_frames
    if frames is not None and told not in (None, frames):
        raise ConfigError(f"--frames {frames}: {official.path} is of clips of {told} frames: leave it out")
    return told or frames or DEFAULT_CLIP_FRAMES


def _find_class_names(official: OfficialCheckpoint, file: Path | None, store: StoreReader | None) -> tuple[str, ...]:
    """Names in the order of labels: a file's, else a store's; none where nobody says any.

    Raises:
        ConfigError: If the file is none of names, has no effect, or the network cannot do without.
    """
    if official.shape.task == "retrieval":
        if file is not None:
            raise ConfigError(f"--classes has no effect: {official.path} is of retrieval. Leave it out.")
        return ()
    if file is not None:
        return read_class_names(file)
    if store is not None:
        return store.classes.names
    if find_network(official.shape.name).classifies_by_text:
        raise ConfigError(
            f"{official.path} is of {official.released.title}, whose classes are names that its text tower embeds, and "
            "names none: give them with --classes FILE, one a line in the order of labels, or with --features STORE"
        )
    return ()


def require_fitting_store(official: OfficialCheckpoint, store: StoreReader, names: Sequence[str] = ()) -> list[str]:
    """Compare what a checkpoint carries of its backbone with a store.

    A store holds no weights of the backbone's blocks: sizes are compared, and the numbers of the tower's end where
    the checkpoint has it. For retrieval the tower's end is fine-tuned: only its shape is compared there.

    Args:
        official: The checkpoint.
        store: Of its backbone.
        names: Of its classes.

    Returns:
        What was compared, in words.

    Raises:
        StoreMismatchError: With all differences.
    """
    needs = StoreNeeds(arrays=("patches", "cls"), head=bool(official.end))
    require_needs(store, needs, f"the network of {official.path}")
    shape, backbone = official.shape, store.facts.backbone
    facts: dict[str, tuple[Any, Any]] = {
        "width": (shape.width, backbone.width),
        "patch size": (shape.patch_px, backbone.patch_size[0]),
        "patches of a frame": (_describe_grid(shape.num_patches), "x".join(map(str, backbone.grid))),
        "family of side blocks": (official.released.find_family(shape), side_family(store)),
    }
    if official.depth is not None:
        facts["blocks of the backbone"] = (official.depth, backbone.depth)
    kind = find_network(shape.name)
    if shape.num_classes and not kind.classifies_by_text:  # a class is a text: it is evaluated on others as well
        facts["classes"] = (shape.num_classes, len(store.classes.names))
    facts |= official.released.compare(shape, store)
    differences = [f"{name}: {ours} here, {theirs} there" for name, (ours, theirs) in facts.items() if ours != theirs]
    if missing := sorted(set(shape.layers) - set(store.layout.layers)):
        differences.append(f"layers {missing} are not in the store")
    is_frozen = "end.norm.weight" not in official.state
    if not is_frozen and shape.layers[-1] != backbone.depth - 1:
        differences.append(f"retrieval reads the last block, {backbone.depth - 1}; layers end with {shape.layers[-1]}")
    if "classes" in facts and not set(names) <= set(store.classes.names):
        strange = sorted(set(names) - set(store.classes.names))
        differences.append(f"classes that the store does not have: {', '.join(map(repr, strange[:_MOST_NAMED]))}")
    # A checkpoint brings its own texts.
    needs = replace(kind.find_needs(shape.task, shape), text_tower=False, class_texts=False)
    lacks = find_lacks(store, needs)
    differences += [f"the store lacks {lack.why}" for lack in lacks]
    differences += _compare_ends(official.end, store.head, with_numbers=is_frozen)
    if differences:
        raise StoreMismatchError(f"{official.path} does not fit {store.path}: {'; '.join(differences)}")
    return [*facts, "layers", *sorted(official.end)]


def _describe_grid(num_patches: int) -> str:
    """`14x14` of 196: the reference has squares alone; the number where it is none's."""
    side = math.isqrt(num_patches)
    return f"{side}x{side}" if side**2 == num_patches else str(num_patches)


def _compare_ends(end: Mapping[str, torch.Tensor], head: Mapping[str, np.ndarray], *, with_numbers: bool) -> list[str]:
    differences = []
    for name, tensor in end.items():
        ours, theirs = tensor.float().numpy(), head.get(TOWER_END[name])
        if theirs is None or ours.shape != theirs.shape:
            shape = "none" if theirs is None else theirs.shape
            differences.append(f"the tower's {name}: shape {ours.shape} here, {shape} there")
        elif with_numbers and (error := _relative_difference(ours, theirs)) > _END_TOLERANCE:
            differences.append(f"the tower's {name} differs by {error:.2g} of its size: another backbone's weights")
    return differences


def _relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-12))


def _describe_unknown_source(official: OfficialCheckpoint) -> dict[str, Any]:
    """`describe_source` as far as a checkpoint tells it; None is not compared with a store."""
    known: dict[str, Any] = {"width": official.shape.width, **_PIXELS}
    grid = math.isqrt(official.shape.num_patches)
    if grid**2 == official.shape.num_patches:
        known["image_size"] = [grid * official.shape.patch_px] * 2
    return {
        "store": None,
        "backbone": {name: known.get(name) for name in BACKBONE_IDENTITY},
        "sampling": None,
        "resize": None,
        "codec": None,
    }


def _save_text(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # Copies: tensors that share memory in the file may not in safetensors.
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(copies, temporary))
