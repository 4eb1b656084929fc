"""A session as files, and back: the whole state of a stage, bit for bit, without pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import PluginError, StorageError
from ..plan import Json
from ..reading import read_table
from .finite import check_finite
from .member import Learner, host_copy

if TYPE_CHECKING:
    from .session import Session

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "step": int, "tick": int, "pieces": int, "full": int, "finished": bool, "seconds": (int, float), "events": list,
    "warnings": list,
}  # fmt: skip


def pack(session: Session) -> dict[str, bytes]:
    """state.json and tensors.safetensors of a session between two steps."""
    check_finite(session, session.taught)
    found = {name: host_copy(tensor) for name, tensor in tensors(session)}
    return {"state.json": json.dumps(_state(session)).encode(), "tensors.safetensors": save(found)}


def unpack(session: Session, folder: Path) -> None:
    """Puts a session back where :func:`pack` saw it.

    Raises:
        StorageError: the folder, though whole, holds something else.
    """
    with _fitting(folder):
        state = {"full": 0, **read_table(folder / "state.json")}  # older ones lack it
        loaded = load_file(folder / "tensors.safetensors", device=str(session.device))
        for name, kind in _FIELDS.items():
            if not isinstance(state[name], kind):
                raise TypeError(f"{name} is {state[name]!r}")
            setattr(session, name, state[name])
        session.meters.sums, session.meters.counts = state["sums"], state["counts"]
        for learner in session.learners.values():
            _restore(learner, state["members"][learner.name], loaded)
        session.knobs.restore(state["knobs"])
        controllers = list(zip(session.controllers, state["controllers"], strict=True))
        parts = [(part, {**state["parts"][n], **_under(loaded, f"{n}//")}) for n, part in _stateful(session).items()]
    for (_, controller), saved in controllers:  # a plugin's own errors are no fault of the folder
        controller.load_state_dict(saved)
    for part, saved in parts:
        part.load_state_dict(saved)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        fix = "Remove the folder: the stage goes on from the checkpoint before it, or starts again."
        raise StorageError(f"no checkpoint of this stage: {error}", where=str(folder), fix=fix) from error


def _state(session: Session) -> dict[str, Json]:
    return {
        "step": session.step,
        "tick": session.tick,
        "pieces": session.pieces,
        "full": session.full,
        "seconds": session.seconds,
        "finished": session.finished,
        "events": session.events,
        "warnings": session.warnings,
        "sums": session.meters.sums,
        "counts": session.meters.counts,
        "knobs": session.knobs.values,
        "controllers": [controller.state_dict() for _, controller in session.controllers],
        "parts": {name: _split(part.state_dict())[0] for name, part in _stateful(session).items()},
        "members": {learner.name: _member_state(learner) for learner in session.learners.values()},
    }


def _member_state(learner: Learner) -> dict[str, Json]:
    return {
        "dropped": learner.dropped,
        "diverged": learner.diverged,
        "best": list(learner.best),
        "passes": learner.passes,
        "stored": learner.stored,
        "seconds": learner.seconds,
        "curve": learner.curve,
        "optimizer": {} if learner.diverged else _numbers(learner.optimizer),
        **({} if learner.scaler is None else {"scaler": learner.scaler.state_dict()}),
    }


def tensors(session: Session) -> Iterator[tuple[str, Tensor]]:
    """Everything that a checkpoint holds, by name."""
    for learner in session.learners.values():
        for part, state in _parts(learner).items():
            yield from ((f"{learner.name}/{part}/{name}", tensor) for name, tensor in state.items())
    for owner, keeper in _stateful(session).items():
        yield from ((f"{owner}//{name}", tensor) for name, tensor in _split(keeper.state_dict())[1].items())


def _stateful(session: Session) -> dict[str, Any]:
    """Source and step kind, where they keep state."""
    parts = {"source": session.source, "step": session.step_kind}
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def _split(state: dict[str, Any]) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """JSON values and tensors of a flat state."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value for name, value in state.items() if name not in tensors}, tensors


def _parts(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """The tensors of a learner that training can change, by part."""
    if learner.diverged:
        return {}
    if not learner.terms:  # frozen for good, but its buffers may be a memory bank
        return {"buffers": dict(learner.module.named_buffers())}
    parts = {"model": learner.module.state_dict(), "best": learner.best_state or {}}
    parts["buffers"] = _transient(learner.module)
    if learner.ema is not None:
        parts |= {"ema": learner.ema.state_dict(), "ema.buffers": _transient(learner.ema)}
    if learner.optimizer is not None:
        parts["optimizer"] = dict(_optimizer_tensors(learner.optimizer))
    return parts | {f"term.{term.label}": term.module.state_dict() for term in learner.terms}


def _transient(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are no part of its state_dict, but may change in training."""
    kept = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name not in kept}


def _restore_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = dict(module.named_buffers())
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{index}.{key}", value


def _numbers(optimizer: torch.optim.Optimizer | None) -> dict[str, Json]:
    """The part of an optimizer's state that is not tensors."""
    if optimizer is None:
        return {}
    numbers: dict[str, Json] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                continue
            if not (value is None or isinstance(value, int | float | str)):
                where = f"optimizer {type(optimizer).__name__}"
                raise PluginError(f"state {key!r} is {type(value).__name__}", where=where, fix="Keep tensors, numbers.")
            numbers[f"{index}.{key}"] = value
    return numbers


def _restore(learner: Learner, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    learner.dropped, learner.passes, learner.curve = saved["dropped"], saved["passes"], saved["curve"]
    learner.stored = int(saved.get("stored", 0))
    learner.best = (saved["best"][0], saved["best"][1])
    learner.seconds, learner.diverged = float(saved["seconds"]), bool(saved.get("diverged"))
    if learner.diverged:
        return
    _restore_buffers(learner.module, _under(tensors, f"{learner.name}/buffers/"))
    if not learner.terms:
        return
    learner.module.load_state_dict(_under(tensors, f"{learner.name}/model/"))
    learner.best_state = {n: t.cpu() for n, t in _under(tensors, f"{learner.name}/best/").items()} or None
    if learner.ema is not None:
        learner.ema.load_state_dict(_under(tensors, f"{learner.name}/ema/"))
        _restore_buffers(learner.ema, _under(tensors, f"{learner.name}/ema.buffers/"))
    for term in learner.terms:
        term.module.load_state_dict(_under(tensors, f"{learner.name}/term.{term.label}/"))
    if learner.scaler is not None:
        learner.scaler.load_state_dict(saved["scaler"])
    if learner.optimizer is not None:
        _restore_optimizer(learner.optimizer, saved["optimizer"], _under(tensors, f"{learner.name}/optimizer/"))


def _restore_optimizer(optimizer: torch.optim.Optimizer, numbers: dict[str, Json], tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**numbers, **tensors}.items():
        index, _, key = path.partition(".")
        on_host = key == "step" and isinstance(value, Tensor)  # as torch makes it; one that is fused takes it back
        state.setdefault(int(index), {})[key] = value.cpu() if on_host else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
