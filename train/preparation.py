"""How a training begins: what its options come to, its networks, and its runs' folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import TorchElasticEnvironment

from ..device import is_first_process
from ..errors import ConfigError
from ..files import describe_bytes
from ..store.reader import StoreReader, open_store
from ..store.shard_cache import ShardCache
from .batches import StepShares, keep_recorded_batches, warn_of_other_step
from .clips import (
    find_clip_lengths,
    require_long_clips,
    require_pixels,
    require_whole_steps,
    resolve_clip_frames,
    warn_of_short_splits,
    warn_of_thinned_clips,
)
from .config import TrainConfig
from .fabric import make_fabric, resolve_device
from .logs import require_wandb
from .networks import find_network
from .networks.contract import Network, NetworkKind, NetworkShape
from .networks.norms import has_norms
from .order import read_through_cache
from .recipe import Recipe
from .run_folder import (
    CONFIG_NAME,
    Run,
    begin_with,
    create_run,
    open_run,
    plan_run,
    refuse_existing_run,
    require_same_run,
)
from .settings import (
    find_recipe,
    plan_network,
    require_what_is_read,
    resolve_preset,
    resolve_views,
    take_recorded,
)
from .stack import Head
from .tasks import find_task
from .tasks.contract import Task

_log = logging.getLogger(__name__)


def begin_heads(
    configs: Sequence[TrainConfig], state_path: Path, say: Callable[[str], None]
) -> tuple[list[Head], StoreReader, Task, Fabric]:
    """Resolve what the options leave open, build all networks, and make their runs' folders."""
    is_first = is_first_process()
    can_resume = [config.resume and (config.out / CONFIG_NAME).is_file() for config in configs]
    for config, can in zip(configs, can_resume, strict=True):
        if is_first and not can:
            refuse_existing_run(config.out)
    require_wandb(configs[0])
    num_processes = int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else 1
    device_type, precision = resolve_device(configs[0])
    store = open_store(configs[0].features)
    require_what_is_read(configs[0], store)
    is_auto = configs[0].preset == "auto"
    given = configs[0]
    begun = [open_run(config.out) if can else None for config, can in zip(configs, can_resume, strict=True)]
    configs = [
        _resolve(replace(config, precision=precision), store, num_processes, run)  # type: ignore[arg-type]
        for config, run in zip(configs, begun, strict=True)
    ]
    kind, task = find_network(configs[0].head), find_task(configs[0].task)(configs[0], store)
    shape = plan_network(configs[0], store, None if begun[0] is None else begun[0].shape)
    if begun[0] is not None and begun[0].validates_every_clip:
        task.validation = task.find_rows(store, configs[0].val_split)
    window = _resolve_reading(configs[0], begun[0], store, task)
    num_views = resolve_views(configs[0], task.training.num_trained_views, num_processes)
    configs = [replace(config, views_per_video=num_views, window=window) for config in configs]
    config = task.config = configs[0]
    frames = shape.clip_frames or _resolve_frames(config, store, task, is_told=is_auto and config.preset != "none")
    assert config.batch_size is not None
    shares, available = StepShares.of_config(config, num_processes), len(task.training) * num_views
    warn_of_other_step(given, config, find_recipe(config, store), min(shares.clips, available))
    _warn_of_no_validation(store, task, config)
    task.check_step(config.batch_size * num_processes)
    kind.check_step(min(config.batch_size, len(task.training) // num_processes) * num_processes)
    # Before anything is written: it may not fit.
    is_begun = all(can_resume) and state_path.is_file()
    networks = [_build(config, kind, shape, store, task, is_begun=is_begun) for config in configs]
    lengths = np.concatenate([task.training.num_cached_frames, find_clip_lengths(task.validation)])
    num_frames, *_ = [network.fit_clips(store, frames, lengths) for network in networks]
    _check_clips(networks[0], lengths, num_frames, store, task)
    warn_of_short_splits(store, num_frames, {config.train_split, config.val_split}, task.find_rows)
    if given.norm_clips is not None and not has_norms(networks[0]):
        raise ConfigError(f"--norm-clips has no effect on --head {config.head}, which has no batch norm: leave it out")
    say(shares.describe(available, has_norms=has_norms(networks[0])))
    say(_describe_reading(config, store))
    if task.num_left_out:
        say(_describe_left_out(task.num_left_out, config, find_recipe(config, store)))
    fabric = make_fabric(config, device_type)
    runs = [
        plan_run(config, frames, shape, store, task.training.rows, num_processes=num_processes, device_type=device_type)
        for config in configs
    ]
    fabric.barrier()  # no process looks at what the first one is about to write
    if fabric.is_global_zero:
        for config, run, can in zip(configs, runs, can_resume, strict=True):
            require_same_run(run, config, task.of_old_runs) if can else create_run(run)
    fabric.barrier()
    heads = [Head(*parts, num_frames) for parts in zip(configs, runs, networks, strict=True)]
    return heads, store, task, fabric


def _resolve(config: TrainConfig, store: StoreReader, num_processes: int, begun: Run | None) -> TrainConfig:
    """What the options come to; of a run that goes on, what is left open is what it began with."""
    if begun is None:
        return resolve_preset(config, store, num_processes=num_processes)
    shares = keep_recorded_batches(config, begun.config, num_processes)
    config = replace(take_recorded(config, begun), batch_size=shares.batch_size, norm_clips=None)
    resolved = resolve_preset(config, store, num_processes=num_processes)
    return replace(resolved, norm_clips=shares.norm_clips)


def _resolve_reading(config: TrainConfig, begun: Run | None, store: StoreReader, task: Task) -> int | None:
    """Begin the cache in front of a store, and find the window of shards that are mixed: a run that goes on keeps its.

    Raises:
        ConfigError: If the cache is no cache, or too small.
    """
    window = config.window if begun is None or config.window is not None else begun.config.get("window")
    if config.cache is None:
        return window
    cache, frames = ShardCache(config.cache, config.cache_size), float(task.training.num_cached_frames.mean())
    return read_through_cache(store, cache, frames, wanted=window, mixes_all=begun is not None and window is None)


def _describe_reading(config: TrainConfig, store: StoreReader) -> str:
    parts, num_shards = [f"Tokens are read by: {store.describe_reading()}"], store.layout.num_shards
    if config.window is not None:
        parts.append(f"clips of {min(config.window, num_shards)} of {num_shards} shards are mixed at a time")
    if store.cache is not None:
        parts.append(f"shards are kept in {store.cache.folder}, {describe_bytes(store.cache.most_bytes)} at most")
    return "; ".join(parts)


def _warn_of_no_validation(store: StoreReader, task: Task, config: TrainConfig) -> None:
    if not len(task.validation):
        _log.warning(
            "%s has no good video with what this task is measured by in split %r: no epoch is measured, and the last "
            "one counts as the best. Name another split with --val-split, or extract one.",
            store.path,
            config.val_split,
        )


def _describe_left_out(count: int, config: TrainConfig, recipe: Recipe) -> str:
    whose = f", as {config.preset} has it" if config.min_video_frames == recipe.min_video_frames else ""
    videos = "training video" if count == 1 else "training videos"
    return (
        f"{count} {videos} of fewer than {config.min_video_frames} frames left out{whose} "
        "(--min-video-frames 0 takes them)"
    )


def _build(
    config: TrainConfig, kind: NetworkKind, shape: NetworkShape, store: StoreReader, task: Task, *, is_begun: bool
) -> Network:
    """A network as its training begins; the weights of one that has a state come from there."""
    torch.manual_seed(config.seed)
    network = kind.build(shape)
    require_pixels(network, store)
    if config.init is not None and not is_begun:
        begin_with(config.init, network, store)
    network.prepare(store)
    task.begin(network)
    return network


def _resolve_frames(config: TrainConfig, store: StoreReader, task: Task, *, is_told: bool) -> int:
    """T, which neither training rows nor evaluation clips may fall short of; whether fewer than usual are told."""
    lengths_held = np.concatenate([task.training.num_cached_frames, task.validation.num_cached_frames])
    if config.frames is None:
        lengths = find_clip_lengths(task.validation, only_first=task.reads_first_clips)
        lengths_held = np.concatenate([lengths_held, lengths])
    frames = resolve_clip_frames(config.frames, lengths_held, store, task.default_frames)
    if is_told and config.frames is None and frames < task.default_frames:
        _log.warning(
            "clips of %d frames: rows of %s hold no more; %s is trained with %d (--frames)",
            frames,
            store.path,
            config.preset,
            task.default_frames,
        )
    return frames


def _check_clips(network: Network, lengths: np.ndarray, num_frames: int, store: StoreReader, task: Task) -> None:
    """Refuse clips that are shorter than those that are read, or cut where a network reads shares of a step."""
    require_whole_steps(network, lengths, num_frames, store)
    require_long_clips(task.validation, num_frames, store, only_first=task.reads_first_clips)
    warn_of_thinned_clips(task.validation, num_frames, store, only_first=task.reads_first_clips)
