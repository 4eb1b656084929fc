"""One step: what a kind of step works with, and the default kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import NumericError
from ..options import Options as NoOptions
from ..outputs import Outputs
from ..seeds import derive
from . import device, ledger, memory
from .finite import diverge
from .objective import weighted_loss
from .twice import two_passes
from .world import sum_gradients

if TYPE_CHECKING:
    from .member import Learner
    from .session import Session


class StepContext:
    """What a step sees of its stage.

    ``trained`` are the members with live terms, ``sources`` those that a live term names (with True where a term wants
    the path through them). A step calls :meth:`forward`, :meth:`loss`, :meth:`backward` and :meth:`apply`; loop, order,
    checkpoints and meters stay the framework's. A step class whose batches may be cut where memory is short says
    ``splits = True`` and goes through :meth:`pieces`; one that says ``across = True`` too keeps losses right that look
    across the samples of a batch, where the context's :attr:`across` says that there are such.
    """

    step: int
    trained: tuple[str, ...]
    sources: dict[str, bool]
    across: bool = False
    """True where batches are in pieces and a live term looks across samples."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._calls: dict[str, int] = {}
        self._own, self._whole, self._before, self._share, self._graphs = 1, 1, 0, 1.0, True
        self.step, self.trained, self.sources = 0, (), {}

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self._session.device

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What :meth:`backward` and :meth:`apply` change of a member: its own parameters and its adapters'."""
        return self._session.learners[name].parameters

    @property
    def part(self) -> float:
        """The share of a batch's samples that this process has: 1 but for data parallel training."""
        return self._own / self._whole

    def knob(self, path: str) -> Any:
        """The current value of a knob, e.g. ``data.difficulty``."""
        return self._session.knobs.values[path]

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """The batch in pieces that fit into memory; usually one, the batch itself.

        While a piece is out, :meth:`backward` adds to the gradients of those before it, and it and :meth:`record` count
        the piece by its share of the samples. So a loop over the pieces, with one :meth:`apply` after it, is one update
        by the whole batch, for losses that are means over samples.
        """
        self._before = 0
        for piece in memory.cut(self._session, batch, self.part):
            self._share = self.part * len(piece.inputs) / len(batch.inputs)
            yield piece
            self._before += len(piece.inputs)
        self._before, self._share = 0, self.part

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
        trained = name in self.trained and self._graphs
        images = next((len(x) for x in inputs if isinstance(x, Tensor)), 0)
        learner.passes += self._of_all_ranks(images) * (3 if trained else 1)
        device.seed_dropout(session.device, self.seed(name))
        with session.stopwatch.of(learner), torch.set_grad_enabled(trained or through), session.autocast():
            logits = session.call(learner, *inputs)
        taps = dict(learner.tapped.taps) if learner.tapped is not None else {}
        return Outputs(logits, taps)

    def _of_all_ranks(self, images: int) -> int:
        """Images of a piece on all ranks together, so that the pieces of a batch add up to it, whatever they are."""
        first, last = (count * self._whole // self._own for count in (self._before, self._before + images))
        return last - first

    def source(self, name: str, batch: Batch, *, through: bool = False) -> Outputs:
        """What a member that others learn from gives for a batch: its stored outputs where the stage has a cache of
        them, else :meth:`forward`.
        """
        cached = self._session.learners[name].cached
        if cached is None or through:
            return self.forward(name, batch.inputs, through=through)
        return cached.outputs(batch.index, int(batch.epoch))

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
        if not accumulate and self._before == 0:
            learner.optimizer.zero_grad(set_to_none=True)
        if self._share != 1:
            loss = loss * self._share
        if learner.scaler is not None:
            loss = learner.scaler.scale(loss)
        with self._session.stopwatch.of(learner):
            loss.backward(inputs=learner.parameters)  # type: ignore[no-untyped-call]

    def apply(self, name: str) -> None:
        """Clips, steps the optimizer at the scheduled rate, and moves the average.

        Under ``precision = "float16"`` a step whose gradients are not finite is left out, and counted.
        """
        learner = self._session.learners[name]
        assert learner.optimizer is not None
        spec = learner.spec.optimizer
        scale = self._session.rate(learner)
        for group in learner.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        with self._session.stopwatch.of(learner):
            sum_gradients(self._session.world, learner, self.part)
            if self._update(learner, None if spec is None else spec.clip) and learner.ema is not None:
                learner.ema.update(learner.module)

    def _update(self, learner: Learner, clip: float | None) -> bool:
        assert learner.optimizer is not None
        if learner.scaler is not None:
            where = f"stage {self._session.stage.name!r}, step {self.step}, member {learner.name!r}"
            try:
                return learner.scaler.update(learner.optimizer, learner.parameters, clip, where)
            except NumericError as error:
                diverge(self._session, learner.name, error)
                return False
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(learner.parameters, clip)
        learner.optimizer.step()
        return True

    def record(self, name: str, value: Tensor) -> None:
        """Adds a 0-d tensor to the curve ``member.name``; no sync."""
        self._session.meters.record(name, self.step, value, self._share)

    def seed(self, name: str) -> int:
        """A seed for this member, step and call, whatever else the stage holds."""
        nth = self._calls[name] = self._calls.get(name, 0) + 1
        rank = self._session.world.rank
        return derive(self._session.seed, "dropout", name, self.step, nth, *([rank] if rank else []))

    def generator(self, name: str) -> torch.Generator:
        """A seeded generator for a member's own random numbers, e.g. noise; differs from dropout's at every call."""
        return torch.Generator(self.device).manual_seed(self.seed(f"{name}/noise"))

    def begin(self, step: int, own: int = 1, whole: int = 1) -> None:
        """Called by the loop before each step: this rank has ``own`` of the batch's ``whole`` samples."""
        self.step = step
        self._calls.clear()
        self._own, self._whole, self._before, self._share = own, whole, 0, own / whole
        self._session.meet(whole)


class Distill:
    """Every source once, then forward, objective and backward of each trained member, then all updates; where memory is
    short, all but the updates piece by piece.

    Members that nobody learns from run one after another, so that only one graph is alive at a time.
    """

    Options = NoOptions
    splits = True
    across = True

    def __init__(self, options: NoOptions) -> None:
        pass

    def __call__(self, ctx: StepContext, batch: Batch) -> None:
        if ctx.across:
            two_passes(ctx, batch)
        else:
            self._one_pass(ctx, batch)
        for name in ctx.trained:
            ctx.apply(name)

    def _one_pass(self, ctx: StepContext, batch: Batch) -> None:
        for piece in ctx.pieces(batch):
            shared = {name: ctx.source(name, piece, through=through) for name, through in ctx.sources.items()}
            for name in ctx.trained:
                own = shared[name] if name in shared else ctx.forward(name, piece.inputs)
                ctx.backward(name, ctx.loss(name, own, shared, piece))
