"""A network over planned clips: for validation, evaluation, an index and a comparison alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
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
        parts_by_process: list[Any] = [None] * self.size
        dist.all_gather_object(parts_by_process, parts)
        return [
            parts_by_process[place % self.size][place // self.size] for place in range(sum(map(len, parts_by_process)))
        ]


ALONE = Team()


@contextmanager
def join_team() -> Iterator[Team]:
    """The processes that torchrun started, for as long as the context is open; without it this one alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    is_begun = dist.is_initialized()  # by a training of the same processes
    if not is_begun:
        dist.init_process_group("gloo")  # on any device: what they tell each other lies on the host
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        if not is_begun:
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
    shared: SharedAnswers | None = None
    """Of several networks that are asked for the same clips."""
    _loader: ClipLoader = field(init=False, repr=False, compare=False)
    """One for all questions: an index asks shard by shard."""

    def __post_init__(self) -> None:
        loader = ClipLoader.for_network(
            self.network, self.store, layers=self.layers, device=self.device, with_texts=self.network.reads_texts
        )
        object.__setattr__(self, "_loader", loader)

    def share(self, networks: Sequence[Network]) -> list[Scorer]:
        """A scorer for each of several networks that read the same: what all of them ask for is read once.

        Whoever asks first has all of them run on each batch; the others must ask for the same clips, and have their
        outputs finished in the same way, in the same order.
        """
        if len(networks) == 1:
            return [replace(self, network=networks[0])]
        shared = SharedAnswers(tuple(networks))
        return [replace(self, network=network, shared=shared) for network in networks]

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
        lengths: np.ndarray | None = None,
    ) -> Scorer:
        """With a run's checkpoint, in the precision of its training; on the CPU unless a device is named.

        `lengths` are of the clips as they are cached, (n,); None takes it that all have the run's.
        """
        device = device or torch.device("cpu")
        network = load_checkpoint(run, checkpoint).to(device)
        lengths = np.array([run.frames]) if lengths is None else lengths
        return cls(
            network,
            store,
            layers=run.shape.layers,
            num_frames=network.fit_clips(store, run.frames, lengths),
            batch_size=run.config["batch_size"],
            device=device,
            team=replace(team, autocast=autocast_as_trained(run, device)),
            is_backwards=is_backwards,
        )

    def run(
        self, plans: Sequence[ClipPlan], finish: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
    ) -> np.ndarray:
        """What the network says of planned clips, in their order.

        Args:
            plans: Batches of clips.
            finish: What becomes of the output of a batch, on the device.
        """
        if self.shared is not None:
            return self.shared.take(self, plans, finish)
        (answers,) = self.run_all([self.network], plans, finish)
        return answers

    @torch.inference_mode()
    def run_all(
        self,
        networks: Sequence[Network],
        plans: Sequence[ClipPlan],
        finish: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    ) -> list[np.ndarray]:
        """What each of several networks that read the same says of planned clips, which are read once.

        Args:
            networks: On `device`; `network` is one of them.
            plans: Batches of clips.
            finish: What becomes of the output of a batch, on the device.
        """
        were_training = [network.training for network in networks]
        reader = self.network
        codec = codec_for(self.store, self.layers, self.device) if "patches" in reader.arrays else None
        if self.is_backwards:
            plans = [reader.reverse_plan(plan) for plan in plans]
        parts: list[list[torch.Tensor]] = [[] for _ in networks]
        with ExitStack() as folding:
            for network in networks:
                network.eval()
                folding.enter_context(network.folded(codec))
            for batch in self._loader.load(self.team.take(plans)):
                seen = reader.reverse_batch(batch) if self.is_backwards else batch
                for network, own in zip(networks, parts, strict=True):
                    with self.team.autocast():
                        output = network(*network.inputs(seen), codec)
                    own.append(_fetch(finish(output.float())))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for network, was_training in zip(networks, were_training, strict=True):
            network.train(was_training)
        return [np.concatenate(self.team.gather([part.numpy() for part in own])) for own in parts]


@dataclass(slots=True)
class SharedAnswers:
    """What several networks said of the same clips, until each of them has asked."""

    networks: tuple[Network, ...]
    _waiting: list[list[np.ndarray]] = field(default_factory=list)
    """Of each question, those of all networks."""
    _asked: dict[int, int] = field(default_factory=dict)
    """How often each network asked, by its place."""

    def take(
        self, scorer: Scorer, plans: Sequence[ClipPlan], finish: Callable[[torch.Tensor], torch.Tensor]
    ) -> np.ndarray:
        """The answers of a scorer's network to its next question."""
        place = next(place for place, network in enumerate(self.networks) if network is scorer.network)
        question = self._asked.get(place, 0)
        self._asked[place] = question + 1
        if question == len(self._waiting):
            self._waiting.append(scorer.run_all(self.networks, plans, finish))
        answers = self._waiting[question][place]
        if len(answers) != sum(len(plan.rows) for plan in plans):
            raise ValueError("networks that are scored together must ask for the same clips in the same order")
        self._waiting[question][place] = np.empty(0)  # nobody asks for it again
        return answers


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
