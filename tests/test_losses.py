"""What the arguments of the losses mean, and what is said about wrong ones."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kdcore.losses import DKDLoss, KDLoss, available_backends, dkd_loss, kd_loss
from kdcore.losses.functional import cross_entropy
from kdcore.losses.normalise import class_statistics

both_losses = pytest.mark.parametrize("loss", [kd_loss, dkd_loss])
every_mode = pytest.mark.parametrize("mode", ["none", "class", "instance"])


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), 2 * teacher, torch.tensor([0, 1, 2, 3, 0, 1])


def gradient(loss, student):
    return torch.autograd.grad(loss.sum(), student)[0]


# labels


@both_losses
@every_mode
@pytest.mark.parametrize("junk", [7.0, float("nan"), float("inf")])
def test_ignored_rows_leave_loss_gradient_and_statistics(pair, loss, mode, junk):
    student, teacher, target = pair
    settings = {"normalize": mode, "ce_weight": 0.5, "label_smoothing": 0.1}
    keep = torch.tensor([True, False, True, True, False, True])
    dirty = student.detach().clone()
    dirty[~keep] = junk
    dirty.requires_grad_()
    value, parts = loss(dirty, teacher, target.where(keep, -100), return_parts=True, **settings)
    alone, alone_parts = loss(student[keep], teacher[keep], target[keep], return_parts=True, **settings)
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(parts, alone_parts)
    grad = gradient(value, dirty)
    torch.testing.assert_close(grad[keep], gradient(alone, student)[keep])
    assert (grad[~keep] == 0).all()
    rows = loss(dirty, teacher, target.where(keep, -100), reduction="none", **settings)
    assert (rows[~keep] == 0).all()


@both_losses
@every_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_a_row_that_counts_gives_zero_loss_and_zero_gradient(pair, loss, mode, reduction):
    student, teacher, target = pair
    settings = {"normalize": mode, "ce_weight": 1.0, "reduction": reduction}
    for s, t, y in ((student, teacher, torch.full_like(target, -100)), (student[:0], teacher[:0], target[:0])):
        value = loss(s, t, y, **settings)
        assert (value == 0).all()
        assert (gradient(value, student) == 0).all()


def test_another_ignore_index_is_a_class_label_no_more(pair):
    student, teacher, target = pair
    rows = kd_loss(student, teacher, target, ignore_index=1, reduction="none")
    assert ((rows == 0) == (target == 1)).all()


@both_losses
def test_soft_labels_of_one_class_are_hard_labels(pair, loss):
    student, teacher, target = pair
    settings = {"ce_weight": 0.5, "label_smoothing": 0.2}
    hard = loss(student, teacher, target, **settings)
    torch.testing.assert_close(loss(student, teacher, F.one_hot(target, 4).double(), **settings), hard)


def test_soft_labels_take_their_argmax_for_dkd_and_the_row_for_cross_entropy(pair):
    student, teacher, target = pair
    soft = 0.7 * F.one_hot(target, 4) + 0.3 * F.one_hot((target + 1) % 4, 4)
    _, parts = dkd_loss(student, teacher, soft.double(), return_parts=True)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(student, soft.double()).detach())
    torch.testing.assert_close(parts["kd"], dkd_loss(student, teacher, target).detach())


@both_losses
def test_target_teacher_is_the_teachers_argmax(pair, loss):
    student, teacher, _ = pair
    settings = {"ce_weight": 0.5, "normalize": "class"}
    expected = loss(student, teacher, teacher.argmax(1), **settings)
    assert loss(student, teacher, "teacher", **settings) == expected


def test_kd_needs_no_target(pair):
    student, teacher, target = pair
    value, parts = kd_loss(student, teacher, return_parts=True)
    assert value == kd_loss(student, teacher, target)
    assert parts.keys() == {"kd"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_torchs(pair, smoothing, reduction, soft):
    student, teacher, target = pair
    target = teacher.softmax(1) if soft else target.index_fill(0, torch.tensor([2]), -100)
    settings = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(student, target, **settings)
    torch.testing.assert_close(cross_entropy(student, target, **settings), expected)
    whole = kd_loss(student, teacher, target, kd_weight=0.0, ce_weight=1.0, **settings)
    torch.testing.assert_close(whole, expected)


# weights, parts and reductions


def test_the_mean_is_over_rows_not_over_elements(pair):
    student, teacher, target = pair
    for loss in (kd_loss, dkd_loss):
        rows = loss(student, teacher, target, ce_weight=0.5, reduction="none")
        assert rows.shape == (6,)
        torch.testing.assert_close(loss(student, teacher, target, ce_weight=0.5), rows.mean())
        torch.testing.assert_close(loss(student, teacher, target, ce_weight=0.5, reduction="sum"), rows.sum())


def test_parts_are_unweighted_detached_means_that_add_up(pair):
    student, teacher, target = pair
    settings = {"alpha": 0.5, "beta": 3.0, "kd_weight": 0.7, "ce_weight": 0.2}
    value, parts = dkd_loss(student, teacher, target, reduction="sum", return_parts=True, **settings)
    assert parts.keys() == {"ce", "kd", "tckd", "nckd"}
    assert not any(part.requires_grad or part.dim() for part in parts.values())
    torch.testing.assert_close(parts["kd"], 0.5 * parts["tckd"] + 3.0 * parts["nckd"])
    torch.testing.assert_close(value.detach(), 6 * (0.7 * parts["kd"] + 0.2 * parts["ce"]))
    torch.testing.assert_close(parts["tckd"], dkd_loss(student, teacher, target, alpha=1.0, beta=0.0).detach())


def test_t_squared_keeps_the_size_of_the_gradient(pair):
    student, teacher, _ = pair
    sizes = [gradient(kd_loss(student, teacher, temperature=t), student).norm().item() for t in (50.0, 500.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_may_be_tensors_of_any_dtype_and_do_not_change_the_dtype_of_the_loss(pair, dtype):
    student, teacher, target = (z.to(dtype) if z.is_floating_point() else z for z in pair)
    numbers = {"alpha": 0.5, "beta": 3.0, "kd_weight": 0.75, "ce_weight": 0.25, "temperature": 2.0}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    value = dkd_loss(student, teacher, target, **tensors)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, dkd_loss(student, teacher, target, **numbers))


def test_beta_may_differ_by_row(pair):
    student, teacher, target = pair
    beta = torch.arange(6.0)
    rows = dkd_loss(student, teacher, target, beta=beta, reduction="none")
    for i in range(6):
        alone = dkd_loss(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], beta=float(i), reduction="none")
        torch.testing.assert_close(rows[i : i + 1], alone)


def test_a_learned_temperature_gets_a_gradient(pair):
    student, teacher, _ = pair
    temperature = torch.tensor(3.0, requires_grad=True)
    kd_loss(student, teacher, temperature=temperature).backward()
    assert temperature.grad.abs() > 0


# the teacher and its statistics


@both_losses
@every_mode
def test_the_teacher_gets_no_gradient_unless_asked(pair, loss, mode):
    student, teacher, target = pair
    teacher.requires_grad_()
    value = loss(student, teacher, target, normalize=mode)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)
    kept = loss(student, teacher, target, normalize=mode, teacher_grad=True)
    assert kept == value
    assert gradient(kept, teacher).abs().max() > 0


def test_given_statistics_of_the_teacher_are_detached_with_it(pair):
    student, teacher, _ = pair
    teacher.requires_grad_()
    stats = (*class_statistics(student.detach()), *class_statistics(teacher))
    value = kd_loss(student, teacher, normalize="class", stats=stats)
    assert torch.autograd.grad(value, teacher, allow_unused=True) == (None,)


def test_detached_statistics_give_the_same_loss_and_another_gradient(pair):
    student, teacher, _ = pair
    batch = kd_loss(student, teacher, normalize="class")
    detached = kd_loss(student, teacher, normalize="class", stats="detached")
    assert batch == detached
    assert not torch.allclose(gradient(batch, student), gradient(detached, student))


def test_given_statistics_allow_a_batch_of_one(pair):
    student, teacher, _ = pair
    stats = (*class_statistics(student), *class_statistics(teacher))
    whole = kd_loss(student, teacher, normalize="class", reduction="none")
    one = kd_loss(student[2:3], teacher[2:3], normalize="class", stats=stats, reduction="none")
    torch.testing.assert_close(one, whole[2:3])


def test_class_statistics_are_biased_and_instance_deviation_is_not(pair):
    student, teacher, _ = pair
    h_class = [(z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (student, teacher)]
    h_row = [(z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher)]
    torch.testing.assert_close(kd_loss(student, teacher, normalize="class"), kd_loss(*h_class))
    torch.testing.assert_close(kd_loss(student, teacher, normalize="instance"), kd_loss(*h_row))


# errors


@both_losses
@pytest.mark.parametrize("stats", ["batch", "detached"])
def test_a_batch_of_one_with_class_statistics_names_the_argument(pair, loss, stats):
    student, teacher, target = pair
    with pytest.raises(ValueError, match=r'normalize="class" needs .* at least 2 rows'):
        loss(student[:1], teacher[:1], target[:1], normalize="class", stats=stats)


@both_losses
@pytest.mark.parametrize("label", [4, -1, 10**9])
def test_a_label_outside_the_classes_is_an_index_error(pair, loss, label):
    student, teacher, target = pair
    target[3] = label
    with pytest.raises(IndexError, match=f"target holds {label}, outside the 4 classes"):
        loss(student, teacher, target)
    loss(student, teacher, target, ignore_index=label)


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
        ({"group": object()}, NotImplementedError, "Pass group=None"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_pass(loss, change, error, text):
    good = {"student": torch.zeros(6, 4), "teacher": torch.zeros(6, 4), "target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        loss(**{**good, **change})


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
def test_a_wrong_argument_of_dkd_is_named_with_what_to_pass(change, text):
    good = {"target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(ValueError, match=text):
        dkd_loss(torch.zeros(6, 4), torch.zeros(6, 4), **{**good, **change})


@both_losses
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_back_end_that_is_not_installed_says_what_to_use(pair, loss, backend):
    if backend in available_backends():
        pytest.skip(f"{backend} is installed")
    with pytest.raises(RuntimeError, match=f"backend='{backend}' needs the compiled op"):
        loss(*pair, backend=backend)


@both_losses
def test_auto_and_reference_are_back_ends(pair, loss):
    assert "reference" in available_backends()
    torch.testing.assert_close(loss(*pair, backend="auto"), loss(*pair, backend="reference"))


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
