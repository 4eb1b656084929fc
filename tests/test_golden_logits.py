"""The further losses on logits give the numbers of public code (tests/golden/README.md), and stay finite where it does
not.
"""

import numpy as np
import pytest
import torch
from golden_cases import check_float64, load
from kdcore_features.dist import Dist, dist_loss
from kdcore_features.mlkd import MLKD, at_most_median, batch_level, class_level, instance_level, mlkd_loss
from kdcore_features.nkd import nkd_loss
from kdcore_features.normkd import normkd_dkd_loss, normkd_loss
from kdcore_features.options import DistOptions, MLKDOptions

import kdcore
from kdcore.losses import kd_loss

# The public losses in the product's terms: each source has its own names of the hyper-parameters.


def dist(case, s, t):
    """Logits of every pixel are rows; without a temperature where the source has none."""
    hp = case["hp"]
    s, t = (z if z.dim() == 2 else z.movedim(1, -1).flatten(0, -2) for z in (s, t))
    return dist_loss(s, t, hp["beta"], hp["gamma"], hp.get("tau", 1.0))


def nkd(case, s, t):
    return nkd_loss(s, t, torch.from_numpy(case["target"]), case["hp"]["temp"], case["hp"]["gamma"])


def normkd(case, s, t):
    return normkd_loss(s, t, case["hp"]["T_norm"])


def normkd_dkd(case, s, t):
    hp = case["hp"]
    return normkd_dkd_loss(s, t, torch.from_numpy(case["target"]), hp["T_norm"], hp["alpha"], hp["beta"])


def by_batch(case, s, t):
    return batch_level(s, t, case["hp"]["T"])


def by_class(case, s, t):
    return class_level(s, t, case["hp"]["T"])


PUBLIC = {
    "dist__dist_cls": dist,
    "dist__dist_seg": dist,
    "clskd__nkd": nkd,
    "normkd__normkd": normkd,
    "normkd__normkd_dkd": normkd_dkd,
    "mlld__bc": by_batch,
    "mlld__cc": by_class,
}
CASES = [pytest.param(name, case, id=f"{name}-{head}") for name in PUBLIC for head, case in load(name).items()]
VIEWS = [
    pytest.param(case, id=f"{name}-{head}")
    for name in ("mlld__mlkd", "logitstd__mlkd")
    for head, case in load(name).items()
]


def tensor(case, key, dtype):
    return torch.from_numpy(case[key]).to(dtype)


def run(name, case, dtype):
    student = tensor(case, "student", dtype).requires_grad_()
    loss = PUBLIC[name](case, student, tensor(case, "teacher", dtype))
    loss.backward()
    return loss.item(), student.grad.double().numpy()


def is_within_float32(found, case, key="grad_student"):
    bar = 5e-6 * np.abs(case[key]).max() + 1e-9
    return np.abs(found - case[key]).max() <= max(bar, case["grad_student_f32_maxabserr"])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float64_gives_the_public_loss_and_gradient(name, case):
    loss, grad = run(name, case, torch.float64)
    assert loss == pytest.approx(case["loss"].item(), rel=1e-10, abs=1e-12)
    check_float64(grad, case)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float32_is_as_good_as_the_public_float32(name, case):
    loss, grad = run(name, case, torch.float32)
    assert loss == pytest.approx(case["loss"].item(), rel=1e-5, abs=1e-6)
    assert is_within_float32(grad, case)


def public_mlkd(case, weak, strong, t_weak, t_strong):
    """With its slips: the masks are shares and not choices, and "strong" at T = 2 and 6 is the weak view."""
    hp, target = case["hp"], torch.from_numpy(case["target"])
    normalize = "instance" if hp.get("logit_stand") else "none"
    p = t_weak.softmax(1)
    rows, classes = at_most_median(p.amax(1)).mean(), at_most_median(p.sum(0)).mean()
    every = (hp["T"], 3.0, 5.0, 2.0, 6.0)

    def instances(s, t, temperatures):
        return instance_level(s, t, temperatures, normalize)

    hard = {"kd_weight": 0.0, "ce_weight": hp["ce_weight"]}
    kd = rows * instances(weak, t_weak, every) + instances(strong, t_strong, every[:3])
    return {
        "ce": sum(kd_loss(s, t, target, **hard) for s, t in ((weak, t_weak), (strong, t_strong))),
        "kd": hp["kd_weight"] * (kd + instances(weak, t_weak, every[3:])),
        "cc": hp["kd_weight"] * classes * sum(class_level(weak, t_weak, t) for t in every),
        "bc": hp["kd_weight"] * rows * sum(batch_level(weak, t_weak, t) for t in every),
    }


