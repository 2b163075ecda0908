"""What a training's options come to: those given, a preset's, or what network, task and store make of them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, StoreMismatchError
from ..store.needs import require_needs
from ..store.reader import StoreReader
from .batches import resolve_batches
from .config import TrainConfig
from .networks import NETWORKS, find_network
from .networks.contract import NetworkKind, NetworkShape, name_all
from .paper.presets import describe_backbone
from .recipe import Optimisation, Preset, Recipe
from .run_folder import Run
from .tasks import find_task

_KEPT_OF_A_RUN = ("interaction", "optimizer", "undecayed", "min_video_frames", "learning_rate", "weight_decay")
"""Options that follow from a preset or a network today, and did not when older runs were begun."""


def plan_network(config: TrainConfig, store: StoreReader, begun: NetworkShape | None = None) -> NetworkShape:
    """Fit the network that a configuration names to a store.

    Args:
        config: What was asked for.
        store: Whose tokens it will read.
        begun: Of the run that is gone on with: of options that nobody gave it has what that run has.

    Raises:
        ConfigError: If there is no such network, or an option has no effect on it or does not fit.
        StoreMismatchError: If the store lacks a layer or an array.
    """
    kind = find_network(config.head)
    layers = tuple(sorted(config.layers)) if config.layers else store.layout.layers
    store.layer_places(layers)
    others = dict(one.split("=", 1) for one in config.set)
    options = require_what_is_read(config, store)
    shape = kind.plan(store, find_task(config.task).describe_outputs(store), options, layers)
    if type(begun) is not type(shape):
        return shape
    own = {one.name for one in fields(kind.options)} & {one.name for one in fields(shape)}
    kept = own - {*config.network_options, *others}
    return kind.go_on_with(replace(shape, **{name: getattr(begun, name) for name in kept}), begun)


def require_what_is_read(config: TrainConfig, store: StoreReader) -> Any:
    """Refuse a store that lacks what a configuration's network reads, before anything is read.

    Returns:
        The network's options.

    Raises:
        ConfigError: If an option has no effect on the network.
        StoreMismatchError: With all that is lacking, and the command that makes a store that has it.
    """
    kind = find_network(config.head)
    options = kind.read_options(config.network_options, dict(one.split("=", 1) for one in config.set))
    require_needs(store, kind.find_needs(config.task, options), f"--head {kind.name}")
    return options


def take_recorded(config: TrainConfig, begun: Run) -> TrainConfig:
    """A configuration that goes on with a run: what it leaves open is as the run has it, not as a preset has it now."""
    if (begun.shape.name, begun.shape.task) != (config.head, config.task):
        return config  # it will be refused
    recorded = {**find_task(config.task).of_old_runs, **begun.config}
    return replace(config, **{name: recorded[name] for name in _KEPT_OF_A_RUN if getattr(config, name) is None})


def find_optimisation(config: TrainConfig) -> Optimisation:
    """What the network has settled for the task, else what the task has."""
    return find_network(config.head).optimisation.get(config.task) or find_task(config.task).optimisation


def resolve_preset(config: TrainConfig, store: StoreReader, *, num_processes: int = 1) -> TrainConfig:
    """Fill in what a configuration leaves open, from a preset or from s4v's defaults.

    `auto` is the preset of the store's backbone and data set whose layers are those at hand, or the full one of a
    store that holds every layer; `none` where there is no such preset, or the network has none.

    Args:
        config: Options as given; what was not given is None.
        store: What it trains on.
        num_processes: That train together; a step of all is shared out among them.

    Returns:
        The configuration with the preset's name, and neither rate, epochs, warm-up, weight decay and what it spares,
        optimiser, batch size, interaction, shortest video nor, for recognition, label smoothing None. `layers` and
        `side_width` stay None without a preset: they follow from the store. `frames` stays None unless a preset was
        named, and `views_per_video` in any case: they follow from the rows, `resolve_views`.

    Raises:
        ConfigError: If there is no such preset, the network has no use for one, or a step cannot be shared out.
        StoreMismatchError: If a preset that was named is of another backbone, or its layers are not in the store.
    """
    kind = find_network(config.head)
    name = config.preset
    if name == "auto":
        name = find_preset(config, store) or "none"
    elif name != "none":
        _require_fitting_preset(config, kind, store)
    recipe = find_recipe(replace(config, preset=name), store)
    if name == "none":
        sizes = dict(kind.find_sizes(config.task, store))
    else:
        preset = _find(name)
        sizes = {"layers": preset.layers, **preset.sizes}
    for option in find_task(config.task).leave_out(config):
        sizes.pop(option, None)
    values: dict[str, Any] = {"interaction": "mean", **sizes, **recipe.describe(config.epochs), "views_per_video": None}
    if config.preset in ("auto", "none"):
        values["frames"] = None  # as many as the rows hold, up to the task's default
    # Sizes that have no option of their own are given as by --set; what was given there wins.
    given = {one.split("=", 1)[0] for one in config.set}
    own = {size: value for size, value in sizes.items() if size not in config.__dataclass_fields__}
    values["set"] = (*config.set, *(f"{size}={value}" for size, value in own.items() if size not in given))
    filled_in = {
        field: value
        for field, value in values.items()
        if field == "set" or (field not in own and getattr(config, field) is None)
    }
    batches = resolve_batches(config, recipe, None if name == "none" else name, num_processes)
    return replace(config, preset=name, **{**filled_in, **batches})


def find_recipe(config: TrainConfig, store: StoreReader) -> Recipe:
    """The recipe of a configuration's preset, which is resolved; without one, that of network and task."""
    if config.preset != "none":
        return _find(config.preset).recipe
    width = store.layout.width
    own = find_network(config.head).find_recipe(config.task, width)
    return own or find_task(config.task).find_recipe(width)


