"""The hypothesis strategies of the kit draw what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from kdcore.codec import decode, digest, encode
from kdcore.job import Settings
from kdcore.keys import Keys, in_order
from kdcore.losses import dkd_loss, kd_loss
from kdcore.plan import check_stage
from kdcore.plugins import load_plugins
from kdcore.testing.strategies import labels, logits, plans

CATALOG = load_plugins().catalog


@given(st.data())
def test_any_logits_and_labels_give_finite_losses_and_gradients(data):
    rows, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9))
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))]
    student, teacher = (data.draw(logits(rows, classes, dtypes=dtypes)) for _ in range(2))
    target = data.draw(labels(rows, classes, ignore_index=-100))
    student.requires_grad_()
    total = kd_loss(student, teacher, target, ce_weight=1.0) + dkd_loss(student, teacher, target)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()


@given(logits(rows=4, classes=st.integers(2, 5), masked=True))
def test_a_mask_leaves_every_row_a_class(drawn):
    assert drawn.shape[0] == 4
    assert torch.isfinite(drawn).any(1).all()
    assert not torch.isnan(drawn).any()


@pytest.mark.parametrize(
    "holds",
    [
        lambda x: x.abs().max() > 1e4,
        lambda x: x.shape[0] > 1 and (x == x[0]).all(0).any(),
        lambda x: (x[:, 0] == x[:, -1]).all(),
        lambda x: x.isneginf().any(),
    ],
    ids=["large", "constant column", "ties", "masked"],
)
def test_logits_draws_the_cases_that_losses_fail_at(holds):
    find(logits(masked=True), lambda x: bool(holds(x)), settings=settings(max_examples=500, database=None))


@settings(max_examples=50)
@given(plans())
def test_a_plan_is_sound_json_whose_stages_come_after_their_inputs(stages):
    known = {}

    def key(stage):
        return known.setdefault(stage, digest(encode(stage, key)))

    for stage in stages:
        check_stage(stage)
        data = encode(stage, key)
        assert encode(decode(stage.name, data), key) == data
    keys = Keys(CATALOG, 0, Settings("", "cpu", 1), lambda spec: "data")
    ordered = [keys.of(stage) for stage in in_order(stages[-1:], keys)]
    assert len(set(ordered)) == len(ordered)
    for stage in stages:
        inputs = [keys.of(ref.stage) for ref in stage.inputs()]
        own = keys.of(stage)
        assert all(ordered.index(one) < ordered.index(own) for one in inputs if own in ordered)