@pytest.mark.parametrize("case", VIEWS)
def test_the_levels_are_those_of_public_multi_level_distillation(case):
    for dtype in (torch.float64, torch.float32):
        students = [tensor(case, key, dtype).requires_grad_() for key in ("student", "student_strong")]
        found = public_mlkd(case, *students, tensor(case, "teacher_0", dtype), tensor(case, "teacher_1", dtype))
        sum(found.values()).backward()
        close = {"rel": 1e-10, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-5, "abs": 1e-6}
        assert sum(found.values()).item() == pytest.approx(case["loss"].item(), **close)
        for key, part in found.items():
            assert part.item() == pytest.approx(case[f"aux_loss_{key}"].item(), **close)
        for student, key in zip(students, ("grad_student", "grad_student_strong"), strict=True):
            grad = student.grad.double().numpy()
            assert is_within_float32(grad, case, key)
            if dtype == torch.float64:
                check_float64(grad, case, key)


def test_only_unsure_samples_and_classes_count():
    s, t = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = t.softmax(1).numpy()
    rows, classes = p.max(1) <= np.quantile(p.max(1), 0.5), p.sum(0) <= np.quantile(p.sum(0), 0.5)
    expected = 0.0
    for temperature in (4, 3):
        p_s, p_t = ((z / temperature).softmax(1).numpy() for z in (s, t))
        divergence = temperature**2 * (p_t * np.log(p_t / p_s)).sum(1)
        by_sample, by_class = (p_t @ p_t.T - p_s @ p_s.T) ** 2, (p_t.T @ p_t - p_s.T @ p_s) ** 2
        expected += divergence[rows].sum() / 7 + by_sample[rows].sum() / 7 + by_class[classes].sum() / 5
    assert mlkd_loss(s, t, (4.0, 3.0)).item() == pytest.approx(expected, rel=1e-12)


def test_two_views_are_the_halves_of_the_batch_and_the_strong_one_counts_by_instance_alone():
    s, t = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = MLKD(MLKDOptions(views=2, beside=(3.0,), normalize="instance"))
    found = module(kdcore.Outputs(s), kdcore.Outputs(t), None)
    weakly = mlkd_loss(s[:4], t[:4], (4.0, 3.0), "instance")
    assert found == weakly + instance_level(s[4:], t[4:], (4.0, 3.0), "instance")
    with pytest.raises(ValueError, match=r'not 7 together\. Name the transform "views"'):
        module(kdcore.Outputs(s[:7]), kdcore.Outputs(t[:7]), None)


def test_samples_that_are_compared_with_each_other_are_not_to_be_cut():
    assert (Dist(DistOptions()).min_batch, Dist(DistOptions()).mean_over_batch) == (2, False)
    assert (Dist(DistOptions(gamma=0)).min_batch, Dist(DistOptions(gamma=0)).mean_over_batch) == (1, True)
    assert not MLKD(MLKDOptions()).mean_over_batch


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_papers_dist_has_no_squared_temperature(temperature):
    s, t = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    public, paper = (dist_loss(s, t, temperature=temperature, variant=variant) for variant in ("public", "paper"))
    torch.testing.assert_close(public, temperature**2 * paper)


# ---------------------------------------------------------------- what public code does not survive

EVERY = {
    "dist": dist_loss,
    "nkd": lambda s, t: nkd_loss(s, t, torch.tensor([0, 1, 2, 3])),
    "normkd": normkd_loss,
    "normkd_dkd": lambda s, t: normkd_dkd_loss(s, t, torch.tensor([0, 1, 2, 3])),
    "mlkd": mlkd_loss,
    "mlkd of standardised": lambda s, t: mlkd_loss(s, t, normalize="instance"),
}


@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.parametrize("name", EVERY)
def test_constant_rows_give_a_finite_value_and_gradient(name, value, constant):
    s, t = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    for side in {"student": [s], "teacher": [t], "both": [s, t]}[constant]:
        side[1] = value
    s.requires_grad_()
    loss = EVERY[name](s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("gap", [110.0, 1500.0, 1e4])
@pytest.mark.parametrize("name", EVERY)
def test_a_target_that_stands_out_gives_a_finite_value_and_gradient(name, gap):
    for side in (0, 1):
        pair = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
        pair[side].diagonal().add_(gap)
        s = pair[0].requires_grad_()
        loss = EVERY[name](s, pair[1])
        loss.backward()
        assert loss.isfinite()
        assert s.grad.isfinite().all()


def test_a_constant_student_row_is_taught_by_normkd_no_harder_than_others():
    s, t = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    s[1] = 0.1
    s.requires_grad_()
    normkd_loss(s, t).backward()
    sizes = s.grad.norm(dim=1)
    assert 0 < sizes[1] < 10 * sizes.median()
