"""Modules and data that were handed over in Python, as a plugin that offers them to one run."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .codec import digest
from .content import content_of
from .data import DataInfo, Dataset
from .data.checks import checked
from .data.own import own_dataset
from .data.splits import fingerprint
from .errors import RecipeError
from .hookspecs import hookimpl
from .job import Event
from .label_maps import offer
from .options import Options
from .origin import OWN
from .registry import Registrar

STUDENT = "distill(student=...)"


class ModuleOptions(Options):
    """What tells one module from another.

    Args:
        content: its key.
        size: number of parameters, for people.
        given: its weights are worth something: a teacher is used as it is.
    """

    content: str
    size: str
    given: bool = False


class DataOptions(Options):
    """What tells one data set from another: the sha256 of all splits."""

    content: str


def take_data(
    train: Any, test: Any, monitor: Any, classes: int | None, mean: Any, std: Any, tell: Callable[[Event], None]
) -> Given:
    """Reads the data of a call; ``tell`` is told of progress."""

    def reading(name: str, done: int, total: int) -> None:
        tell({"kind": "reading", "name": name, "done": done, "total": total})

    dataset = own_dataset(train, test, monitor, classes=classes, mean=mean, std=std, tell=reading)
    return Given(checked(dataset, OWN))


class Given:
    """A plugin of what one call was given. Modules are copied at once, so that none of the caller's is changed.

    Args:
        dataset: all splits.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.modules: dict[str, nn.Module] = {}
        self.names: set[str] = set()
        self.warnings: list[str] = []

    @hookimpl
    def kdcore_register(self, registry: Registrar) -> None:
        registry.dataset("data", lambda options: self.dataset, options=DataOptions, about="what was handed over")
        for name in sorted(self.names):
            registry.model(name, partial(_build, self.modules), options=ModuleOptions, about="as it was handed over")

    def data_table(self) -> dict[str, str]:
        """The data set as a recipe names it."""
        splits = [split for split in (self.dataset.train, self.dataset.test, self.dataset.monitor) if split is not None]
        content = fingerprint(self.dataset.classes, *splits)
        return {"name": f"{OWN}/data", "content": digest([content, self.dataset.mean, self.dataset.std])}

    def table(self, model: Any, role: str, mapped: bool = False) -> Any:
        """The table of a module; a model as a recipe names it stays as it is.

        Raises:
            RecipeError: it is neither.
        """
        if isinstance(model, nn.Module):
            return self.model_table(model, role, mapped)
        if isinstance(model, Mapping | str):
            return model
        fix = 'Give an nn.Module, or a model as in a recipe: {"model": "resnet", "size": 20}.'
        raise RecipeError(f"{type(model).__name__} is no model", where=f"distill({role}=...)", fix=fix)

    def tables(self, value: Any, role: str) -> Any:
        """The same options with a table for every module in them."""
        if isinstance(value, Mapping):
            return {key: self.tables(item, role) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.tables(item, role) for item in value]
        return self.model_table(value, role) if isinstance(value, nn.Module) else value

    def model_table(self, module: nn.Module, role: str, mapped: bool = False) -> dict[str, Any]:
        """Takes a copy of a module; the table by which a recipe names it.

        Args:
            module: on any device; it is not changed.
            role: the argument that it was given as.
            mapped: its classes are not the data's, but those of a label map.

        Raises:
            RecipeError: it cannot be copied, trained or stored, or does not give logits.
        """
        where = f"distill({role}=...)"
        _check_parts(module, where)
        taken = _copied(module, where)
        _check_logits(taken, self.dataset, where, mapped)
        found = content_of(module)
        if found.problem:
            what = f"{role}: this {type(module).__name__} is not recognised when it is given again"
            self.warnings.append(f"{what}, so nothing that needs it comes from the store: {found.problem}")
        self.modules[found.key] = taken
        name = _name(type(module).__name__)
        self.names.add(name)
        size = _shortened(sum(parameter.numel() for parameter in module.parameters()))
        return {"model": f"{OWN}/{name}", "content": found.key, "size": size}


def _build(modules: Mapping[str, nn.Module], options: ModuleOptions, info: DataInfo) -> nn.Module:
    return copy.deepcopy(modules[options.content])


def _name(text: str) -> str:
    """A class's name as a catalog's."""
    return re.sub(r"[^a-z0-9._-]", "-", text.lower()).lstrip("._-") or "module"


def _shortened(count: int) -> str:
    """1,234,567 is 1.2M."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


# ---------------------------------------------------------------- checks


def _check_parts(module: nn.Module, where: str) -> None:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        fix = "Give the module that it was made from."
        raise RecipeError("torch.jit made it, and its copies cannot be used", where=where, fix=fix)
    parameters = list(module.parameters())
    if any(is_lazy(tensor) for tensor in [*parameters, *module.buffers()]):
        fix = "Run one batch through it first."
        raise RecipeError("it has lazy parameters, which have no shape yet", where=where, fix=fix)
    if not parameters:
        raise RecipeError("it has no parameters", where=where, fix="Give a module with weights.")
    if where == STUDENT and not any(parameter.requires_grad for parameter in parameters):
        raise RecipeError("all of its parameters are frozen", where=where, fix="Let some of them require gradients.")
    places = [parameter.data_ptr() for parameter in parameters if parameter.data_ptr()]
    if len(set(places)) < len(places):
        fix = "Make them one parameter under two names: second.weight = first.weight."
        raise RecipeError("two of its parameters share memory, which their copies do not", where=where, fix=fix)
    strange = [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]
    if strange:
        what = f"{strange[0]!r} in its state_dict is no tensor"
        raise RecipeError(what, where=where, fix="Keep buffers instead of extra state.")


def _copied(module: nn.Module, where: str) -> nn.Module:
    """A copy on the host that shares nothing with the module."""
    try:
        taken = copy.deepcopy(module).cpu()
    except Exception as error:
        fix = "Make copy.deepcopy(module) work: training must not change yours."
        raise RecipeError(f"it cannot be copied ({type(error).__name__}: {error})", where=where, fix=fix) from error
    theirs = {parameter.data_ptr() for parameter in module.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in theirs for parameter in taken.parameters()):
        fix = "Let __deepcopy__ copy the parameters."
        raise RecipeError("its copy has the same parameters", where=where, fix=fix)
    return taken


def _check_logits(module: nn.Module, data: Dataset, where: str, mapped: bool) -> None:
    """Two images in evaluation mode must give [2, classes]; of how many, a label map says later."""
    shape = tuple(data.train.images.shape[1:])
    try:
        with torch.no_grad():
            found: Any = copy.deepcopy(module).eval()(torch.zeros(2, *shape))
    except Exception as error:
        what = f"it raises {type(error).__name__} for 2 images {shape}: {error}"
        raise RecipeError(what, where=where, fix="Give a module that takes the data's images.") from error
    logits = isinstance(found, torch.Tensor) and found.dim() == 2 and len(found) == 2
    if not logits or (not mapped and found.shape[1] != data.classes):
        given = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        what = f"it gives {given} for 2 images of {data.classes} classes"
        fix = f"It must give logits [B, {data.classes}]; classes= says how many there are."
        if logits and where != STUDENT:
            fix += f" {offer(found.shape[1])}"
        raise RecipeError(what, where=where, fix=fix)
