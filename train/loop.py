"""`s4v train`: the loop over epochs, from planned batches to checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from ..errors import ConfigError, EnvironmentFailedError, StoreMismatchError
from ..store._files import write_json
from ..store.reader import StoreReader, open_store
from .clips import (
    ClipLoader,
    LabelledRows,
    codec_for,
    find_labelled_rows,
    plan_training_epoch,
    resolve_clip_frames,
)
from .config import TrainConfig
from .evaluate import accuracy_figures, evaluate_head
from .heads import HeadConfig, build_head, plan_head
from .presets import resolve_preset
from .recipe import classification_loss, learning_rate_at, make_optimizer
from .run import Run, append_metrics, create_run, refuse_existing_run, save_checkpoint

ReportEpoch = Callable[[dict[str, Any], int], None]
"""Called after each epoch with its metrics and the number of epochs."""

_log = logging.getLogger(__name__)

_FABRIC_PRECISION = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def default_run_path(features: Path, head: str, folder: Path = Path("runs")) -> Path:
    """`runs/STORE-HEAD`, with a number behind it where that is taken."""
    stem = folder / f"{features.name.removesuffix('.zarr')}-{head}"
    candidates = [stem, *(stem.with_name(f"{stem.name}-{number}") for number in range(2, 10_000))]
    return next(path for path in candidates if not path.exists())


def train_run(config: TrainConfig, report: ReportEpoch = lambda *_: None) -> dict[str, Any]:
    """Train a head on a store and leave a run's folder.

    Args:
        config: What to train, and how.
        report: Told about each epoch.

    Returns:
        run, preset, epochs, best (metrics of the best epoch), last, parameters, seconds, data_wait_share.

    Raises:
        StoreMismatchError: If the store lacks what the head reads, or has no labelled training video.
        RunExistsError: If the run's folder holds anything.
        EnvironmentFailedError: If the loss is not finite; the last good checkpoint is kept.
    """
    refuse_existing_run(config.out)
    store = open_store(config.features)
    config = resolve_preset(config, store)
    head_config = plan_head(
        config.head, store, layers=config.layers, side_width=config.side_width, inputs=config.inputs
    )
    training, validation = (find_labelled_rows(store, split) for split in (config.train_split, config.val_split))
    _require_rows(store, training, config)
    frames = resolve_clip_frames(
        config.frames, np.concatenate([training.num_cached_frames, validation.num_cached_frames]), store
    )
    fabric = _make_fabric(config)
    run = create_run(config, frames, head_config, store)
    return _Training(config, run, head_config, store, training, validation, fabric).fit(report)


class _Training:
    """One run from its first epoch to its last."""

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        head_config: HeadConfig,
        store: StoreReader,
        training: LabelledRows,
        validation: LabelledRows,
        fabric: Fabric,
    ) -> None:
        self._config = config
        self._run = run
        self._layers = head_config.layers
        self._store = store
        self._training = training
        self._validation = validation
        self._fabric = fabric
        torch.manual_seed(config.seed)
        self._module = build_head(head_config)
        self._head, self._optimizer = fabric.setup(self._module, make_optimizer(self._module, config))
        self._codec = codec_for(store, head_config.layers, fabric.device) if "patches" in self._module.arrays else None
        self._loader = ClipLoader(store, arrays=self._module.arrays, layers=head_config.layers, device=fabric.device)
        self._step = 0
        self._wait_s = 0.0
        self._wait_share = 0.0

    def fit(self, report: ReportEpoch) -> dict[str, Any]:
        from torch.utils.tensorboard import SummaryWriter

        start = time.perf_counter()
        best: dict[str, Any] | None = None
        metrics: dict[str, Any] = {}
        board = SummaryWriter(self._run.path)
        assert self._config.epochs is not None
        for epoch in range(self._config.epochs):
            metrics = {"epoch": epoch + 1, **self._train_epoch(epoch)}
            self._require_finite_weights(epoch)
            metrics |= self._validate(epoch)
            append_metrics(self._run, metrics)
            for name, value in metrics.items():
                board.add_scalar(name, value, epoch + 1)
            save_checkpoint(self._run, "last", self._module, metrics)
            if best is None or metrics.get("val_top1", 0.0) >= best.get("val_top1", 0.0):
                best = metrics
                save_checkpoint(self._run, "best", self._module, metrics)
            # Times differ from run to run: they are told, and not kept among the metrics.
            report({**metrics, "data_wait_share": round(self._wait_share, 4)}, self._config.epochs)
        board.close()
        seconds = time.perf_counter() - start
        summary = {
            "run": str(self._run.path),
            "preset": self._config.preset,
            "epochs": self._config.epochs,
            "videos": {"train": len(self._training), "val": len(self._validation)},
            "steps": self._step,
            "best": best,
            "last": metrics,
            "parameters": sum(p.numel() for p in self._module.parameters()),
            "seconds": round(seconds, 3),
            "data_wait_share": round(self._wait_s / seconds, 4),
        }
        write_json(self._run.path / "stats.json", summary)
        return summary

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config = self._config
        plans = plan_training_epoch(
            self._training,
            num_frames=self._run.frames,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=self._fabric.global_rank,
            num_ranks=self._fabric.world_size,
        )
        self._head.train()
        batches = self._loader.load(plans)
        losses = []
        began, waited = time.perf_counter(), self._wait_s
        for place, plan in enumerate(plans):
            start = time.perf_counter()
            batch = next(batches)
            self._wait_s += time.perf_counter() - start
            # The middle of the step: at its end, the last step of a run would have a rate of zero.
            rate = learning_rate_at(epoch + (place + 0.5) / len(plans), config)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            loss = classification_loss(
                self._head(batch.pixels, batch.patches, batch.cls, self._codec), batch.labels, config
            )
            self._fabric.backward(loss)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._step += 1
            losses.append(loss.detach())
            if place % 50 == 49 or place + 1 == len(plans):
                self._require_finite(losses[-50:], epoch, plan.rows)
        train_loss = float(torch.stack(losses).mean())
        self._wait_share = (self._wait_s - waited) / (time.perf_counter() - began)
        return {"train_loss": train_loss, "learning_rate": rate}

    def _validate(self, epoch: int) -> dict[str, float]:
        if not len(self._validation):
            return {}
        try:
            result = evaluate_head(
                self._module,
                self._store,
                self._validation,
                layers=self._layers,
                num_frames=self._run.frames,
                batch_size=self._config.batch_size,
                device=self._fabric.device,
            )
        except EnvironmentFailedError:
            self._stop_as_diverged("a validation score", epoch, "")
        return {"val_loss": result.loss, **{f"val_{k}": v for k, v in accuracy_figures(result).items()}}

    def _require_finite(self, losses: list[torch.Tensor], epoch: int, rows: np.ndarray) -> None:
        """Checked every 50 steps: asking a GPU for each loss would hold it up."""
        if not bool(torch.isfinite(torch.stack(losses)).all()):
            ids = self._store.read_manifest(["video_id"])["video_id"].take(rows[:3]).to_pylist()
            self._stop_as_diverged("the loss", epoch, f" (videos {', '.join(ids)}, ...)")

    def _require_finite_weights(self, epoch: int) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self._module.state_dict().values()):
            self._stop_as_diverged("a weight", epoch, "")

    def _stop_as_diverged(self, what: str, epoch: int, where: str) -> NoReturn:
        kept = self._run.path / "last.safetensors"
        hint = f"{kept} is the last good checkpoint." if kept.exists() else "No epoch was finished."
        raise EnvironmentFailedError(
            f"{what} became NaN or infinite in epoch {epoch + 1}, at or before step {self._step}{where}. "
            f"Lower --learning-rate. {hint}"
        )


def _require_rows(store: StoreReader, training: LabelledRows, config: TrainConfig) -> None:
    """Refuse a store without training videos or without the validation split, and warn of an unfinished one."""
    table = store.read_manifest(["split", "status", "label"])
    counts = table.group_by(["split", "status"]).aggregate([("label", "count")]).to_pylist()
    found = ", ".join(f"{c['split']}: {c['label_count']} labelled {c['status']}" for c in counts)
    splits = set(table["split"].to_pylist())
    if not len(training):
        raise StoreMismatchError(
            f"{store.path} has no good, labelled video in split {config.train_split!r}. It has {found}. "
            "Name another --train-split, or extract a data set with labels."
        )
    if len(set(training.labels.tolist())) < 2:
        raise StoreMismatchError(
            f"the good training videos of {store.path} are all of one class: a classifier needs two or more"
        )
    if config.val_split not in splits and config.val_split != TrainConfig.__dataclass_fields__["val_split"].default:
        raise StoreMismatchError(
            f"{store.path} has no split {config.val_split!r} (--val-split); it has {', '.join(sorted(splits))}"
        )
    if any(c["status"] == "pending" for c in counts):
        _log.warning("%s is not finished: %s. Training on what is there.", store.path, found)


def _make_fabric(config: TrainConfig) -> Fabric:
    accelerator = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(config.device)
    if accelerator is None:
        raise ConfigError(f"--device takes auto, cpu, cuda, mps; found {config.device!r}")
    on_gpu = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    precision = config.precision
    if precision is None:
        precision = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "fp32"
    elif precision == "fp16" and not on_gpu:
        # Fabric would take bf16 instead, with a mere note.
        raise ConfigError("--precision fp16 needs a CUDA GPU here: use bf16 or fp32")
    try:
        # One process, whatever a cluster's variables say: inside a job of several tasks Fabric would look for them.
        return Fabric(
            accelerator=accelerator,
            devices=1,
            precision=_FABRIC_PRECISION[precision],  # type: ignore[arg-type]
            plugins=[LightningEnvironment()],
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {config.device} is not available here ({reason}). Use --device auto.") from error
