"""Folders of golden files as cases: which network of ours each is of, its sizes, weights and inputs.

A folder says in its config.json what it is of, and how large. Nothing here knows the sizes of our own copies.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from s4v.train.config import TrainConfig
from s4v.train.networks import find_network
from s4v.train.networks.dist import DistShape
from s4v.train.networks.side4video import SideShape
from s4v.train.networks.tds_clip import TdsShape
from s4v.train.paper.checkpoint_names import read_official_checkpoint
from s4v.train.paper.dist_names import ReleasedDist
from s4v.train.paper.presets import DIST_PRESETS, RETRIEVAL_RECIPE, TDS_CLIP_PRESETS
from s4v.train.paper.side4video_names import ReleasedSide4Video
from s4v.train.paper.tds_clip_names import ReleasedTdsClip
from s4v.train.recipe import Recipe, find_biases, make_optimizer
from s4v.train.settings import find_optimisation

DATA = Path(__file__).parents[1] / "data"

MARKERS = ("config.json", "targets.json", "postprocess.json", "metrics.json", "summaries.json", "sequences.npz")
"""Any of them makes a folder a case."""

ELSEWHERE = {
    "wti": "it is no network: tests/train/test_text_interaction.py has its checks",
    "retrieval_path": "it is no network: tests/train/test_recipe.py has its checks",
}
NOT_YET = {
    "r2_tuning": "s4v has no R2-Tuning yet",
    "vos": "s4v has no video object segmentation yet",
}
"""What a variant begins with, and why there is nothing to check."""


def whole(output):
    return output


class Subject:
    """A network of ours as golden files have it."""

    kind: str
    """As `--head` takes it."""
    steps: ClassVar[dict] = {}
    """What io.safetensors has of the inside in evaluation, by the tensor's name: where a network computes it, and what
    of the output there it is."""

    def __init__(self, variant):
        self.variant = variant

    def describe(self, config, names=()):
        """The shape, from the config alone; `names` are the reference's that the network must have a place for."""
        raise NotImplementedError

    def build(self, config, names=()):
        return find_network(self.kind).build(self.describe(config, names))

    def rename(self, tensors):
        """Tensors of the reference under our names and in our shapes."""
        return self.released.rename(tensors)

    def fill(self, case, state):
        """What the network has as state and a reference's file has not."""
        return state

    def read_inputs(self, case):
        io, config = case.io, case.config
        tokens = io["tokens"].unflatten(0, (config["batch"], config["frames"]))
        return read_pixels(io, config), tokens[:, :, :, 1:], tokens[:, :, :, 0]

    def trace(self, network, inputs):
        """The output in evaluation, and what io.safetensors may have beside it, by the tensor's name."""
        found = {}
        for name, (find, take) in self.steps.items():
            keep = lambda _, __, output, name=name, take=take: found.update({name: take(output)})  # noqa: E731
            find(network).register_forward_hook(keep)
        with torch.inference_mode():
            found["eval_output"] = network(*inputs)
        assert set(self.steps) <= set(found)
        return found

    def recipe(self):
        """How it is trained where nobody says otherwise."""
        raise NotImplementedError

    @property
    def task(self):
        return "retrieval" if self.variant.startswith("retrieval") else "recognition"

    def make_config(self, **changes):
        """What a training comes to by its recipe."""
        known = TrainConfig.__dataclass_fields__
        options = {name: value for name, value in self.recipe().describe(None).items() if name in known}
        options = {name: value for name, value in options.items() if value is not None}
        return TrainConfig(
            **{"features": None, "out": None, "head": self.kind, "task": self.task, **options, **changes}
        )

    def make_optimizer(self, network, config):
        return make_optimizer(network.parameter_groups(), config, find_optimisation(config), find_biases(network))

    def is_elsewhere(self, name):
        """Whether a parameter that the reference trains is none of the network's here."""
        return False

    def is_given(self, name):
        """Whether a parameter of ours is not newly drawn, so that init.json does not have it."""
        return False


