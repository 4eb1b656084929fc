"""One member at run time: its model, objective, optimizer, moving average and best weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..card import check_images
from ..data import DataInfo
from ..errors import PlanError, RecipeError, StorageError
from ..label_maps import offer, read_map
from ..options import Options
from ..origin import blame
from ..plan import Member, ModelRef, Term
from ..reading import safetensors_header
from ..registry import Catalog
from ..seeds import derive
from .ema import Average
from .mapped import Mapped
from .scaling import Scaler

if TYPE_CHECKING:
    from .cache import Cached

Sizes: TypeAlias = Mapping[str, tuple[int, ...]]
NO_TAPS = (
    "It has none: take a model with taps, or a loss on logits; "
    'a module of your own gets some by module.taps = {"stage2": "name.of.submodule"}.'
)


@dataclass
class LiveTerm:
    """A term with its module; ``weight`` is the current value of its schedule, set at every tick."""

    spec: Term
    module: nn.Module
    options: type[Options]
    factor: Callable[[float, float], float]
    source: str | None
    weight: float = 0.0

    @property
    def label(self) -> str:
        return self.spec.label


@dataclass
class Learner:
    """A member: frozen while no term is live, trained otherwise."""

    name: str
    spec: Member
    module: nn.Module
    terms: list[LiveTerm] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    lr_factor: Callable[[float, float], float] = lambda epoch, warm: 1.0
    ema: Average | None = None
    scaler: Scaler | None = None
    tapped: Tapped | None = None
    cached: Cached | None = None
    compiled: Callable[..., Tensor] | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    dropped: bool = False
    diverged: bool = False  # its weights are not finite, or came of a loss that was not
    best: tuple[int, float] = (0, -1.0)  # tick, monitor accuracy
    best_state: dict[str, Tensor] | None = None
    still: dict[str, float] | None = None  # accuracy while it is frozen
    passes: int = 0  # forward passes over an image; a training step counts as three
    stored: int = 0  # passes that stored outputs stand for, be they made for this stage or another
    seconds: float = 0.0  # of its work in steps
    curve: list[dict[str, float]] = field(default_factory=list)

    def live(self) -> list[LiveTerm]:
        """Terms that count now."""
        return [] if self.dropped else [term for term in self.terms if term.weight != 0]

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and delivered: the moving average if there is one."""
        return self.module if self.ema is None else self.ema.module

    def thaw(self, trained: bool) -> None:
        """Training mode and gradients for a trained member; neither for a frozen one."""
        self.module.train(trained)
        for term in self.terms:
            term.module.train(trained)
        for parameter in self.parameters:
            parameter.requires_grad_(trained)


def tap_names(module: nn.Module, patterns: Iterable[str], who: str = "", key: str = "") -> tuple[str, ...]:
    """The module's taps that fit one of the names, in its own order.

    Args:
        module: whose ``taps`` is the table from names to submodules.
        patterns: names, or patterns as of file names.
        who: what an error calls the module; default: its class.
        key: the option that holds the patterns, if one does.

    Raises:
        PlanError: none fits one of them; lists the taps that there are.
    """
    taps: Mapping[str, str] = getattr(module, "taps", {})
    wanted = tuple(patterns)
    for pattern in wanted:
        if not _fits(pattern, taps):
            fix = f"It has {', '.join(taps)}{_instead(taps, wanted, key)}." if taps else NO_TAPS
            raise PlanError(f"{who or type(module).__name__} has no tap {pattern!r}", fix=fix)
    return tuple(name for name in taps if any(fnmatchcase(name, pattern) for pattern in wanted))


def _fits(pattern: str, taps: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in taps)


def _instead(taps: Mapping[str, str], wanted: Iterable[str], key: str) -> str:
    """What to write in the recipe: the stages, or else the deepest tap, for patterns that nothing fits."""
    other = "stage?" if _fits("stage?", taps) else list(taps)[-1]
    names = list(dict.fromkeys(pattern if _fits(pattern, taps) else other for pattern in wanted))
    return f": write {key} = {json.dumps(names)}" if key else ""


class Tapped:
    """Collects named features of a module while it runs, by forward hooks that exist only for what is asked."""

    def __init__(self, module: nn.Module, names: frozenset[str]) -> None:
        self.names = names
        self.taps: dict[str, Tensor] = {}
        paths: Mapping[str, str] = getattr(module, "taps", {})
        for name in sorted(names):
            module.get_submodule(paths[name]).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, args: object, output: Tensor) -> None:
        self.taps[name] = output


