"""What is said about wrong arguments of the losses, which back end a call gets, and the modules."""

import subprocess
import sys

import pytest
import torch
from losses_table import both_losses, every_backend, every_mode, needs_compiled, run

from kdcore.losses import DKDLoss, KDLoss, available_backends, dkd_loss, kd_loss


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), 2 * teacher, torch.tensor([0, 1, 2, 3, 0, 1])


# errors


@every_backend
@both_losses
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"student": torch.zeros(6)}, ValueError, r"student has shape \(6,\)"),
        ({"student": torch.zeros(6, 1), "teacher": torch.zeros(6, 1)}, ValueError, "student has C=1"),
        ({"student": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "student is torch.int64"),
        ({"student": [[0.0, 1.0]]}, TypeError, "student is list"),
        ({"teacher": torch.zeros(6, 5)}, ValueError, r"teacher has shape \(6, 5\), student \(6, 4\)"),
        ({"teacher": torch.zeros(6, 4).half()}, TypeError, r"teacher is torch.float16.*teacher.to\(student.dtype\)"),
        ({"teacher": None}, TypeError, "teacher is NoneType"),
        ({"teacher": torch.zeros(6, 4, device="meta")}, ValueError, "teacher is on meta"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target has shape \(5,\).*\[6\]"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, TypeError, "target is torch.int32"),
        ({"target": torch.zeros(6, 3)}, ValueError, r"target has shape \(6, 3\)"),
        ({"target": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "Pass probabilities"),
        ({"target": "student"}, TypeError, "target is 'student'"),
        ({"target": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "target is on meta"),
        ({"target": None, "ce_weight": 0.5}, ValueError, "target is None"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 is not above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan is not finite"),
        ({"temperature": torch.ones(6)}, ValueError, r"temperature has shape \(6,\)"),
        ({"kd_weight": float("inf")}, ValueError, "kd_weight=inf is not finite"),
        ({"ce_weight": torch.ones(6)}, ValueError, r"ce_weight has shape \(6,\)"),
        ({"normalize": "batch"}, ValueError, "normalize='batch' is unknown"),
        ({"eps": 0.0}, ValueError, "eps=0.0 is not above 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5"),
        ({"reduction": "batchmean"}, ValueError, "reduction='batchmean' is unknown"),
        ({"stats": "running"}, ValueError, "stats='running' is unknown"),
        ({"stats": "detached"}, ValueError, 'stats has no meaning with normalize="none"'),
        ({"normalize": "class", "stats": (torch.zeros(4),)}, ValueError, "stats must be"),
        ({"normalize": "class", "stats": (torch.zeros(3),) * 4}, ValueError, r"four tensors of shape \(4,\)"),
        ({"group": object()}, TypeError, "Pass a torch.distributed.ProcessGroup"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_pass(backend, loss, change, error, text):
    good = {"student": torch.zeros(6, 4), "teacher": torch.zeros(6, 4), "target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        loss(**{**good, "backend": backend, **change})


@every_backend
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": None}, 'target="teacher"'),
        ({"alpha": torch.ones(6)}, "alpha has shape"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": torch.ones(5)}, "beta has shape"),
        ({"beta": float("inf")}, "beta=inf"),
    ],
)
def test_a_wrong_argument_of_dkd_is_named_with_what_to_pass(backend, change, text):
    good = {"target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=text):
        dkd_loss(torch.zeros(6, 4), torch.zeros(6, 4), backend=backend, **{**good, **change})


# back ends


@both_losses
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_back_end_that_is_not_installed_says_what_to_use(pair, loss, backend):
    if backend in available_backends():
        pytest.skip(f"{backend} is installed")
    with pytest.raises(RuntimeError, match=f"backend='{backend}' needs the compiled op"):
        loss(*pair, backend=backend)


@both_losses
@every_mode
def test_auto_is_the_best_back_end_and_all_agree(pair, loss, mode):
    assert available_backends()[-1] == "reference"
    on_cpu = [name for name in available_backends() if name != "cuda"]
    value, grad, parts = run(loss, *pair, normalize=mode, ce_weight=0.5)
    best = run(loss, *pair, normalize=mode, ce_weight=0.5, backend=on_cpu[0])
    assert value == best[0]
    assert torch.equal(grad, best[1])
    for backend in on_cpu:
        torch.testing.assert_close(
            run(loss, *pair, normalize=mode, ce_weight=0.5, backend=backend), (value, grad, parts)
        )


def wants_grad(number):
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


UNFUSED = {
    "teacher_grad": lambda: {"teacher_grad": True},
    "temperature": lambda: {"temperature": wants_grad(2.0)},
    "kd_weight": lambda: {"kd_weight": wants_grad(2.0)},
    "ce_weight": lambda: {"ce_weight": wants_grad(2.0)},
    "alpha": lambda: {"alpha": wants_grad(2.0)},
    "beta": lambda: {"beta": wants_grad([2.0] * 6)},
    "stats": lambda: {"normalize": "class", "stats": tuple(wants_grad([1.0 + i] * 4) for i in range(4))},
}


@pytest.mark.parametrize("name", UNFUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_compiled_op_cannot_do_goes_to_the_reference(pair, name, reduction):
    student, teacher, target = pair
    teacher.requires_grad_()
    found = {}
    for backend in ("auto", "reference"):
        change = UNFUSED[name]()
        value = dkd_loss(student, teacher, target, reduction=reduction, **change, backend=backend)
        leaves = [student, *(x for part in change.values() for x in (part if isinstance(part, tuple) else (part,)))]
        leaves = [x for x in leaves if isinstance(x, torch.Tensor)] + [teacher] * (name == "teacher_grad")
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=name == "stats")
        assert all(grad is not None for grad in grads[:3])
        found[backend] = (value, *(grad for grad in grads if grad is not None))
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


@needs_compiled
@pytest.mark.parametrize("name", UNFUSED)
def test_what_the_compiled_op_cannot_do_is_refused_by_name_where_it_was_asked_for(pair, name):
    student, teacher, target = pair
    with pytest.raises((RuntimeError, ValueError), match=rf"(?s){name}.*(reference|auto)"):
        dkd_loss(student, teacher.requires_grad_(), target, **UNFUSED[name](), backend="cpu")


@needs_compiled
@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_second_derivative_of_the_compiled_op_says_that_the_reference_has_it(pair, loss, mode, reduction, backend):
    student, teacher, target = pair
    value = loss(student, teacher, target, normalize=mode, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(torch.autograd.grad(value, student, create_graph=True)[0].square().sum(), student)


# modules and imports


@pytest.mark.parametrize(("module", "function"), [(KDLoss, kd_loss), (DKDLoss, dkd_loss)])
def test_a_module_is_its_function(pair, module, function):
    settings = {"temperature": 2.0, "normalize": "class", "ce_weight": 0.5, "return_parts": True}
    torch.testing.assert_close(module(**settings)(*pair), function(*pair, **settings))
    torch.testing.assert_close(module()(*pair), function(*pair))


def test_a_module_shows_what_differs_from_the_defaults():
    assert repr(DKDLoss(temperature=2.0, alpha=1.0, beta=4.0)) == "DKDLoss(beta=4.0, temperature=2.0)"


def test_a_module_refuses_an_unknown_setting():
    with pytest.raises(TypeError, match="KDLoss has no setting 'beta'"):
        KDLoss(beta=8.0)


def test_a_modules_settings_may_be_scheduled_or_learned(pair):
    module = KDLoss(temperature=torch.nn.Parameter(torch.tensor(2.0)))
    assert list(dict(module.named_parameters())) == ["temperature"]
    module(*pair).backward()
    assert module.temperature.grad.abs() > 0
    module.kd_weight = 0.0
    assert module(*pair) == 0


def test_options_and_the_package_are_imported_without_torch():
    code = (
        "import sys, kdcore.losses, kdcore.losses.options; assert 'torch' not in sys.modules; print(dir(kdcore.losses))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "kd_loss" in out
