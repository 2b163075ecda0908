"""The heads of a training: each with a run of its own, in stacks that learn from the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric

from ..store.codecs.contract import Codec
from .clips import ClipBatch
from .config import TrainConfig
from .networks.contract import Network
from .networks.norms import average_statistics
from .recipe import Schedule, learning_rate_at, set_learning_rate
from .resume_state import Position, StackState
from .run_folder import Run
from .step_log import find_gradient_norm

ComputeLoss = Callable[[Network, Any, ClipBatch], torch.Tensor]
"""The loss () of what a network said of a batch."""


class Head:
    """One head of a training: its network, how far it is, and the run that it is kept in."""

    def __init__(self, config: TrainConfig, run: Run, network: Network) -> None:
        self.config = config
        self.run = run
        self.network = network
        self.position = Position()
        self.own_losses: list[torch.Tensor] = []
        """() each, of this process, since all were last found finite."""
        self.stopped: str | None = None
        """Why it stopped alone, where others went on."""

    def note_epoch(self, metrics: dict[str, Any], figure: str) -> bool:
        """Stand after an epoch; whether none was better. Of equals the later one is the best.

        An epoch that was not validated is the best only as long as none was.
        """
        old, value = self.position, metrics.get(figure)
        highest = None if old.best is None else old.best.get(figure)
        is_best = highest is None or (value is not None and value >= highest)
        is_better = highest is None or (value is not None and value > highest)
        self.position = Position(
            epoch=metrics["epoch"],
            steps=old.steps,
            best=metrics if is_best else old.best,
            improved=metrics["epoch"] if is_better else old.improved,
            metrics=metrics,
            seconds=old.seconds,
        )
        return is_best

    def is_done(self, figure: str) -> bool:
        """Whether it stopped, or its last epoch was validated and it got no better for as long as it may."""
        patience, position = self.config.patience, self.position
        is_told = figure in position.metrics
        is_worn_out = patience is not None and is_told and position.epoch - position.improved >= patience
        return self.stopped is not None or is_worn_out

    def find_bad_loss(self) -> int | None:
        """The place among `own_losses` of the first step whose loss, of all processes, is not finite."""
        if not self.own_losses:
            return None
        is_finite = torch.isfinite(torch.stack(self.position.losses[-len(self.own_losses) :]))
        return None if bool(is_finite.all()) else int((~is_finite).nonzero()[0])

    def has_finite_weights(self) -> bool:
        """Whether every number of its state is finite."""
        finite = [torch.isfinite(tensor).all() for tensor in self.network.state_dict().values()]
        return bool(torch.stack(finite).all())


class Stack:
    """Heads with one module and one optimiser; most stacks hold one head."""

    def __init__(
        self, heads: Sequence[Head], module: torch.nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric
    ) -> None:
        self.heads = list(heads)
        self.active = list(heads)
        """Those that still learn."""
        self._module = module
        self._fabric = fabric
        self._wrapped, self._optimizer = fabric.setup(module, optimizer)
        # A step that overflows in one stack is no reason to scale the gradients of another.
        self._scaler = copy.deepcopy(getattr(fabric.strategy.precision, "scaler", None))

    def train(self) -> None:
        """Into training mode."""
        self._wrapped.train()

    def set_rates(self, epoch: float, schedule: Schedule) -> None:
        """Give the parameters of each head its rate at a fractional epoch."""
        (head,) = self.heads
        set_learning_rate(self._optimizer, learning_rate_at(epoch, head.config, schedule))

    def learn(
        self, batch: ClipBatch, codec: Codec | None, compute_loss: ComputeLoss, *, num_batches: int, is_last: bool
    ) -> list[torch.Tensor]:
        """Add the gradients of one of a step's batches.

        Args:
            batch: What to learn from.
            codec: Of its codes.
            compute_loss: The loss of a head.
            num_batches: Of the step, whose losses are averaged.
            is_last: Whether no other batch of this step follows.

        Returns:
            The loss () of each active head.
        """
        with self._own_scaler(), self._fabric.no_backward_sync(self._wrapped, enabled=not is_last):
            (head,) = self.heads
            loss = compute_loss(head.network, self._wrapped(*head.network.inputs(batch), codec), batch)
            self._fabric.backward(loss / num_batches)
        return [loss.detach()]

    def find_gradient_norms(self) -> list[torch.Tensor]:
        """The norm () of what each active head's backward pass left; nothing is changed."""
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        return [find_gradient_norm(list(head.network.parameters())) / scale for head in self.active]

    def average_statistics(self) -> None:
        """Make its batch norms' statistics the same in all processes."""
        average_statistics(self._module)

    def step(self, clip_norm: float | None) -> None:
        """Move the weights along the gradients that were added up, each head's cut down to a norm."""
        with self._own_scaler():
            if clip_norm is not None:
                # What is not finite is told by the loss and the weights; under fp16 such a step is left out, not an
                # error.
                self._fabric.clip_gradients(
                    self._wrapped, self._optimizer, max_norm=clip_norm, error_if_nonfinite=False
                )
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def drop(self, head: Head) -> None:
        """Let one head of several learn no more."""
        self.active.remove(head)

    def describe_state(self) -> StackState:
        """What must be saved of it: nothing but positions where no head learns any more."""
        with self._own_scaler():
            precision = self._fabric.strategy.precision.state_dict()
        heads = [(head.position, head.stopped) for head in self.heads]
        return StackState(heads, self._module, self._optimizer.optimizer, precision, is_idle=not self.active)

    def load_precision(self, precision: dict[str, Any]) -> None:
        """The gradient scaler's numbers, as they were saved."""
        with self._own_scaler():
            self._fabric.strategy.precision.load_state_dict(precision)

    @contextmanager
    def _own_scaler(self) -> Iterator[None]:
        """Fabric has one gradient scaler: this stack's, for the time."""
        if self._scaler is not None:
            self._fabric.strategy.precision.scaler = self._scaler  # type: ignore[attr-defined]
        yield