def build_model(ref: ModelRef, catalog: Catalog, info: DataInfo, seed: int) -> nn.Module:
    """A model with initial weights that are a function of seed and model reference alone.

    Raises:
        PlanError: the model does not give [B, classes].
        StorageError, RecipeError: ``ref.weights`` is no safetensors file, or of another model or other images; or its
            label map does not fit.
    """
    if ref.label_map is not None:
        classes, groups = read_map(ref.label_map, catalog, info)
        network = build_model(replace(ref, label_map=None), catalog, replace(info, classes=classes), seed)
        return Mapped(network, classes, groups)
    entry = catalog.find("model", ref.model)
    options = entry.options_class()(**ref.options)
    with torch.random.fork_rng(devices=[]), blame(entry.origin, f"building model {entry.full_name!r}"):
        torch.manual_seed(derive(seed, "init", entry.full_name, dict(ref.options)))
        module: nn.Module = entry.load()(options, info)
        if classifies(module):
            _check_logits(module, ref, info)
    if ref.weights is not None:
        check_images(ref.weights, info, f"model {ref}")
        load_weights(module, Path(ref.weights), f"model {ref}")
    return module


def classifies(module: nn.Module) -> bool:
    """False for a module that says ``classifies = False`` (a generator): it is not evaluated."""
    return bool(getattr(module, "classifies", True))


def _check_logits(module: nn.Module, ref: ModelRef, info: DataInfo) -> None:
    with torch.no_grad():
        shape = tuple(module.eval()(torch.zeros(2, *info.shape)).shape)
    if shape != (2, info.classes):
        fix = f"It must give [B, {info.classes}]. {offer(shape[1])}" if len(shape) == 2 else "Logits are [B, classes]."
        raise PlanError(f"gives logits of shape {shape} for 2 images", where=f"model {ref}", fix=fix)


def load_weights(module: nn.Module, path: Path, where: str) -> None:
    """Loads a safetensors file whose names and shapes must fit.

    Raises:
        StorageError: the file is not safetensors.
        RecipeError: it belongs to another architecture or another number of classes.
    """
    own = _sizes(module)
    try:
        safetensors_header(path)
        with safe_open(path, framework="pt") as file:
            _check_fit({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, own, str(path), where)  # noqa: SIM118
            state = {name: file.get_tensor(name) for name in own}
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(f"not a safetensors file: {error}", where=str(path)) from error
    _put(module, state)


def put_weights(module: nn.Module, state: Mapping[str, Tensor], name: str, where: str) -> None:
    """Gives a module the tensors of the file ``name``; as :func:`load_weights`."""
    _check_fit({key: tuple(tensor.shape) for key, tensor in state.items()}, _sizes(module), name, where)
    _put(module, state)


def _put(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    own.update(state)  # into the module's own, which has the versions that some modules ask for
    module.load_state_dict(own)


def _sizes(module: nn.Module) -> Sizes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _check_fit(found: Sizes, own: Sizes, name: str, where: str) -> None:
    """Compares names and shapes before a tensor is read: a header may promise any size."""
    missing, extra = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    if missing or extra:
        problems = [f"lacks {key!r}" for key in missing[:1]] + [f"has {key!r} too" for key in extra[:1]]
        fix = "Give the model that these weights belong to."
        raise RecipeError(f"{name} {' and '.join(problems)}", where=where, fix=fix)
    for key, shape in found.items():
        if shape != own[key]:
            problem = f"{name}: {key!r} is {shape}, the model's is {own[key]}"
            fix = "Teacher and student must have the data's number of classes."
            raise RecipeError(problem, where=where, fix=f"{fix} {_offer(found, own)}".rstrip())


def _offer(found: Sizes, own: Sizes) -> str:
    """A label map, where another number of classes may be all in which a file differs from the model."""
    differing = [(shape, own[key]) for key, shape in found.items() if shape != own[key]]
    heads = {(shape[:1], other[:1]) for shape, other in differing}
    same = all(shape[1:] == other[1:] for shape, other in differing)
    return offer(differing[0][0][0]) if same and len(heads) == 1 and () not in next(iter(heads)) else ""


def host_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state on the host, contiguous and unshared, as safetensors wants it."""
    return {name: host_copy(tensor) for name, tensor in module.state_dict().items()}


def host_copy(tensor: Tensor) -> Tensor:
    """A contiguous host tensor that shares no memory."""
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()
