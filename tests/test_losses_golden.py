"""KD and DKD give the numbers of the public code that published tables were made with (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, check_float64, load
from losses_table import on_every_engine

from kdcore.losses import dkd_loss, kd_loss

# The public losses in the product's terms: each source has its own names of the hyper-parameters and its own scale.


def plain_kd(case, s, t, y, **kind):
    return kd_loss(s, t, temperature=case["hp"]["T"], **kind)


def plain_dkd(case, s, t, y, **kind):
    hp = case["hp"]
    return dkd_loss(s, t, y, alpha=hp["alpha"], beta=hp["beta"], temperature=hp["T"], **kind)


def luminet(case, s, t, y, **kind):
    """Scaled by a free alpha^2 instead of T^2."""
    temperature, alpha = case["hp"]["T"], case["hp"]["alpha"]
    return kd_loss(s, t, temperature=temperature, normalize="class", kd_weight=alpha**2 / temperature**2, **kind)


def standardised(loss):
    def call(case, s, t, y, **kind):
        mode = "instance" if case["hp"].get("logit_stand", True) else "none"
        return loss(case, s, t, y, normalize=mode, **kind)

    return call


def cls_kd(case, s, t, y, **kind):
    """The cross-entropy form: KD plus the teacher's entropy, which has no gradient."""
    temperature, alpha = case["hp"]["temp"], case["hp"]["alpha"]
    return alpha * (kd_loss(s, t, temperature=temperature, **kind) + temperature**2 * entropy(t / temperature))


def nkd(case, s, t, y, **kind):
    """Cross-entropy, by row times the teacher's p_y, and NCKD plus the entropy of the teacher's other classes."""
    temperature, gamma = case["hp"]["temp"], case["hp"]["gamma"]
    y = y.argmax(1) if y.dim() == 2 else y
    rows = kd_loss(s, t, y, kd_weight=0.0, ce_weight=1.0, reduction="none", **kind)
    among = dkd_loss(s, t, y, alpha=0.0, beta=1.0, temperature=temperature, **kind)
    others = t[torch.arange(t.shape[1]) != y[:, None]].view(len(t), -1) / temperature
    hit = t.softmax(1).gather(1, y[:, None]).squeeze(1)
    return (hit * rows).mean() + gamma * (among + temperature**2 * entropy(others))


def takd(case, s, t, y, **kind):
    """Its mean over all B C elements makes the distillation term C times smaller."""
    share, temperature = case["hp"]["lambda"], case["hp"]["T"]
    return kd_loss(s, t, y, temperature=temperature, kd_weight=share / s.shape[1], ce_weight=1 - share, **kind)


def norm_kd(case, s, t, y, **kind):
    """A temperature per row, T std(z), is instance normalisation, but each row counts by its teacher's variance."""
    settings = {"temperature": case["hp"]["T_norm"], "normalize": "instance", "eps": 1e-30, "reduction": "none", **kind}
    if "alpha" in case["hp"]:
        rows = dkd_loss(s, t, y, alpha=case["hp"]["alpha"], beta=case["hp"]["beta"], **settings)
    else:
        rows = kd_loss(s, t, **settings)
    return (t.var(1) * rows).mean()


def entropy(z):
    log_p = z.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


PUBLIC = {
    "mdistiller__kd": plain_kd,
    "mdistiller__dkd": plain_dkd,
    "repdistiller__kl": plain_kd,
    "luminet__luminet": luminet,
    "logitstd__kd": standardised(plain_kd),
    "logitstd__ctkd_kd": standardised(plain_kd),
    "logitstd__dkd": standardised(plain_dkd),
    "clskd__kd": cls_kd,
    "clskd__nkd": nkd,
    "takd__kd": takd,
    "normkd__normkd": norm_kd,
    "normkd__normkd_dkd": norm_kd,
}
MULTI_LEVEL = ("logitstd__mlkd", "mlld__mlkd")
CASES = [
    pytest.param(name, case, id=f"{name}-{head}")
    for name in PUBLIC
    for head, case in load(name).items()
    if name != "luminet__luminet" or len(case["student"]) > 1
]
LEVELS = [pytest.param(name, case, id=f"{name}-{head}") for name in MULTI_LEVEL for head, case in load(name).items()]


def run(name, case, dtype, backend):
    student = torch.from_numpy(case["student"]).to(dtype).requires_grad_()
    teacher = torch.from_numpy(case["teacher"]).to(dtype)
    target = torch.from_numpy(case["target"]) if "target" in case else None
    loss = PUBLIC[name](case, student, teacher, target, backend=backend)
    loss.backward()
    return loss.item(), student.grad.double().numpy()


@on_every_engine
@pytest.mark.parametrize(("name", "case"), CASES)
def test_float64_gives_the_public_loss_and_gradient(backend, name, case):
    loss, grad = run(name, case, torch.float64, backend)
    assert loss == pytest.approx(case["loss"].item(), rel=1e-10, abs=1e-12)
    check_float64(grad, case)


@on_every_engine
@pytest.mark.parametrize(("name", "case"), CASES)
def test_float32_is_as_good_as_the_public_float32(backend, name, case):
    loss, grad = run(name, case, torch.float32, backend)
    size = case["teacher"].var(1, ddof=1).max() if PUBLIC[name] is norm_kd else 1  # what it weighs the rows by
    assert loss == pytest.approx(case["loss"].item(), rel=1e-5, abs=1e-6 * size)
    bar = 5e-6 * np.abs(case["grad_student"]).max() + 1e-9
    assert np.abs(grad - case["grad_student"]).max() <= max(bar, case["grad_student_f32_maxabserr"])


