"""A frozen member's outputs, computed once for every sample and view, stored in parts, and read by sample.

A part is a sealed folder of the store: the outputs for PART samples of one view, in the order of the training split.
So filling goes on after a kill, damage costs one part, and several ranks make parts at the same time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..codec import digest, encode
from ..data import Batch, Source, Split
from ..errors import Interrupted, PlanError, StorageError
from ..folders import FORMAT
from ..keys import source_fingerprint
from ..outputs import Outputs
from ..plan import Cache, Stage
from ..transforms import every
from .member import Learner, host_state

if TYPE_CHECKING:
    from .session import Session

PART, PART_BYTES = 1 << 16, 1 << 28
"""Samples and bytes of a part at most: 131 MB with 1,000 classes, 2,048 maps of [64, 32, 32]."""
RESIDENT = 1 << 31
"""Bytes that are kept on the device; more are read from the files' pages, batch by batch."""
PROBED = 8
"""Samples of each view that are compared with the member itself."""
TURNED, READ = 256, 32
"""Samples whose batch is turned round to see whether they depend on each other; fewer where they are read."""
TOLD_EVERY = 10.0
"""Seconds between two notes on how far it is."""
ROWS = "rows.safetensors"


@dataclass
class Cached:
    """What is stored of a member: ``parts[view][n]`` holds the rows of ``size`` samples by name."""

    parts: Sequence[Sequence[Mapping[str, Tensor]]]
    classes: int
    device: torch.device
    size: int
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of what the member itself gives

    def outputs(self, index: Tensor, epoch: int) -> Outputs:
        """Logits [B, C] and taps for the samples at ``index`` [B] int64, as they are augmented in an epoch."""
        found = _rows(self.parts[epoch % len(self.parts)], index, self.size)
        rows = {name: row.to(self.device) for name, row in found.items()}
        taps = {name.removeprefix("tap."): self._as_given(name, row) for name, row in rows.items() if "." in name}
        logits = rows["logits"] if "logits" in rows else _spread(rows, self.classes)
        return Outputs(self._as_given("logits", logits), taps)

    def _as_given(self, name: str, row: Tensor) -> Tensor:
        return row.to(self.dtypes.get(name, row.dtype))


def _rows(parts: Sequence[Mapping[str, Tensor]], index: Tensor, size: int) -> dict[str, Tensor]:
    if len(parts) == 1:
        return {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in parts[0].items()}
    index = index.cpu()  # a sync on a GPU: what does not fit there is looked up on the host
    which = index // size
    rows = {name: torch.empty(len(index), *t.shape[1:], dtype=t.dtype) for name, t in parts[0].items()}
    for number in sorted(set(which.tolist())):
        here = which == number
        for name, tensor in parts[number].items():
            rows[name][here] = tensor[index[here] % size]
    return rows


def open_cache(session: Session, learner: Learner) -> Cached:
    """The outputs of a frozen member for the stage's views; what is missing of them is computed now.

    Raises:
        PlanError: source or transforms give batches that are no function of sample and view.
        StorageError: what is stored is not what the member gives.
        Interrupted: the process was asked to stop; finished parts stay.
    """
    spec = session.stage.data.cache
    assert spec is not None, "a stage with a cache"
    check_source(session.source, session.stage.data.source.name)
    check_knobs(session.knobs.data)
    check_views(session.source, session.splits.train, views_of(session.stage, spec), session.device)
    filling = _Filling(session, learner, spec, _key(session, learner))
    with _leased(session, filling.key):
        filling.run()
        parts = [[load_file(filling.file(view, n)) for n in range(filling.per_view)] for view in range(filling.views)]
        _any_busy(session, False)  # gc may remove them when all ranks have them open
    learner.stored = len(session.splits.train) * filling.views
    cached = Cached(_placed(parts, session.device), session.splits.info.classes, session.device, filling.size)
    cached.dtypes = _compared(session, learner, cached, spec, filling.key)
    return cached


def views_of(stage: Stage, spec: Cache) -> int:
    """Views that a stage sees: a short one needs fewer than the recipe names."""
    return min(spec.views, max(1, stage.length)) if stage.tick == "epoch" else spec.views


def resident_bytes(session: Session, spec: Cache) -> int:
    """What would lie on the device of the outputs that a cache holds of the session's members."""
    samples = views_of(session.stage, spec) * len(session.splits.train)
    sizes = [samples * _row_bytes(session, learner, spec) for learner in session.storable]
    return sum(size for size in sizes if size <= RESIDENT)


def _row_bytes(session: Session, learner: Learner, spec: Cache) -> int:
    """Of one sample."""
    one = replace(session.probe, inputs=session.probe.inputs[:1])
    return sum(tensor.nbytes for tensor in stored(_live(session, learner, one), spec.top).values())


