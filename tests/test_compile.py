"""Models by torch.compile: they learn the same but for rounding, and go on as they began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, die_at_step_30, make_run, weights
from torch._inductor.utils import run_and_get_code

from kdcore.errors import DeviceError
from kdcore.plan import Member
from kdcore.training.session import open_session

TAPPED = {
    **RECIPE,
    "teacher": {"model": "cnn", "size": 1},
    "student": {"model": "cnn", "size": 1},
    "objective": [
        {"loss": "cross_entropy"},
        {"loss": "fitnet", "student": ["pooled"], "teacher": ["pooled"]},
    ],
    "compile": True,
}


@pytest.fixture(autouse=True, scope="module")
def graphs(tmp_path_factory):
    """Compiled code of this module's own, and nothing of it for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("graphs")))
        patch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)  # 10 s of trying g++ on each of them
        yield
    torch.compiler.reset()


def student(root):
    return load_file(next(root.glob("store/results/*/student.safetensors")))


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.long)])
def test_compiled_members_learn_the_same_but_for_rounding(tmp_path, host, model):
    recipe = {**TAPPED, "teacher": {"model": model, "size": 1}, "student": {"model": model, "size": 1}}
    for name, sets in (("compiled", []), ("eager", ["compile=false"])):
        make_run(tmp_path / name, recipe=recipe, host=host, sets=sets).execute()
    compiled, eager = student(tmp_path / "compiled"), student(tmp_path / "eager")
    assert any(not compiled[name].equal(eager[name]) for name in eager), "else it was not compiled"
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_two_frozen_teachers_of_a_class_are_themselves_with_batch_norms_folded_in(tmp_path, host):
    made = make_run(tmp_path, recipe=TAPPED, host=host)
    stage = made.view.label_only("student", made.view.student)
    frozen = dict.fromkeys(("one", "other"), Member(made.view.teacher))
    job = made.keys.job(replace(stage, members={**stage.members, **frozen}))
    session = open_session(job, host.catalog, made.context.load(stage.data), made.store, lambda event: None, {})
    for name in frozen:
        unlike_at_first(session.learners[name].module, name)
    session.begin_tick()
    images = session.source.batch(0).inputs
    _, code = compiled_forward(session, "student", images)
    if not any("batch_norm" in text and "sqrt" in text for text in code):
        pytest.skip("this torch's code does not show batch norms")
    found = {}
    for name in frozen:
        found[name], code = compiled_forward(session, name, images)
        assert code
        assert not any("batch_norm" in text or "sqrt" in text for text in code)
    for name, logits in found.items():  # after both were compiled
        with torch.no_grad():
            torch.testing.assert_close(logits, session.learners[name].module(images), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(logits, session.context.forward(name, images).logits)
    assert (found["one"] - found["other"]).abs().max() > 0.01


def unlike_at_first(module, name):
    """Other weights and running statistics than those that a model begins with."""
    draw = torch.Generator().manual_seed(len(name))
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_((tensor + 0.2 * torch.rand(tensor.shape, generator=draw)).detach())


def compiled_forward(session, name, images):
    """Logits of a member, and the code that was compiled for them."""
    session.meet(len(images))
    outputs, code = run_and_get_code(lambda: session.context.forward(name, images))
    return outputs.logits.detach(), code


def test_compile_is_part_of_a_key_and_its_absence_is_not(tmp_path, host):
    compiled, eager = (make_run(tmp_path, recipe=TAPPED, host=host, sets=s).settings for s in ([], ["compile=false"]))
    assert compiled.numerics == {**eager.numerics, "compile": True}


@pytest.mark.long
def test_a_compiled_run_goes_on_bit_exact(tmp_path, host):
    recipe = {**TAPPED, "train": {"epochs": 4}, "execute": {"log_every": 5, "checkpoint_seconds": 0}}
    make_run(tmp_path / "whole", recipe=recipe, host=host).execute()
    die_at_step_30(make_run(tmp_path / "killed", recipe=recipe, host=host))
    make_run(tmp_path / "killed", recipe=recipe, host=host).execute()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.fixture
def sizes(monkeypatch):
    """Batches that a trained member's compiled code runs, which is none here."""
    found = set()

    def uncompiled(learner):
        def call(inputs):
            found.update([len(inputs)] if learner.module.training else [])
            return learner.module(inputs)

        return call

    monkeypatch.setattr("kdcore.training.session.compile_member", uncompiled)
    return found


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([], {128}),
        (["train.accumulate=3"], {43, 42}),
        (["data.transforms=[{name='views', strong=['flip']}]"], {256}),
        (["data.batch_size=4000"], {1295}),
    ],
)
def test_all_pieces_of_full_batches_are_compiled_and_no_ragged_ones(tmp_path, host, sizes, sets, expected):
    make_run(tmp_path, recipe={**RECIPE, "compile": True}, host=host, sets=["train.epochs=1", *sets]).execute()
    assert sizes == expected


def test_a_run_that_goes_on_at_a_ragged_batch_compiles_what_it_began_with(tmp_path, host, sizes):
    """Of 10 steps an epoch the last has 125 samples; it goes on at step 29."""
    recipe = {**RECIPE, "compile": True, "execute": {"log_every": 1, "checkpoint_seconds": 1e-4}}
    sets = ["data.batch_size=130", "train.epochs=4", "train.accumulate=2", "train.teacher.epochs=1"]
    made = [make_run(tmp_path, recipe=recipe, host=host, sets=sets) for _ in range(2)]
    die_at_step_30(made[0])
    sizes.clear()
    made[1].execute()
    assert made[1].console.kinds("stage_started")[-1]["step"] == 29
    assert sizes == {65}


def test_more_graphs_than_a_stage_may_have_are_told(tmp_path, host, monkeypatch):
    def beyond(*inputs):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

    monkeypatch.setattr(torch, "compile", lambda module, **settings: beyond)
    with pytest.raises(DeviceError, match=r"torch.compile failed on .*: recompile_limit reached. Leave compile out"):
        make_run(tmp_path, recipe=TAPPED, host=host).execute()


def test_a_machine_without_a_compiler_is_told(tmp_path, host, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    torch.compiler.reset()
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",)})
    with (
        nowhere,
        pytest.raises(DeviceError, match=r"torch.compile failed on .*Leave compile out; on a CPU it wants a C\+\+"),
    ):
        make_run(tmp_path, recipe=TAPPED, host=host).execute()
