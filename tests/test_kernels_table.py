"""Every dtype, mode and loss agrees with float64 on the same logits, by every measure, at shapes that break kernels."""

import functools
import itertools

import pytest
import torch
from losses_table import LOSSES, MODES, check, every_dtype, every_mode, exact, logits, on_every_engine, on_every_isa

# One row; two classes; one less and one more than a vector of 4, 8, 16, 32 or 64; rows that are no multiple of a block;
# more classes than the kernels keep the exponentials of (8192), few and some rows.
SHAPES = [
    (1, 2),
    (1, 1271),
    (2, 2),
    (2, 7),
    (3, 13),
    (5, 21),
    (7, 100),
    (9, 101),
    (17, 7),
    (31, 33),
    (33, 64),
    (40, 1271),
]
MANY_ROWS = [(300, 10), (307, 21), (64, 1000)]
WIDE = [(5, 8200), (33, 9001)]
# more than the caches hold, so that results go past them; more rows than one block of the statistics
LARGE = {
    torch.float64: (100, 9001),
    torch.float32: (261, 9001),
    torch.float16: (400, 9001),
    torch.bfloat16: (400, 9001),
}


@functools.lru_cache(maxsize=20)  # the engine is the parameter that varies fastest
def sample(name, dtype, rows, classes, **settings):
    inputs = logits(rows, classes, dtype, seed=rows + classes)
    return inputs, exact(LOSSES[name], *inputs, **settings)


def check_shape(name, dtype, rows, classes, backend, **settings):
    if settings["normalize"] == "class" and rows == 1:
        return
    inputs, truth = sample(name, dtype, rows, classes, **settings)
    check(LOSSES[name], *inputs, truth=truth, backend=backend, where=f"{rows}x{classes}", **settings)


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_loss_gradient_and_parts_agree_with_float64(backend, dtype, mode, name, ce_weight):
    for rows, classes in SHAPES + MANY_ROWS:
        check_shape(name, dtype, rows, classes, backend, normalize=mode, ce_weight=ce_weight)


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize(("name", "ce_weight"), [("kd", 0.0), ("dkd", 0.7)])
def test_more_classes_than_fit_a_cache_agree_with_float64(backend, dtype, mode, name, ce_weight):
    for rows, classes in WIDE:
        check_shape(name, dtype, rows, classes, backend, normalize=mode, ce_weight=ce_weight)
    # too small a temperature for exponentials without a shift
    check_shape(name, dtype, 7, 8193, backend, normalize=mode, ce_weight=ce_weight, temperature=0.05)


QUICK = (torch.float32, "class", "dkd")
PAST_CACHES = [
    pytest.param(*call, marks=[] if call == QUICK else pytest.mark.long, id="-".join(map(str, call)))
    for call in itertools.product(LARGE, MODES, LOSSES)
]


@on_every_isa
@pytest.mark.parametrize(("dtype", "mode", "name"), PAST_CACHES)
def test_what_goes_past_the_caches_agrees_with_float64(dtype, mode, name):
    check_shape(name, dtype, *LARGE[dtype], "cpu", normalize=mode, ce_weight=0.7)


@on_every_engine
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_rows_to_forty_agrees_with_float64(backend, dtype, mode):
    for rows in range(2, 41):
        check_shape("dkd", dtype, rows, (10, 21)[rows % 2], backend, normalize=mode, ce_weight=0.7)


@on_every_engine
@every_dtype
@every_mode
@pytest.mark.parametrize("name", LOSSES)
def test_temperature_weights_smoothing_and_eps_agree_with_float64(backend, dtype, mode, name):
    weights = {"alpha": 0.5, "beta": 3.0} if name == "dkd" else {}
    kinds = {"kd_weight": 0.3, "ce_weight": 2.0, "label_smoothing": 0.1, "eps": 1e-3, **weights}
    for temperature in (0.7, 2.0, 8.0):
        for rows, classes in ((13, 37), (64, 100)):
            check_shape(name, dtype, rows, classes, backend, normalize=mode, temperature=temperature, **kinds)
