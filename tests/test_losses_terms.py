"""The losses that a recipe names."""

from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError

import kdcore.losses
from kdcore.errors import RecipeError
from kdcore.losses import dkd_loss, kd_loss
from kdcore.losses.functional import cross_entropy
from kdcore.losses.options import CrossEntropyOptions, DKDOptions, KDOptions
from kdcore.losses.terms import DKD, KD, CrossEntropy
from kdcore.options import validate
from kdcore.outputs import Outputs, Shapes

SHAPES = Shapes(classes=4, samples=100)
both_terms = pytest.mark.parametrize("term", [KD, DKD])


@dataclass(frozen=True)
class Labelled:
    target: torch.Tensor | None


@pytest.fixture
def batch():
    return Labelled(torch.tensor([0, 1, 2, 3, 0]))


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 4, generator=generator) for _ in range(2))
    return Outputs(student.requires_grad_()), Outputs(teacher.requires_grad_())


def build(term, **options):
    kind = {KD: KDOptions, DKD: DKDOptions, CrossEntropy: CrossEntropyOptions}[term]
    return term.build(SHAPES, kind(**options))


def test_terms_are_the_functions_at_their_defaults(outputs, batch):
    logits = [out.logits for out in outputs]
    assert build(KD)(*outputs, batch) == kd_loss(*logits)
    assert build(DKD)(*outputs, batch) == dkd_loss(*logits, batch.target)
    assert build(CrossEntropy)(outputs[0], None, batch) == cross_entropy(logits[0], batch.target)


def test_options_reach_the_functions_and_are_attributes_that_a_knob_may_set(outputs, batch):
    logits = [out.logits for out in outputs]
    term = build(DKD, temperature=2.0, normalize="class", eps=1e-3, alpha=0.5, beta=4.0)
    expected = dkd_loss(*logits, batch.target, temperature=2.0, normalize="class", eps=1e-3, alpha=0.5, beta=4.0)
    assert term(*outputs, batch) == expected
    term.temperature, term.beta = 3.0, 1.0
    assert term(*outputs, batch) != expected
    smooth = build(CrossEntropy, label_smoothing=0.1)
    smooth.label_smoothing = 0.2
    assert smooth(outputs[0], None, batch) == cross_entropy(logits[0], batch.target, label_smoothing=0.2)


@both_terms
def test_one_call_is_the_sum_of_both_terms(term, outputs, batch):
    term, ce = build(term), build(CrossEntropy, label_smoothing=0.1)
    total, parts = term.with_cross_entropy(*outputs, batch, weight=3.0, ce_weight=0.5, label_smoothing=0.1)
    kd_value, ce_value = term(*outputs, batch), ce(*outputs, batch)
    torch.testing.assert_close(total, 3.0 * kd_value + 0.5 * ce_value)
    assert parts.keys() == {"kd", "ce"}
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(parts, {"kd": kd_value.detach(), "ce": ce_value.detach()})


def test_kd_works_on_unlabelled_batches_unless_cross_entropy_is_asked_for(outputs):
    unlabelled, term = Labelled(None), build(KD)
    total, parts = term.with_cross_entropy(*outputs, unlabelled, weight=2.0, ce_weight=0.0, label_smoothing=0.0)
    assert total == 2 * term(*outputs, unlabelled)
    assert parts.keys() == {"kd"}
    with pytest.raises(ValueError, match="target is None"):
        term.with_cross_entropy(*outputs, unlabelled, weight=2.0, ce_weight=1.0, label_smoothing=0.0)
    for needs_labels in (build(DKD), build(CrossEntropy)):
        with pytest.raises(ValueError, match="target is None"):
            needs_labels(*outputs, unlabelled)


@both_terms
def test_the_gradient_goes_through_the_teacher_only_where_the_framework_says_so(term, outputs, batch):
    term = build(term)
    teacher = outputs[1].logits
    assert torch.autograd.grad(term(*outputs, batch), teacher, allow_unused=True) == (None,)
    term.teacher_grad = True
    (grad,) = torch.autograd.grad(term(*outputs, batch), teacher)
    assert grad.abs().max() > 0


@both_terms
def test_a_teacher_kept_in_half_precision_is_widened(term, outputs, batch):
    student, teacher = outputs[0], Outputs(outputs[1].logits.detach().half())
    term = build(term)
    assert term(student, teacher, batch) == term(student, Outputs(teacher.logits.float()), batch)


@both_terms
def test_a_term_without_a_source_says_so(term, outputs, batch):
    with pytest.raises(ValueError, match="Give its term a source"):
        build(term)(outputs[0], None, batch)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (KDOptions, {"temperature": 0}, "Write a temperature above 0."),
        (KDOptions, {"normalize": "batch"}, 'Write one of "none", "class" and "instance".'),
        (KDOptions, {"eps": 0}, "Write an eps above 0"),
        (KDOptions, {"beta": 8}, "unknown key"),
        (DKDOptions, {"alpha": -1}, "Write a weight of the target part, 0 or more."),
        (DKDOptions, {"beta": float("inf")}, "Write a weight of the other classes, 0 or more."),
        (CrossEntropyOptions, {"label_smoothing": 2}, "Write a label smoothing between 0 and 1."),
    ],
)
def test_a_wrong_option_says_what_to_write(kind, options, text):
    with pytest.raises(RecipeError, match=text):
        validate(kind, options)


def test_options_are_frozen_and_have_the_papers_defaults():
    assert DKDOptions().model_dump() == {"temperature": 4, "normalize": "none", "eps": None, "alpha": 1, "beta": 8}
    with pytest.raises(ValidationError):
        KDOptions().temperature = 2.0


def test_terms_say_what_they_need():
    assert KD.needs == {"logits"}
    assert DKD.needs == CrossEntropy.needs == {"logits", "target"}


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="kl_loss"):
        kdcore.losses.kl_loss  # noqa: B018
