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
from .networks.contract import Network, NetworkStack
from .networks.norms import average_statistics
from .recipe import Schedule, learning_rate_at, set_learning_rate
from .resume_state import Position, StackState
from .run_folder import Run
from .step_log import find_gradient_norm

ComputeLoss = Callable[[Network, Any, ClipBatch], torch.Tensor]
"""The loss () of what a network said of a batch."""


class Head:
    """One head of a training: its network, how far it is, and the run that it is kept in."""

    def __init__(self, config: TrainConfig, run: Run, network: Network, num_frames: int) -> None:
        self.config = config
        self.run = run
        self.network = network
        self.num_frames = num_frames
        """Of a clip as it is read, those without tokens among them."""
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
        self,
        heads: Sequence[Head],
        module: Network | NetworkStack,
        optimizers: Sequence[torch.optim.Optimizer],
        fabric: Fabric,
    ) -> None:
        """Put it on the device.

        Args:
            heads: Each with its network.
            module: The network of one head, or the stack of all.
            optimizers: One for each head; their groups of parameters become one optimiser.
            fabric: The device, its precision, and the processes.
        """
        self.heads = list(heads)
        self.active = list(heads)
        """Those that still learn."""
        self._module = module
        self._fabric = fabric
        optimizer, *others = optimizers
        self._groups = [slice(0, len(optimizer.param_groups))]
        for other in others:
            for group in other.param_groups:
                optimizer.add_param_group(group)
            self._groups.append(slice(self._groups[-1].stop, len(optimizer.param_groups)))
        self._wrapped, self._optimizer = fabric.setup(module, optimizer)
        # A step that overflows in one stack is no reason to scale the gradients of another.
        self._scaler = copy.deepcopy(getattr(fabric.strategy.precision, "scaler", None))

    def train(self) -> None:
        """Into training mode."""
        self._wrapped.train()

    def set_rates(self, epoch: float, schedule: Schedule) -> None:
        """Give the parameters of each head its rate at a fractional epoch."""
        for head, groups in zip(self.heads, self._groups, strict=True):
            set_learning_rate(self._optimizer.param_groups[groups], learning_rate_at(epoch, head.config, schedule))

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
            output = self._wrapped(*self._module.inputs(batch), codec)
            outputs = [output] if len(self.heads) == 1 else output
            losses = {
                head: compute_loss(head.network, own, batch) for head, own in zip(self.heads, outputs, strict=True)
            }
            # A head that learns no more keeps its place: processes agree on which gradients there are.
            counted = [loss if head in self.active else 0 * loss for head, loss in losses.items()]
            self._fabric.backward(sum(counted[1:], counted[0]) / num_batches)
        return [losses[head].detach() for head in self.active]

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
                self._fabric.strategy.precision.unscale_gradients(self._optimizer)
                for groups in self._groups:
                    own = [one for group in self._optimizer.param_groups[groups] for one in group["params"]]
                    # What is not finite is told by the loss and the weights; under fp16 such a step is left out, not
                    # an error.
                    torch.nn.utils.clip_grad_norm_(own, clip_norm, error_if_nonfinite=False)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def drop(self, head: Head) -> None:
        """Let one head of several learn no more; what it was is in its run's folder."""
        self.active.remove(head)
        if len(self.heads) == 1:
            return
        # Of zeros it stays zeros, and finite.
        with torch.no_grad():
            for parameter in head.network.parameters():
                parameter.zero_()
                for values in self._optimizer.optimizer.state.get(parameter, {}).values():
                    if torch.is_tensor(values):
                        values.zero_()

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