class SideSubject(Subject):
    """Side4Video's four variants."""

    kind = "side4video"
    released = ReleasedSide4Video()

    @property
    def family(self):
        return self.variant.rpartition("_")[2]

    def describe(self, config, names=()):
        ends = {}
        if self.task == "retrieval":
            is_weighted = any("weight_fc" in name for name in names)
            ends = {
                "embed_dim": config["embed_dim"],
                "norm_eps": {"clip": 1e-5, "eva": 1e-6}[self.family],
                "has_projection_bias": self.family == "eva",
                "interaction": "wti" if is_weighted else "mean",
                "normalises_frames": False,
                "decorrelation": 0.0,
                "trains_end": True,
                "trains_logit_scale": True,
            }
        return SideShape(
            **sizes_of(self.kind, config), task=self.task, family=self.family, side_width=config["side_dim"], **ends
        )

    def rename(self, tensors):
        """The factor of similarities too: the text tower's, in the reference's files."""
        scales = {name for name in tensors if re.fullmatch(r"(module\.)?(clip\.)?logit_scale", name)}
        ours = super().rename({name: tensor for name, tensor in tensors.items() if name not in scales})
        for name in scales:
            ours["logit_scale"] = tensors[name]
        return ours

    def fill(self, case, state):
        return {**state, "logit_scale": torch.tensor(0.0)} if self.task == "retrieval" else state

    def recipe(self):
        return RETRIEVAL_RECIPE if self.task == "retrieval" else Recipe(30, 1e-3)

    def is_elsewhere(self, name):
        """The text tower is frozen here."""
        return name.startswith("clip.") and ".visual." not in name

    def is_given(self, name):
        """The tower's end and its factor are the backbone's."""
        return name.startswith(("end.", "logit_scale"))


class TdsSubject(Subject):
    """TDS-CLIP."""

    kind = "tds-clip"
    released = ReleasedTdsClip()
    steps: ClassVar[dict] = {
        "eval_stem": (lambda network: network.stem, whole),
        "eval_gate_out_0": (lambda network: network.blocks[0].gate, whole),
        "eval_block_0": (lambda network: network.blocks[0], whole),
    }

    def describe(self, config, names=()):
        return TdsShape(**sizes_of(self.kind, config), side_width=config["side_dim"])

    def recipe(self):
        return TDS_CLIP_PRESETS[0].recipe


class DistSubject(Subject):
    """DiST."""

    kind = "dist"
    released = ReleasedDist()
    steps: ClassVar[dict] = {
        "eval_temporal_0": (lambda network: network.blocks[0].temporal, lambda output: output[:1]),
        "eval_integration_0": (
            lambda network: network.blocks[0],
            lambda output: torch.cat([output[2][0, :, None], output[1][0]], dim=1),
        ),
        "eval_pooling_0_frames": (lambda network: network.pooling[0], lambda output: output[0].flatten(0, 1)),
        "eval_pooling_0_clip": (lambda network: network.pooling[0], lambda output: output[1]),
    }

    def describe(self, config, names=()):
        return DistShape(
            **sizes_of(self.kind, config),
            side_width=config["integration_dim"],
            temporal_width=config["temporal_dim"],
            frames=config["frames"],
            pooling_layers=config["pooling_layers"],
            embed_dim=config["embed_dim"],
        )

    def fill(self, case, state):
        return {**state, "class_texts": case.require_io("text_features")}

    def trace(self, network, inputs):
        """Scores and the clip's vector too."""
        found = super().trace(network, inputs)
        with torch.inference_mode():
            found["eval_embedding"] = network.embed(*inputs)
        return {**found, "eval_scores": found["eval_output"].softmax(dim=-1)}

    def recipe(self):
        return DIST_PRESETS[0].recipe


SUBJECTS = {
    "recognition_clip": SideSubject,
    "recognition_eva": SideSubject,
    "retrieval_clip": SideSubject,
    "retrieval_eva": SideSubject,
    "tds_clip": TdsSubject,
    "dist": DistSubject,
}
"""By the config's `variant`."""


def sizes_of(kind, config):
    """What every shape has."""
    return {
        "name": kind,
        "num_classes": config.get("classes") or 0,
        "layers": tuple(config["tapped_layers"]),
        "width": config["width"],
        "num_patches": (config["resolution"] // config["patch"]) ** 2,
        "patch_px": config["patch"],
    }


def read_pixels(io, config):
    """Normalised, (B, T, 3, H, W) or with offsets (B, T, O, 3, H, W)."""
    if "pixels" in io:
        return io["pixels"].unflatten(0, (config["batch"], config["frames"]))
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("pixel_mean", "pixel_std"))
    return (io["pixels_u8"].movedim(-1, -3).float() / 255 - mean) / std


