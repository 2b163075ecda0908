"""A run's folder: its resolved configuration, checkpoints as safetensors beside JSON, metrics as JSON lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import (
    ConfigError,
    RunExistsError,
    RunNotFoundError,
    StoreDamagedError,
    StoreMismatchError,
    StoreNotFoundError,
)
from ..files import hash_file, hash_text, read_json, write_atomic, write_json, write_text
from ..store.layout import CODEC_GROUPS
from ..store.needs import find_lacks
from ..store.reader import StoreReader, open_store
from ..store.redone import count_redone
from .batches import StepShares
from .networks import find_network
from .networks.contract import Network, NetworkShape

if TYPE_CHECKING:
    from .config import TrainConfig

_log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"

BACKBONE_IDENTITY = ("architecture", "weights_sha256", "width", "image_size", "mean", "std")
"""What a run's tokens must agree in with those of a store that it is evaluated on."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk: how its network was made and trained, and on what."""

    path: Path
    config: dict[str, Any]
    """The resolved training configuration."""
    shape: NetworkShape
    classes: tuple[str, ...]
    """Class names in label order; none where an imported checkpoint came without a store."""
    source: dict[str, Any]
    """What the tokens were: store, backbone, layers, sampling, resize; None for what an imported run cannot know."""

    @property
    def frames(self) -> int:
        """T, frames of a clip."""
        return self.config["frames"]

    @property
    def is_imported(self) -> bool:
        """Whether it is a released checkpoint; one of retrieval has a text tower of its own."""
        return "imported_from" in self.config

    @property
    def validates_every_clip(self) -> bool:
        """Whether it was begun when a validation looked at all clips and views of a video: it goes on like that."""
        return "validation" not in self.config


# How a training is run, not what it comes to.
_INCIDENTAL = (
    "out",
    "features",
    "device",
    "resume",
    "cache",
    "cache_size",
    "max_bad",
    "checkpoint_minutes",
    "log_every",
    "checkpoint_activations",
    "with_compile",
    "wandb",
    "device_type",
    "validation",
)


def plan_run(
    config: TrainConfig,
    frames: int,
    shape: NetworkShape,
    store: StoreReader,
    rows: np.ndarray,
    *,
    num_processes: int,
    device_type: str,
) -> Run:
    """A run with its resolved configuration; nothing is written yet. The order of clips follows from all of it."""
    resolved = {
        **asdict(config),
        "features": str(config.features),
        "init": None if config.init is None else str(config.init),
        "out": str(config.out),
        "cache": None if config.cache is None else str(config.cache),
        "frames": frames,
        "processes": num_processes,
        "device_type": device_type,
        "validation": "one clip of the centre view",
        "rows_per_shard": None if config.window is None else store.layout.rows_per_shard,
        "training_rows": f"{len(rows)} of sha256 {hash_text(','.join(map(str, rows.tolist())))[:16]}",
    }
    return Run(config.out, resolved, shape, store.classes.names, describe_source(store))


