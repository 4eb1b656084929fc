"""How the CUDA kernels cut a call into blocks: every element once, within the limits of the hardware."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from losses_table import _C, needs_compiled

pytestmark = needs_compiled

WARP, THREADS, GRID = 32, 256, 2**31
many = settings(max_examples=1500)
cuts = {
    "rows": st.integers(0, 2_000_000) | st.integers(0, 300),
    "classes": st.integers(2, 300_000) | st.integers(2, 5000),
    "itemsize": st.sampled_from([2, 4, 8]),
    "alignment": st.sampled_from([2, 4, 8, 16]),
    "by_class": st.booleans(),
    "bounded": st.booleans(),
    "sums": st.booleans(),
}


def plan_of(rows, classes, **cut):
    cut["alignment"] = max(cut.get("alignment", 16), cut.get("itemsize", 4))
    return _C.cuda_plan(rows, classes, **cut)


def covers(pieces, size, whole):
    """That many pieces of that size are needed for the whole, and no more."""
    return pieces * size >= whole and (pieces == 0 or (pieces - 1) * size < whole)


def columns(plan, begin, lanes, vector, wide):
    """The classes of each thread, as `columns_of` in common.cuh gives them."""
    for lane in range(lanes):
        first = begin + (lane * vector if wide else lane)
        yield [first + (k if wide else k * lanes) for k in range(vector)]


@many
@given(**cuts)
def test_passes_over_columns_cover_the_batch_once(rows, classes, **cut):
    plan = plan_of(rows, classes, **cut)
    assert covers(plan["tiles"], WARP * plan["vector"], classes)
    assert covers(plan["chunks"], plan["chunk"], rows)
    assert plan["chunk"] % (THREADS // WARP) == 0
    assert 2 * plan["tiles"] * plan["chunks"] < GRID
    assert plan["padded"] % 128 == 0
    assert classes <= plan["padded"] < classes + 128


@many
@given(**cuts, whole=st.booleans())
def test_the_pass_over_rows_covers_the_batch_once(rows, classes, **cut):
    plan = plan_of(rows, classes, **cut)
    threads = plan["across"] * plan["groups"]
    assert plan["across"] % WARP == 0
    assert plan["groups"] >= 1
    assert covers(plan["row_chunks"], plan["row_chunk"], rows)
    assert covers(plan["splits"], plan["segment"], classes)
    assert plan["row_chunks"] * plan["splits"] < GRID
    if plan["tiled"]:
        assert threads <= THREADS
        assert plan["across"] * plan["row_vector"] >= classes
        assert plan["row_chunk"] % (plan["groups"] * plan["batch"]) == 0
        assert plan["splits"] == 1
    else:
        assert threads == THREADS
        assert plan["row_chunk"] == plan["groups"] * plan["batch"]
        assert plan["splits"] == 1 or plan["segment"] % (plan["across"] * plan["row_vector"]) == 0
    if cut["whole"]:
        assert plan["splits"] == 1


@many
@given(**cuts)
def test_words_are_read_only_where_they_are_aligned(rows, classes, **cut):
    plan = plan_of(rows, classes, **cut)
    alignment = max(cut["alignment"], cut["itemsize"])
    for vector, wide in ((plan["vector"], plan["wide"]), (plan["row_vector"], plan["row_wide"])):
        assert wide == (alignment >= min(16, vector * cut["itemsize"]))


@settings(max_examples=300)
@given(classes=st.integers(2, 6000), itemsize=st.sampled_from([2, 4, 8]), alignment=st.sampled_from([2, 4, 8, 16]))
def test_every_class_is_one_threads_own(classes, itemsize, alignment):
    plan = plan_of(64, classes, itemsize=itemsize, alignment=alignment)
    span = WARP * plan["vector"]
    owned = [
        column
        for tile in range(plan["tiles"])
        for own in columns(plan, tile * span, WARP, plan["vector"], plan["wide"])
        for column in own
    ]
    assert sorted(owned) == list(range(plan["tiles"] * span))
    span = plan["across"] * plan["row_vector"]
    owned = [
        column
        for begin in range(0, classes, span)
        for own in columns(plan, begin, plan["across"], plan["row_vector"], plan["row_wide"])
        for column in own
    ]
    assert sorted(set(owned)) == list(range(len(owned)))
    assert len(owned) >= classes


@many
@given(**{**cuts, "rows": st.integers(256, 100_000), "classes": st.integers(100, 300_000)})
def test_what_blocks_leave_for_each_other_is_little_beside_large_logits(rows, classes, **cut):
    plan = plan_of(rows, classes, **cut)
    logits, acc = 2 * rows * classes * cut["itemsize"], max(4, cut["itemsize"])
    if logits < 300e6:
        return
    moments = 2 * plan["chunks"] * classes * 4 * acc
    partial = (plan["row_chunks"] if plan["tiled"] else plan["chunks"]) * 2 * classes * acc
    assert moments <= 0.04 * logits
    assert partial <= 0.04 * logits


def test_the_paths_are_those_of_the_design():
    assert plan_of(4096, 1000)["tiled"]
    assert plan_of(4096, 2048)["tiled"]
    assert not plan_of(4096, 2049)["tiled"]
    assert not plan_of(4096, 1000, bounded=False)["tiled"]
    assert not plan_of(4096, 1000, itemsize=8)["tiled"]
    assert plan_of(32, 128256)["splits"] > 1
    assert plan_of(32, 128256, whole=True)["splits"] == 1
