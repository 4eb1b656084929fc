"""The objective of a learner: its live terms, as one loss call where the loss can take cross-entropy along."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..data import Batch
from ..errors import KdError, PluginError
from ..losses.terms import CrossEntropy
from ..outputs import Outputs
from .member import LiveTerm


def weighted_loss(
    terms: list[LiveTerm],
    own: Outputs,
    others: Mapping[str, Outputs],
    batch: Batch,
    record: Callable[[str, Tensor], None],
) -> Tensor:
    """The weighted sum of the terms, 0-d.

    Args:
        terms: the live terms, at least one.
        own: the learner's outputs.
        others: outputs of the members that the terms name.
        batch: the batch.
        record: called with each term's label and its unweighted value.
    """
    pair = _fusible(terms)
    total = None if pair is None else _fused(*pair, own, others, batch, record)
    for term in terms:
        if pair is None or term not in pair:
            value = single_loss(term, own, others, batch)
            record(term.label, value)
            total = term.weight * value if total is None else total + term.weight * value
    assert total is not None, "a live learner has a live term"
    return total


def _fusible(terms: list[LiveTerm]) -> tuple[LiveTerm, LiveTerm] | None:
    """Cross-entropy and one term that computes it in the same passes over the logits."""
    entropy = [term for term in terms if isinstance(term.module, CrossEntropy)]
    takers = [term for term in terms if hasattr(term.module, "with_cross_entropy")]
    return (entropy[0], takers[0]) if len(entropy) == 1 and takers else None


def _fused(
    entropy: LiveTerm,
    term: LiveTerm,
    own: Outputs,
    others: Mapping[str, Outputs],
    batch: Batch,
    record: Callable[[str, Tensor], None],
) -> Tensor:
    total: Tensor
    source = source_of(term, others)
    try:
        total, parts = term.module.with_cross_entropy(  # type: ignore[operator]
            own,
            source,
            batch,
            weight=term.weight,
            ce_weight=entropy.weight,
            label_smoothing=entropy.module.label_smoothing,
        )
    except Exception as error:
        _note_shapes(error, term, own, source)
        raise
    record(entropy.label, parts["ce"])
    record(term.label, parts["kd"])
    return total


def single_loss(term: LiveTerm, own: Outputs, others: Mapping[str, Outputs], batch: Batch) -> Tensor:
    """The unweighted value of one term, 0-d.

    Raises:
        PluginError: the loss gave something else.
    """
    source = source_of(term, others)
    try:
        value = term.module(own, source, batch)
    except Exception as error:
        _note_shapes(error, term, own, source)
        raise
    if isinstance(value, dict):
        value = sum(value.values())
    if not isinstance(value, Tensor) or value.ndim:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PluginError(f"gave {shape}", where=f"loss {term.spec.loss!r}", fix="It must return a 0-d tensor.")
    return value


def _note_shapes(error: Exception, term: LiveTerm, own: Outputs, source: Outputs | None) -> None:
    """Says what a loss was given that raised."""
    given = f"student: {_shapes(own)}" + (f"; teacher: {_shapes(source)}" if source is not None else "")
    if not isinstance(error, KdError):
        error.add_note(f"loss {term.spec.loss!r} was given {given}")


def _shapes(outputs: Outputs) -> str:
    named = {"logits": outputs.logits, **outputs.taps}
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())


def source_of(term: LiveTerm, others: Mapping[str, Outputs]) -> Outputs | None:
    """What a term learns from, cut off the graph unless the term asks for the path through it."""
    if term.source is None:
        return None
    source = others[term.source]
    if term.spec.through:
        return source
    return Outputs(source.logits.detach(), {name: tap.detach() for name, tap in source.taps.items()})
