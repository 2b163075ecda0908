"""A network over planned clips: for validation, evaluation, an index and a comparison alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import EnvironmentFailedError
from ..store.reader import StoreReader
from .clips import ClipLoader, ClipPlan, codec_for
from .networks.contract import Network
from .run_folder import Run, load_checkpoint


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that share an evaluation, and how each of them computes."""

    rank: int = 0
    """Of this one."""
    size: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The precision of the pass: what the head was trained in."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def take(self, plans: Sequence[ClipPlan]) -> list[ClipPlan]:
        """This process's share of the batches; they are as large as those of one process, so scores are the same."""
        return list(plans[self.rank :: self.size])

    def gather(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """What every process made of its share, as all of them see it: in the order of the batches."""
        if self.size == 1:
            return parts
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, parts)
        return [found[place % self.size][place // self.size] for place in range(sum(map(len, found)))]


ALONE = Team()


@contextmanager
def join_team() -> Iterator[Team]:
    """The processes that torchrun started, for as long as the context is open; without it this one alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("gloo")  # on any device: what they tell each other lies on the host
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Scorer:
    """What is needed to hear what a network says of clips; it is put into evaluation mode for the time."""

    network: Network
    """It sits on `device`."""
    store: StoreReader
    """Where the tokens are."""
    layers: tuple[int, ...]
    """Backbone blocks that the network reads."""
    num_frames: int
    """T."""
    batch_size: int
    """Clips in a batch."""
    device: torch.device
    team: Team = ALONE
    """Who shares the clips, and in which precision; every process gets the whole result."""
    is_backwards: bool = False
    """Show the network every clip from its last frame to its first."""

    @classmethod
    def of_run(
        cls,
        run: Run,
        store: StoreReader,
        *,
        checkpoint: str = "best",
        device: torch.device | None = None,
        is_backwards: bool = False,
        team: Team = ALONE,
    ) -> Scorer:
        """With a run's checkpoint, in the precision of its training; on the CPU unless a device is named."""
        device = device or torch.device("cpu")
        return cls(
            load_checkpoint(run, checkpoint).to(device),
            store,
            layers=run.shape.layers,
            num_frames=run.frames,
            batch_size=run.config["batch_size"],
            device=device,
            team=replace(team, autocast=autocast_as_trained(run, device)),
            is_backwards=is_backwards,
        )

    @torch.inference_mode()
    def run(
        self, plans: Sequence[ClipPlan], finish: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
    ) -> np.ndarray:
        """What the network says of planned clips, in their order.

        Args:
            plans: Batches of clips.
            finish: What becomes of the output of a batch, on the device.
        """
        network = self.network
        was_training = network.training
        network.eval()
        codec = codec_for(self.store, self.layers, self.device) if "patches" in network.arrays else None
        loader = ClipLoader.for_network(network, self.store, layers=self.layers, device=self.device)
        if self.is_backwards:
            plans = [network.reverse_plan(plan) for plan in plans]
        parts = []
        with network.folded(codec):
            for batch in loader.load(self.team.take(plans)):
                seen = network.reverse_batch(batch) if self.is_backwards else batch
                with self.team.autocast():
                    output = network(*network.inputs(seen), codec)
                parts.append(_fetch(finish(output.float())))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        network.train(was_training)
        return np.concatenate(self.team.gather([part.numpy() for part in parts]))


def _fetch(output: torch.Tensor) -> torch.Tensor:
    """On its way to the host: of a CUDA GPU nobody waits for it, or the next batch would be queued too late."""
    return output.to("cpu", non_blocking=output.device.type == "cuda")


def autocast_as_trained(run: Run, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The mixed precision that a run was trained in, where the device has it: float16 a CUDA GPU alone."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.config.get("precision") or "fp32")
    if dtype is None or (dtype == torch.float16 and device.type != "cuda"):
        return nullcontext
    return partial(torch.autocast, device.type, dtype)


@contextmanager
def explain_full_device(advice: str) -> Iterator[None]:
    """Turn torch's error about memory into ours.

    Raises:
        EnvironmentFailedError: If the device's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailedError(
            f"the device's memory does not suffice ({str(error).splitlines()[0]}): {advice}."
        ) from error