def create_run(run: Run) -> None:
    """Make a run's folder.

    Raises:
        RunExistsError: If the folder holds anything.
    """
    refuse_existing_run(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    write_run_config(run)


def require_same_run(run: Run, config: TrainConfig, of_old_runs: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was begun otherwise.

    Args:
        run: As it would be begun now.
        config: Whose defaults options have that are younger than the run on disk.
        of_old_runs: By option: what such a run did, where that is no default.

    Raises:
        RunExistsError: With all differences.
    """
    begun = open_run(run.path)
    # A run that is older than an option was begun with its default.
    options = {f.name: f.default for f in fields(config) if f.default is not MISSING} | {
        "views_per_video": 1,
        "redone_rows": 0,
        "rows_per_shard": None,
        **of_old_runs,
    }
    ours, theirs = ({**options, **r.config, **r.source, "classes": r.classes, "head": r.shape} for r in (run, begun))
    skipped = {*_INCIDENTAL, "store"}
    if StepShares.of_run(run.config).learns_as(StepShares.of_run(begun.config)):
        skipped |= {"processes", "accumulate", "batch_size"}  # the same step, shared out in another way
    if begun.config.get("precision") is None:
        skipped.add("precision")  # begun before it was resolved and written down
    plain = lambda value: json.loads(json.dumps(value, default=asdict))  # noqa: E731 (tuples are lists on disk)
    differences = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted({*ours, *theirs} - skipped)
        if plain(ours.get(name)) != plain(theirs.get(name))
    ]
    if differences:
        raise RunExistsError(
            f"{run.path} was begun with other settings: {'; '.join(differences)}. "
            "Run the command that began it, or choose another --out."
        )
    before, now = begun.config.get("device_type"), run.config["device_type"]
    if before not in (None, now):
        _log.warning(
            "%s was begun on %s and goes on on %s: numbers will not be the same to the bit", run.path, before, now
        )


def write_run_config(run: Run) -> None:
    """Write a run's configuration into its folder, which must be there."""
    write_json(
        run.path / CONFIG_NAME,
        {"train": run.config, "head": asdict(run.shape), "classes": run.classes, "source": run.source},
    )


def refuse_existing_run(path: Path) -> None:
    """Refuse a run's folder that holds anything.

    Raises:
        RunExistsError: With what to do.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunExistsError(f"{path} exists. Nothing was overwritten: choose another --out, or remove it.")


def open_run(path: str | Path) -> Run:
    """Read a run's configuration.

    Raises:
        RunNotFoundError: If there is nothing, or something that is not a run.
    """
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        reason = "nothing there" if not path.exists() else f"no {CONFIG_NAME} in it"
        raise RunNotFoundError(f"{path} is not a run: {reason}. `s4v train --features STORE --out {path}` makes one.")
    try:
        saved = read_json(path / CONFIG_NAME)
        shape = find_network(saved["head"]["name"]).read_shape(saved["head"])
        return Run(path, saved["train"], shape, tuple(saved["classes"]), saved["source"])
    except (ValueError, TypeError, LookupError) as error:
        raise RunNotFoundError(f"{path / CONFIG_NAME} is not a run's configuration: {error!r}") from error


def find_newest_run(folder: Path = Path("runs"), *, accept: Callable[[Run], bool] | None = None) -> Path:
    """The run whose best checkpoint was written last.

    Args:
        folder: Where runs are.
        accept: Whether a run is of the kind that is looked for; None takes any.

    Raises:
        RunNotFoundError: If there is none.
    """
    checkpoints = sorted(folder.glob("*/best.json"), key=lambda p: p.stat().st_mtime)
    if accept is not None:
        checkpoints = [path for path in checkpoints if _is_accepted(path.parent, accept)]
    if not checkpoints:
        raise RunNotFoundError(f"no run in {folder.resolve()}: name one with --run, or train one first")
    return checkpoints[-1].parent


def _is_accepted(path: Path, accept: Callable[[Run], bool]) -> bool:
    try:
        return accept(open_run(path))
    except RunNotFoundError:
        return False


def describe_source(store: StoreReader) -> dict[str, Any]:
    """What must agree between the store that a run was trained on and one that it is evaluated on."""
    backbone = store.attributes["backbone"]
    return {
        "store": str(store.path.resolve()),
        "backbone": {name: backbone[name] for name in BACKBONE_IDENTITY},
        "sampling": store.attributes["sampling"],
        "resize": store.attributes["resize"],
        **{name: store.attributes[name] for name in CODEC_GROUPS.values() if name in store.attributes},
        **({} if store.layout.pixel_format == "rgb" else {"pixel_format": store.layout.pixel_format}),
        "redone_rows": count_redone(store.path),
    }


def open_store_of_run(run: Run, features: str | Path | None = None) -> StoreReader:
    """A store that fits a run: the one named, or the one that it was trained on.

    Raises:
        ConfigError: If the run was imported without a store and none is named.
        StoreNotFoundError: If there is no such store.
        StoreMismatchError: If they do not fit.
    """
    if features is None and run.source["store"] is None:
        raise ConfigError(f"{run.path} was imported without a store: name the one to evaluate on with --features")
    try:
        store = open_store(features if features is not None else run.source["store"])
    except StoreNotFoundError as error:
        if features is not None:
            raise
        raise StoreNotFoundError(f"the run's own store has gone: {error} Name where it is now: --features.") from error
    require_matching_store(run, store)
    return store


def require_matching_store(run: Run, store: StoreReader) -> None:
    """Refuse a store whose tokens or classes are not what a run was trained on; all differences in one message.

    The codec may differ: codes are decoded before the head sees them. What an imported run does not know of its
    tokens is not compared; of unknown classes only the number is.

    Raises:
        StoreMismatchError: With the differences.
    """
    here, there = describe_source(store), run.source
    differences = [
        f"backbone {name}: {here['backbone'][name]} in the store, {there['backbone'][name]} in the run"
        for name in BACKBONE_IDENTITY
        if there["backbone"][name] not in (None, here["backbone"][name])
    ]
    differences += [
        f"{name}: {here[name]} in the store, {there[name]} in the run"
        for name in ("sampling", "resize")
        if there[name] not in (None, here[name])
    ]
    patch_px = store.facts.backbone.patch_size[0]
    if patch_px != run.shape.patch_px:
        differences.append(f"patches: of {patch_px} px in the store, of {run.shape.patch_px} px in the run")
    if there["store"] is None:
        differences += find_network(run.shape.name).find_differences(run.shape, store)
    kind = find_network(run.shape.name)
    # Texts of classes are the run's own, unless the store has other classes.
    needs = replace(kind.find_needs(run.shape.task, run.shape), class_texts=False)
    differences += [f"the store lacks {lack.why}" for lack in find_lacks(store, needs)]
    if missing := sorted(set(run.shape.layers) - set(store.layout.layers)):
        differences.append(f"layers {missing} are not in the store")
    if not run.shape.num_classes:
        pass  # its task knows none
    elif kind.classifies_by_text:
        pass  # a class is a text: it is evaluated on others as well
    elif not run.classes and len(store.classes.names) != run.shape.num_classes:
        differences.append(f"classes: {len(store.classes.names)} in the store, {run.shape.num_classes} in the run")
    elif run.classes and set(store.classes.names) != set(run.classes):
        only_store = sorted(set(store.classes.names) - set(run.classes))
        only_run = sorted(set(run.classes) - set(store.classes.names))
        differences.append(f"classes: only in the store {only_store[:3]}, only in the run {only_run[:3]}")
    if differences:
        like = run.source["store"] or "the one it was trained on"
        raise StoreMismatchError(
            f"{store.path} does not fit the run {run.path}: {'; '.join(differences)}. "
            f"Evaluate on a store like {like}, or train a run on this one."
        )
    redone = here["redone_rows"] - (there.get("redone_rows") or 0)
    if there["store"] == here["store"] and redone > 0:
        _log.warning(
            "%s was trained before %d rows of %s were made of other videos (extract --redo-changed): its figures are "
            "of two states of the store. Train it again to have one.",
            *(run.path, redone, store.path),
        )


def save_checkpoint(run: Run, name: str, head: torch.nn.Module, facts: Mapping[str, Any]) -> None:
    """Write NAME.safetensors, then NAME.json with its hash, each atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    path = run.path / f"{name}.safetensors"
    write_atomic(path, lambda temporary: save_file(tensors, temporary))
    write_json(path.with_suffix(".json"), {**facts, "sha256": hash_file(path)})


def load_checkpoint(run: Run, name: str = "best") -> Network:
    """Build a run's network and load a checkpoint into it, in evaluation mode on the CPU.

    Raises:
        RunNotFoundError: If the run has no such checkpoint.
        StoreDamagedError: If the file is not a whole checkpoint of this head.
    """
    path = run.path / f"{name}.safetensors"
    if not path.is_file() or not path.with_suffix(".json").is_file():
        checkpoints = ", ".join(sorted(p.stem for p in run.path.glob("*.safetensors"))) or "none"
        raise RunNotFoundError(f"{run.path} has no checkpoint {name!r}; it has {checkpoints}")
    if read_json(path.with_suffix(".json")).get("sha256") != hash_file(path):
        raise StoreDamagedError(f"{path} is damaged: it does not match the hash in {name}.json")
    network = find_network(run.shape.name).build(run.shape)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise StoreDamagedError(f"{path} is not a checkpoint of this head: {str(error).splitlines()[0]}") from error
    return network.eval()


def begin_with(path: Path, network: Network, store: StoreReader) -> None:
    """Give a fresh network the weights of a run's best checkpoint, as far as it can begin with them.

    Raises:
        RunNotFoundError: If there is no such run or checkpoint.
        StoreMismatchError: If its network is another, or has other sizes, or as many patches in another grid.
    """
    run = open_run(path)
    other = load_checkpoint(run)
    there, here = run.source["backbone"]["image_size"], store.facts.backbone.image_size
    if there is not None and tuple(there) != here and run.shape.num_patches == store.layout.num_patches:
        raise StoreMismatchError(
            f"{path} (--init) does not fit: it saw frames of {there[0]}x{there[1]} pixels, and {store.path} has frames "
            f"of {here[0]}x{here[1]}: the same patch stands elsewhere"
        )
    try:
        network.begin_with(other)
    except StoreMismatchError as error:
        raise StoreMismatchError(f"{path} (--init) does not fit: {error}") from error


def append_metrics(run: Run, metrics: Mapping[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with (run.path / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def cut_metrics(run: Run, num_epochs: int) -> None:
    """Keep the first epochs' lines of metrics.jsonl, where it is longer."""
    path = run.path / METRICS_NAME
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if len(lines) > num_epochs:
        write_text(path, "".join(lines[:num_epochs]))


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    lines = (run.path / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