@contextmanager
def _leased(session: Session, key: str) -> Iterator[None]:
    """Inside, no other run fills or removes the parts of ``key``: rank 0 holds the lease, and the others wait for it.

    Raises:
        Interrupted: a rank was asked to stop meanwhile.
    """
    told: list[str] = []

    def wait(holder: str) -> None:
        if not told:
            told.append(holder)
            session.emit({"kind": "waiting", "text": f"{holder} computes a teacher's outputs; waiting for them"})
        _any_busy(session, True)

    with session.store.lease(key, wait) if session.world.leads else nullcontext():
        while _any_busy(session, False):
            pass
        yield


def _any_busy(session: Session, busy: bool) -> bool:
    """True if any rank says that it is; all ranks must ask equally often.

    Raises:
        Interrupted: on all ranks, where one was asked to stop.
    """
    told = session.world.any(session.stopped() << 1 | busy)
    if told > 1:
        raise Interrupted(told >> 1)
    return bool(told)


# ---------------------------------------------------------------- filling


@dataclass
class _Filling:
    """Makes the parts that are missing."""

    session: Session
    learner: Learner
    spec: Cache
    key: str
    told: float = field(default_factory=time.monotonic)

    @cached_property
    def size(self) -> int:
        """Samples of a part."""
        return max(1, min(PART, PART_BYTES // _row_bytes(self.session, self.learner, self.spec)))

    @property
    def views(self) -> int:
        return views_of(self.session.stage, self.spec)

    @property
    def per_view(self) -> int:
        """Parts of a view."""
        return -(-len(self.session.splits.train) // self.size)

    def run(self) -> None:
        """Each rank makes its share of the parts; after every batch all ask each other whether one was told to stop."""
        own = range(self.session.world.rank, self.views * self.per_view, self.session.world.size)
        work = chain.from_iterable(self._made(*divmod(number, self.per_view)) for number in own)
        while _any_busy(self.session, next(work, False)):
            pass

    def file(self, view: int, number: int) -> Path:
        """Where the rows of a part are; the rank that made it, or found it, has verified it.

        Raises:
            StorageError: this rank does not see what another one stored.
        """
        return self.session.world.see(Path(self.session.store.root, "caches", self.key, _name(view, number), ROWS))

    def _made(self, view: int, number: int) -> Iterator[bool]:
        """Computes and stores a part unless it is there; gives True after every batch, and at the end."""
        store, rows = self.session.store, []
        if store.part(self.key, _name(view, number)) is None:
            for row in self._computed(view, number):
                rows.append(row)
                yield True
            whole = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            self._check(whole)
            store.save_part(self.key, _name(view, number), {ROWS: save(whole)})
        yield True

    def _check(self, whole: Mapping[str, Tensor]) -> None:
        for name, tensor in whole.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                what = f"{name} of {self.learner.name} holds numbers that are not finite in float16 (65,504 at most)"
                raise PlanError(what, where="cache", fix="Leave cache out.")

    def _computed(self, view: int, number: int) -> Iterator[dict[str, Tensor]]:
        session, total = self.session, len(self.session.splits.train)
        done, last = number * self.size, min((number + 1) * self.size, total)
        parts = torch.split(torch.arange(done, last, device=session.device), session.eval_size)
        for batch in _walk(session.source, parts, view):
            rows = stored(_live(session, self.learner, batch), self.spec.top)
            yield {name: row.cpu().contiguous() for name, row in rows.items()}  # a part may be more than a device has
            done += len(batch.inputs)
            self._tell(view * total + done)

    def _tell(self, done: int) -> None:
        if time.monotonic() - self.told > TOLD_EVERY:
            self.told = time.monotonic()
            total = self.views * len(self.session.splits.train)
            self.session.emit({"kind": "note", "text": f"outputs of {self.learner.name}: {done:,} of {total:,}"})


def _name(view: int, number: int) -> str:
    return f"view-{view}-part-{number:05d}"


def _walk(source: Source, parts: Sequence[Tensor], view: int) -> Iterator[Batch]:
    found: Iterator[Batch] = source.walk(parts, view)  # type: ignore[attr-defined]
    return found


def _live(session: Session, learner: Learner, batch: Batch) -> Outputs:
    """What the member itself gives."""
    with torch.no_grad(), session.autocast():
        logits = session.call(learner, batch.inputs)
    return Outputs(logits, {} if learner.tapped is None else dict(learner.tapped.taps))


def stored(outputs: Outputs, top: int) -> dict[str, Tensor]:
    """Rows as they are stored: float16, and of logits all or the ``top`` largest.

    Then ``values`` [B, top] float16 are the largest logits, ``classes`` [B, top] int32 their classes, and ``rest`` [B]
    float32 is the log-sum-exp of the others, so that probabilities at temperature 1 keep their sum.
    """
    rows = {f"tap.{name}": tap.half() for name, tap in outputs.taps.items()}
    logits = outputs.logits.float()
    if not 0 < top < logits.shape[1]:
        return {**rows, "logits": logits.half()}
    values, classes = logits.topk(top)
    others = logits.scatter(1, classes, -math.inf)
    return {**rows, "values": values.half(), "classes": classes.int(), "rest": others.logsumexp(1)}


def _spread(rows: Mapping[str, Tensor], classes: int) -> Tensor:
    """Logits [B, C] float32 of the largest; the others share what is left alike."""
    values = rows["values"].float()
    even = rows["rest"] - math.log(classes - values.shape[1])
    return even[:, None].repeat(1, classes).scatter_(1, rows["classes"].long(), values)


# ---------------------------------------------------------------- where it lies, and what it belongs to


def _key(session: Session, learner: Learner) -> str:
    """Of everything that decides a row: the member's weights and code, the data, augmentation, numerics."""
    data, model, catalog = session.stage.data, learner.spec.model, session.catalog
    named = [("model", model.model), ("source", data.source.name), ("dataset", data.dataset.name)]
    named += [("transform", spec.name) for spec in every(data.transforms, catalog)]
    named += [("label_map", model.label_map.name)] if model.label_map is not None else []
    return digest(
        {
            "cache": encode(data.cache, str),
            "model": [model.model, encode(model.options, str), encode(model.label_map, str)],
            "weights": _weights(learner),
            "taps": sorted(learner.tapped.names) if learner.tapped is not None else [],
            "code": [catalog.find(kind, name).origin.code() for kind, name in named],
            "data": [session.splits.fingerprint, source_fingerprint(session.stage, catalog)],
            "batches": encode([data.source, data.transforms], str),
            "seed": session.seed,
            "numerics": session.job.settings.numerics,
            "format": FORMAT,
        }
    )


def _weights(learner: Learner) -> str:
    """sha256 of a module's state as a file."""
    return hashlib.sha256(save(host_state(learner.module))).hexdigest()


def _placed(parts: list[list[dict[str, Tensor]]], device: torch.device) -> list[list[dict[str, Tensor]]]:
    """One part a view on the device, where all of it fits there."""
    size = sum(tensor.nbytes for view in parts for part in view for tensor in part.values())
    if size > RESIDENT:
        return parts
    return [[{name: torch.cat([part[name] for part in view]).to(device) for name in view[0]}] for view in parts]


# ---------------------------------------------------------------- checks


def check_source(source: Source | type[Source], name: str) -> None:
    """Refuses a source, or its class, that gives batches of steps alone."""
    if not hasattr(source, "walk"):
        what = f"source {name!r} cannot give the samples of a view"
        raise PlanError(what, where="cache", fix="Leave cache out, or give the source a method walk(parts, epoch).")


def check_knobs(parts: Iterable[Mapping[str, Any]]) -> None:
    """Refuses knobs of source and transforms."""
    for knobs in parts:
        if knobs:
            what = f"data.{min(knobs)} is a knob that may change while a stage trains, and stored outputs do not"
            raise PlanError(what, where="cache", fix="Leave cache out, or what has the knob.")


def check_views(source: Source, split: Split, views: int, device: torch.device) -> None:
    """Refuses batches whose samples are no function of sample and view: a transform looks at the batch."""
    count = TURNED if isinstance(split.images, Tensor) else READ
    index = torch.arange(min(count, len(split)), device=device)
    for view in sorted({0, views - 1}):
        one, other = _walk(source, [index, index.flip(0)], view)
        if not _alike(one, other, index):
            fix = "Leave cache out, or transforms like mixup and views."
            raise PlanError("a transform mixes the samples of a batch, or makes several of one", where="cache", fix=fix)


def _alike(one: Batch, other: Batch, index: Tensor) -> bool:
    """True if the order of a batch does not matter, and labels and positions are as they were."""
    same = one.index.equal(index) and one.inputs.equal(other.inputs.flip(0))
    return same and (one.target is None or one.target.dim() == 1)


def _compared(session: Session, learner: Learner, cached: Cached, spec: Cache, key: str) -> dict[str, torch.dtype]:
    """The member's own dtypes, by name, after a look at whether it gives what is stored.

    Raises:
        StorageError: it does not.
    """
    index = torch.arange(len(session.splits.train), device=session.device)[
        :: max(1, len(session.splits.train) // PROBED)
    ]
    for view in range(len(cached.parts)):
        live = _live(session, learner, next(_walk(session.source, [index], view)))
        rows = [stored(outputs, spec.top) for outputs in (live, cached.outputs(index, view))]
        if not all(
            _close(rows[0][name], rows[1][name], session) for name in rows[0] if name not in ("classes", "rest")
        ):
            where = Path(session.store.root, "caches", key)
            what = f"outputs of {learner.name} are not what the member gives now"
            raise StorageError(what, where=str(where), fix="Remove the folder: it is made again.")
    return {"logits": live.logits.dtype, **{f"tap.{name}": tap.dtype for name, tap in live.taps.items()}}


def _close(one: Tensor, other: Tensor, session: Session) -> bool:
    """Equal but for rounding and another order of sums, which other batches may have."""
    settings = session.job.settings
    share = 0.02 if settings.compile or settings.precision != "float32" else 2**-9
    return bool((one.float() - other.float()).abs().max() <= share * one.float().abs().max())
