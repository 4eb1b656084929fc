"""One step: what a kind of step works with, and the default kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..options import Options as NoOptions
from ..outputs import Outputs
from ..seeds import derive
from . import device, ledger, memory
from .objective import weighted_loss

if TYPE_CHECKING:
    from .session import Session


class StepContext:
    """What a step sees of its stage.

    ``trained`` are the members with live terms, ``sources`` those that a live term names (with True where a term wants
    the path through them). A step calls :meth:`forward`, :meth:`loss`, :meth:`backward` and :meth:`apply`; loop, order,
    checkpoints and meters stay the framework's. A step class whose batches may be cut where memory is short says
    ``splits = True`` and goes through :meth:`pieces`.
    """

    step: int
    trained: tuple[str, ...]
    sources: dict[str, bool]

    def __init__(self, session: Session) -> None:
        self._session = session
        self._calls: dict[str, int] = {}
        self._piece, self._share = 0, 1.0
        self.step, self.trained, self.sources = 0, (), {}

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self._session.device

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What :meth:`backward` and :meth:`apply` change of a member: its own parameters and its adapters'."""
        return self._session.learners[name].parameters

    def knob(self, path: str) -> Any:
        """The current value of a knob, e.g. ``data.difficulty``."""
        return self._session.knobs.values[path]

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """The batch in pieces that fit into memory; usually one, the batch itself.

        While a piece is out, :meth:`backward` adds to the gradients of those before it, and it and :meth:`record` count
        the piece by its share of the samples. So a loop over the pieces, with one :meth:`apply` after it, is one update
        by the whole batch, for losses that are means over samples.
        """
        parts = memory.cut(self._session, batch)
        for self._piece, piece in enumerate(parts):
            self._share = len(piece.inputs) / len(batch.inputs)
            yield piece
        self._piece, self._share = 0, 1.0

    def forward(self, name: str, *inputs: Any, through: bool = False) -> Outputs:
        """Runs a member.

        A trained member runs in training mode with gradients. A frozen one runs in evaluation mode, and without a graph
        unless ``through``: then a gradient flows through it to ``inputs``, and its parameters get none.

        Args:
            name: the member.
            inputs: what the module takes, on the device: images [B, C, H, W] for a classifier.
            through: keep a frozen member's graph.
        """
        session = self._session
        learner = session.learners[name]
        trained = name in self.trained
        images = next((len(x) for x in inputs if isinstance(x, Tensor)), 0)
        learner.passes += images * (3 if trained else 1)
        device.seed_dropout(session.device, self.seed(name))
        with session.stopwatch.of(learner), torch.set_grad_enabled(trained or through), session.autocast():
            logits = learner.module(*inputs)
        taps = dict(learner.tapped.taps) if learner.tapped is not None else {}
        return Outputs(logits, taps)

    def loss(self, name: str, own: Outputs, others: Mapping[str, Outputs], batch: Batch) -> Tensor:
        """The weighted objective of a member, 0-d, with every term recorded."""
        learner = self._session.learners[name]
        with self._session.stopwatch.of(learner):
            total = weighted_loss(
                learner.live(), own, others, batch, lambda label, value: self.record(f"{name}.{label}", value)
            )
        self.record(f"{name}.loss", total)
        every = self._session.stage.ledger
        if every and self.step % every == 0:
            for key, value in ledger.entries(learner.live(), own, others, batch, self._share).items():
                self.record(f"{name}.{key}", value)
        return total

    def backward(self, name: str, loss: Tensor, *, accumulate: bool = False) -> None:
        """Gradients of ``loss`` for the parameters of this member alone, added to those there if ``accumulate``."""
        learner = self._session.learners[name]
        assert learner.optimizer is not None, "a trained member has an optimizer"
        if not accumulate and self._piece == 0:
            learner.optimizer.zero_grad(set_to_none=True)
        if self._share != 1:
            loss = loss * self._share
        with self._session.stopwatch.of(learner):
            loss.backward(inputs=learner.parameters)  # type: ignore[no-untyped-call]

    def apply(self, name: str) -> None:
        """Clips, steps the optimizer at the scheduled rate, and moves the average."""
        learner = self._session.learners[name]
        assert learner.optimizer is not None
        spec = learner.spec.optimizer
        scale = self._session.rate(learner)
        for group in learner.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        with self._session.stopwatch.of(learner):
            if spec is not None and spec.clip is not None:
                torch.nn.utils.clip_grad_norm_(learner.parameters, spec.clip)
            learner.optimizer.step()
            if learner.ema is not None:
                learner.ema.update_parameters(learner.module)

    def record(self, name: str, value: Tensor) -> None:
        """Adds a 0-d tensor to the curve ``member.name``; no sync."""
        self._session.meters.record(name, self.step, value, self._share)

    def seed(self, name: str) -> int:
        """A seed for this member, step and call, whatever else the stage holds."""
        nth = self._calls[name] = self._calls.get(name, 0) + 1
        return derive(self._session.seed, "dropout", name, self.step, nth)

    def generator(self, name: str) -> torch.Generator:
        """A seeded generator for a member's own random numbers, e.g. noise; differs from dropout's at every call."""
        return torch.Generator(self.device).manual_seed(self.seed(f"{name}/noise"))

    def begin(self, step: int) -> None:
        """Called by the loop before each step."""
        self.step = step
        self._calls.clear()
        self._piece, self._share = 0, 1.0


class Distill:
    """Every source once, then forward, objective and backward of each trained member, then all updates; where memory is
    short, all but the updates piece by piece.

    Members that nobody learns from run one after another, so that only one graph is alive at a time.
    """

    Options = NoOptions
    splits = True

    def __init__(self, options: NoOptions) -> None:
        pass

    def __call__(self, ctx: StepContext, batch: Batch) -> None:
        for piece in ctx.pieces(batch):
            shared = {name: ctx.forward(name, piece.inputs, through=through) for name, through in ctx.sources.items()}
            for name in ctx.trained:
                own = shared[name] if name in shared else ctx.forward(name, piece.inputs)
                ctx.backward(name, ctx.loss(name, own, shared, piece))
        for name in ctx.trained:
            ctx.apply(name)