@on_every_engine
@pytest.mark.parametrize(("name", "case"), LEVELS)
def test_the_terms_of_multi_level_distillation_are_the_public_ones(backend, name, case):
    """Its own weights and its two terms on Gram matrices stand here; KD and cross-entropy are the product's."""
    hp, target = case["hp"], torch.from_numpy(case["target"])
    weak, strong = (torch.from_numpy(case[key]).requires_grad_() for key in ("student", "student_strong"))
    t, t_strong = (torch.from_numpy(case[f"teacher_{view}"]) for view in (0, 1))
    kind = {"normalize": "instance" if hp.get("logit_stand") else "none", "backend": backend}
    rows, classes = (at_most_median(p) for p in (t.softmax(1).amax(1), t.softmax(1).sum(0)))

    def kd(s, teacher, temperatures):
        return sum(kd_loss(s, teacher, temperature=float(T), kd_weight=hp["kd_weight"], **kind) for T in temperatures)

    every = (hp["T"], 3, 5, 2, 6)
    hard = {"kd_weight": 0.0, "ce_weight": hp["ce_weight"], "backend": backend}
    ce = sum(kd_loss(s, teacher, target, **hard) for s, teacher in ((weak, t), (strong, t_strong)))
    kd = rows * kd(weak, t, every) + kd(strong, t_strong, every[:3]) + kd(weak, t, every[3:])
    grams = [((s / T).softmax(1), (t / T).softmax(1)) for T in every for s in [weak]]
    cc = sum((q.T @ q - p.T @ p).square().sum() / t.shape[1] for p, q in grams) * hp["kd_weight"] * classes
    bc = sum((q @ q.T - p @ p.T).square().sum() / t.shape[0] for p, q in grams) * hp["kd_weight"] * rows
    for key, term in {"ce": ce, "kd": kd, "cc": cc, "bc": bc}.items():
        assert term.item() == pytest.approx(case[f"aux_loss_{key}"].item(), rel=1e-10, abs=1e-12)
    (ce + kd + cc + bc).backward()
    check_float64(weak.grad.numpy(), case)
    check_float64(strong.grad.numpy(), case, "grad_student_strong")


def at_most_median(values):
    return (values <= values.quantile(0.5)).double().mean().item()


@on_every_engine
def test_a_batch_of_one_of_luminet_is_refused_and_not_zero_whatever_it_holds(backend):
    # the public loss is 0 there, whatever the logits are
    alone = [case for case in load("luminet__luminet").values() if len(case["student"]) == 1]
    assert alone
    for case in alone:
        with pytest.raises(ValueError, match='normalize="class"'):
            run("luminet__luminet", case, torch.float64, backend)


def test_every_golden_file_is_read_and_small():
    files = sorted(GOLDEN.glob("*.npz"))
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*golden*.py")]
    assert [path.stem for path in files if not any(f'"{path.stem}"' in text for text in tests)] == []
    assert all(path.stat().st_size < 2**20 for path in files)


# Where the public value is a known defect, there is no vector to agree with: ours is finite, and right.


@on_every_engine
@pytest.mark.parametrize("gap", [110.0, -110.0, 800.0])
@pytest.mark.parametrize("saturated", ["student", "teacher"])
def test_dkd_is_finite_where_mdistiller_takes_the_log_of_an_underflowed_sum(backend, gap, saturated):
    # there: inf loss, NaN gradient, from |gap| > 103 in float32 and 745 in float64
    temperature, target = 4.0, torch.tensor([1, 0])
    sides = {name: torch.randn(2, 6, generator=torch.Generator().manual_seed(3)) for name in ("student", "teacher")}
    sides[saturated][torch.arange(2), target] += gap * temperature
    for dtype in (torch.float32, torch.float64):
        student = sides["student"].to(dtype, copy=True).requires_grad_()
        loss = dkd_loss(student, sides["teacher"].to(dtype), target, temperature=temperature, backend=backend)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@on_every_engine
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nckd_does_not_see_the_target_logit_where_mdistiller_masks_by_minus_1000(backend, side):
    # there: a scaled target logit of 1500 outweighs the mask (490 instead of 0.055), or 0 * inf makes it NaN
    generator = torch.Generator().manual_seed(4)
    target = torch.tensor([0, 3])
    sides = {name: torch.randn(2, 5, generator=generator) for name in ("student", "teacher")}
    settings = {"alpha": 0.0, "beta": 1.0, "temperature": 1.0, "backend": backend}
    plain = dkd_loss(sides["student"], sides["teacher"], target, **settings)
    sides[side][torch.arange(2), target] = 1500.0
    assert dkd_loss(sides["student"], sides["teacher"], target, **settings) == plain


@on_every_engine
def test_kd_is_finite_where_cls_kd_takes_the_log_of_an_underflowed_softmax(backend):
    student = torch.tensor([[440.0, 0.0, 0.0]], requires_grad=True)  # there: inf from a gap of 104 T in float32
    loss = kd_loss(student, torch.zeros(1, 3), temperature=4.0, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(16 * (2 / 3 * 110 - np.log(3)), rel=1e-6)
    assert student.grad.isfinite().all()
