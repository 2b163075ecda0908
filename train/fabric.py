"""Where a training runs: its device, its precision, and the processes that share it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy

from ..device import DEVICES, find_auto_device
from ..errors import ConfigError
from .batches import StepShares
from .config import TrainConfig
from .networks.norms import NormGroups


class _InputsAsTheyAre(MixedPrecision):
    """Mixed precision that leaves inputs alone: Fabric's makes a half-precision copy of every token and pixel.

    Autocast converts what a product takes; tokens above 65,504 would be infinite in float16 before their norm.
    """

    def convert_input(self, data: Any) -> Any:
        """The same."""
        return data


def resolve_device(config: TrainConfig) -> tuple[str, str]:
    """The type of the device that a training runs on, and its precision.

    Raises:
        ConfigError: If there is no such device type, or it does not have the precision.
    """
    if config.device not in DEVICES:
        raise ConfigError(f"--device takes {', '.join(DEVICES)}; found {config.device!r}")
    device_type, precision = config.device, config.precision
    if device_type == "auto":
        # Processes of torchrun cannot share an MPS device.
        device_type = find_auto_device(may_be_mps=not TorchElasticEnvironment.detect())
    if precision == "fp16" and device_type != "cuda":
        # Fabric would take bf16 instead, with a mere note.
        raise ConfigError("--precision fp16 needs a CUDA GPU here: use bf16 or fp32")
    if precision is None:
        precision = "fp32"
        if device_type == "cuda" and torch.cuda.is_available():
            # Older GPUs emulate bfloat16, many times slower.
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device_type, precision


def make_norm_groups(shares: StepShares) -> NormGroups | None:
    """What batch norms count together, where that is not all of a batch; every process makes it at the same time."""
    if shares.norm_clips is None:
        return None
    processes = None
    if shares.crosses_processes:
        for first in range(0, shares.processes, shares.processes_per_norm):
            members = list(range(first, first + shares.processes_per_norm))
            group = dist.new_group(members)  # every process makes all of them, in the same order
            processes = group if dist.get_rank() in members else processes
    return NormGroups(shares.norm_clips, processes)


def make_fabric(config: TrainConfig, device_type: str) -> Fabric:
    """All processes of a training, one without `torchrun`.

    Raises:
        ConfigError: If the device is not there.
    """
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // num_local
    is_spread = TorchElasticEnvironment.detect()
    # Without torchrun one process, whatever a cluster's variables say: inside a job of several tasks Fabric would look
    # for them.
    plugins: list[Any] = [TorchElasticEnvironment() if is_spread else LightningEnvironment()]
    if config.precision != "fp32":
        plugins.append(_InputsAsTheyAre("bf16-mixed" if config.precision == "bf16" else "16-mixed", device_type))
    try:
        fabric = Fabric(
            accelerator=device_type,
            devices=num_local if is_spread else 1,
            num_nodes=num_nodes if is_spread else 1,
            # Running statistics are the same everywhere: none are sent around before each batch.
            strategy=DDPStrategy(broadcast_buffers=False) if is_spread else "auto",
            plugins=plugins,
        )
        fabric.launch()
        return fabric
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {config.device} is not available here ({reason}). Use --device auto.") from error