@dataclass(frozen=True)
class Case:
    """A folder of golden files."""

    folder: Path
    name: str
    """Of the folder, from where the walk began."""

    @cached_property
    def config(self):
        path = self.folder / "config.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def variant(self):
        """What it is of; a folder of tables alone says it by what tables they are."""
        if self.config:
            return self.config.get("variant", "")
        return "vos" if (self.folder / "sequences.npz").is_file() else "r2_tuning"

    @cached_property
    def subject(self):
        """Its network of ours; skips where there is none."""
        variant = self.variant
        for reasons in (ELSEWHERE, NOT_YET):
            for start, reason in reasons.items():
                if variant.startswith(start) and variant not in SUBJECTS:
                    pytest.skip(f"{self.name}: {reason}")
        if variant not in SUBJECTS:
            pytest.skip(f"{self.name}: s4v has no network {variant!r}")
        return SUBJECTS[variant](variant)

    @cached_property
    def io(self):
        return self.read_tensors("io.safetensors")

    def require(self, name):
        """A file's path; skips where the case has none."""
        if not (self.folder / name).is_file():
            pytest.skip(f"{self.name} has no {name}")
        return self.folder / name

    def read_tensors(self, name):
        return load_file(self.require(name))

    def read_json(self, name):
        return json.loads(self.require(name).read_text())

    def require_io(self, name):
        """A tensor of io.safetensors; skips where there is none."""
        if name not in self.io:
            pytest.skip(f"{self.name}/io.safetensors has no {name}")
        return self.io[name]

    @cached_property
    def state(self):
        """The network's weights under our names: the checkpoint's or, without one, those of state.safetensors."""
        if (self.folder / "checkpoint.pt").is_file():
            layers = tuple(self.config["tapped_layers"])
            state = read_official_checkpoint(self.folder / "checkpoint.pt", layers).state
        else:
            state = self.subject.rename(self.read_tensors("state.safetensors"))
        return self.subject.fill(self, state)

    def load(self, dtype=torch.float32):
        """The network with the golden weights, in evaluation mode."""
        network = self.subject.build(self.config)
        network.load_state_dict(self.state)
        return network.eval().to(dtype)

    @cached_property
    def inputs(self):
        return self.subject.read_inputs(self)

    @cached_property
    def statistics(self):
        """Of norms after one pass in training mode, under our names: beside the outputs, or a state of their own."""
        found = {name.removeprefix("after_train."): t for name, t in self.io.items() if name.startswith("after_train.")}
        if (self.folder / "checkpoint.pt").is_file() and (self.folder / "state.safetensors").is_file():
            after = load_file(self.folder / "state.safetensors")
            found |= {name.removeprefix("after_train."): tensor for name, tensor in after.items() if "running_" in name}
        return self.subject.rename({name: tensor for name, tensor in found.items() if "running_" in name})

    def find_gradients(self, dtype, checkpoints_activations=False):
        """Of the loss that the golden gradients are of, by parameter."""
        network = self.load(dtype).train()
        network.checkpoints_activations = checkpoints_activations
        output = network(*(tensor.to(dtype) for tensor in self.inputs))
        (output * self.io["train_cotangent"].to(dtype)).sum().backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def is_run(path):
    """Whether a config.json is that of a run of ours."""
    return path.name == "config.json" and "head" in json.loads(path.read_text())


def find_cases(root):
    """All cases below a folder, itself among them."""
    root = Path(root)
    folders = sorted({path.parent for name in MARKERS for path in root.rglob(name) if not is_run(path)})
    return [Case(folder, folder.relative_to(root).as_posix()) for folder in folders]


def read_case(name):
    """One of those that are copied to tests/data."""
    return Case(DATA / name, name)


def find_schedules(root):
    return sorted(Path(root).rglob("schedule.json"))


def relative(found, expected):
    """The largest difference, of the largest number that is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def our_names(subject, told):
    """Our parameters by the reference's names; of three projections in one the same one.

    Args:
        subject: Whose.
        told: Names, as JSON files have them.
    """
    renamed = {}
    for name in told:
        # As many axes as any kernel has, but for what is multiplied from the right.
        dummy = torch.zeros((1,) * (2 if name.endswith("proj") else 5))
        for ours in subject.rename({name: dummy}):
            part = ours.rpartition(".")[2]
            renamed[name] = ours.removesuffix(f".{part}") if part in ("q", "k", "v") else ours
    return renamed