def resolve_views(config: TrainConfig, num_views: np.ndarray, num_processes: int = 1) -> int:
    """Views of a video in a step: those asked for, else the preset's where every training row holds as many, else 1.

    Args:
        config: As `resolve_preset` left it.
        num_views: Of each training row, those that it is trained on.
        num_processes: That train together: their batch norms take it that all have as many clips.

    Raises:
        StoreMismatchError: If no row holds as many as were asked for, or, of several processes, not every row.
    """
    if config.views_per_video is not None:
        num_held = int(num_views.max() if num_processes == 1 else num_views.min())
        if config.views_per_video > num_held:
            raise StoreMismatchError(
                f"{config.views_per_video} views of a video were asked for (--views-per-video), training rows of "
                f"{config.features} hold {num_held} that are trained on (--train-views {config.train_views}): extract "
                "with --views train=augment:4, train=flip or train=three"
            )
        return config.views_per_video
    num_preset = _find(config.preset).recipe.views_per_video if config.preset != "none" else 1
    return num_preset if int(num_views.min()) >= num_preset else 1


def find_preset(config: TrainConfig, store: StoreReader) -> str | None:
    """The preset that `auto` takes; None where the backbone, the data set or the layers are in no preset."""
    # A data set may have been extracted by another one's recipe: it is trained by that one's, too.
    dataset, beside = store.facts.recipe or store.facts.dataset.name, describe_backbone(store)
    layers = set(config.layers or store.layout.layers)
    for preset in find_network(config.head).presets:
        if (preset.task, preset.dataset) == (config.task, dataset) and preset.is_beside(*beside):
            is_whole = not config.layers and len(layers) == preset.depth
            if is_whole or layers == set(preset.layers):
                return preset.name
    return None


def _find(name: str) -> Preset:
    return _all_presets()[name]


def _all_presets() -> dict[str, Preset]:
    return {preset.name: preset for kind in NETWORKS.values() for preset in kind.presets}


def _require_fitting_preset(config: TrainConfig, kind: NetworkKind, store: StoreReader) -> None:
    presets = _all_presets()
    if config.preset not in presets:
        raise ConfigError(f"--preset takes auto, none, {', '.join(presets)}; found {config.preset!r}")
    preset = presets[config.preset]
    if preset not in kind.presets:
        owners = name_all(one for one in NETWORKS.values() if preset in one.presets)
        raise ConfigError(f"--preset has no effect on --head {config.head}: leave it out, or train --head {owners}")
    if preset.task != config.task:
        raise ConfigError(f"--preset {config.preset} is not for --task {config.task}")
    if not preset.is_beside(*describe_backbone(store)):
        backbone = store.facts.backbone
        raise StoreMismatchError(
            f"--preset {config.preset} is for a {preset.family.upper()} backbone of width {preset.width}, "
            f"{preset.depth} blocks, patches of {preset.patch_px} px; {store.path} is of {backbone.architecture}: "
            f"width {backbone.width}, {backbone.depth} blocks, {backbone.patch_size[0]} px. "
            "Use --preset auto."
        )
    if config.layers is None:
        store.layer_places(preset.layers)
