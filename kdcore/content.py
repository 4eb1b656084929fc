"""Content keys of what was made in Python: equal keys mean the same weights under the same code.

A key covers tensors by their bytes, plain values, and code by its source: of every class and function that the object
uses, and of what these name in turn. Code of torch, numpy and the standard library counts by name, other installed
packages by the file that it lies in. What cannot be told gives a problem and a key that no one else has.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import secrets
import site
import sys
import sysconfig
import textwrap
import types
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from dis import get_instructions
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes)
BY_NAME = {"torch", "torchvision", "numpy", "kdcore"}
INTERNAL = frozenset(nn.Module().__dict__)
HOOKS = tuple(name for name in sorted(INTERNAL) if name.endswith("hooks") and "state_dict" not in name)
BESIDE = ("default_factory", "maxlen", "__dict__")
ELIDED = (" at 0x", "tensor(", "array(")  # of a text that does not say all: long tensors are printed with gaps
GENERATED = (torch.jit.ScriptModule, torch.fx.GraphModule)
_STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
_SITES = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}


@dataclass(frozen=True)
class Content:
    """What something is made of.

    Args:
        key: sha256 in hex; a random number where there is a problem.
        problem: why it cannot be recognised when it is met again; empty if it can.
    """

    key: str
    problem: str = ""


def content_of(value: Any) -> Content:
    """The content of a module: weights, buffers, structure, plain attributes, and the code of its classes."""
    return _content({type(value).__name__: value})


def hooks_of(plugin: Any) -> Content:
    """The content of a plugin that lies in no file: its hooks, and the code that they name.

    The key is empty if it registers nothing: an observer decides no weight, and is called in the driving process alone.
    """
    hooks = {name: getattr(plugin, name) for name in dir(plugin)}
    hooks = {name: hook for name, hook in hooks.items() if isinstance(getattr(hook, "kdcore_impl", None), dict)}
    if not any((hook.kdcore_impl.get("specname") or name) == "kdcore_register" for name, hook in hooks.items()):
        return Content("")
    return _content(hooks)


def _content(values: Mapping[str, Any]) -> Content:
    walk = _Walk()
    try:
        for name, value in values.items():
            walk.visit(value, name)
    except RecursionError:
        walk.fail(f"{next(iter(values))} is nested too deeply")
    return walk.content()


class _Walk:
    """Goes through an object once and feeds what it finds to one hash."""

    def __init__(self) -> None:
        self.sum = hashlib.sha256()
        self.met: dict[int, tuple[int, Any]] = {}  # by id; kept alive, so that no id comes twice
        self.open: set[int] = set()
        self.problem = ""

    def content(self) -> Content:
        return Content(secrets.token_hex(32), self.problem) if self.problem else Content(self.sum.hexdigest())

    def add(self, *words: object) -> None:
        for word in words:
            data = str(word).encode(errors="surrogatepass")
            self.sum.update(b"%d:" % len(data) + data)

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem

    def visit(self, value: Any, where: str) -> None:
        """Adds a value; ``where`` says for people where it was found."""
        if type(value) in PLAIN:
            self.add(type(value).__name__, repr(value))
            return
        if id(value) in self.met:
            self.add("again", self.met[id(value)][0])
            return
        if id(value) in self.open:
            self.fail(f"{where} holds itself")
            return
        shared, handle = next((shared, handle) for kind, shared, handle in HANDLERS if isinstance(value, kind))
        if shared:  # what is tied is part of the content; equal tuples may or may not be one object
            self.met[id(value)] = (len(self.met), value)
        self.open.add(id(value))
        handle(self, value, where)
        self.open.discard(id(value))

    # ------------------------------------------------------------ values

    def tensor(self, value: Tensor, where: str) -> None:
        self.add("tensor", isinstance(value, nn.Parameter), value.requires_grad)
        try:
            host = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            self.fail(f"{where} is a tensor whose bytes cannot be read ({error})")
            return
        self.add(value.dtype, tuple(value.shape))
        self.sum.update(host.data)
        self.beside(value, where)

    def array(self, value: np.ndarray[Any, Any], where: str) -> None:
        if value.dtype.hasobject:
            self.fail(f"{where} is an array of objects")
            return
        self.add("array", value.dtype, value.shape)
        self.sum.update(value.tobytes())

    def sequence(self, value: Any, where: str) -> None:
        self.visit(type(value), where)
        self.add(len(value))
        for number, item in enumerate(value):
            self.visit(item, f"{where}[{number}]")
        self.beside(value, where)

    def group(self, value: Any, where: str) -> None:
        self.visit(type(value), where)
        self.add(len(value))
        for item in sorted(value, key=repr):  # the order of a set differs from process to process
            self.visit(item, f"an item of {where}")
        self.beside(value, where)

    def mapping(self, value: Mapping[Any, Any], where: str) -> None:
        self.visit(type(value), where)
        self.add(len(value))
        for key, item in value.items():
            self.visit(key, f"a key of {where}")
            self.visit(item, f"{where}[{key!r}]")
        self.beside(value, where)

    def beside(self, value: Any, where: str) -> None:
        """What a tensor, container or function has beside its content."""
        for name in BESIDE:
            if (found := getattr(value, name, None)) not in (None, {}):
                self.add("beside", name)
                self.visit(found, f"{where}.{name}")

    def other(self, value: Any, where: str) -> None:
        """An object: a data class by its fields, one of the standard library's by what it prints, torch's by both."""
        if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace | Namespace):
            self.visit(type(value), where)
            names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            self.mapping({name: getattr(value, name, None) for name in names} | getattr(value, "__dict__", {}), where)
        elif isinstance(value, Enum):
            code = {name: item for name, item in vars(type(value)).items() if isinstance(item, CODE)}
            self.visit((type(value).__qualname__, value.name, value.value, code), where)
        elif _is_known(type(value).__module__) and not any(word in (text := repr(value)) for word in ELIDED):
            self.add(type(value).__qualname__, text)
            if not _is_standard(type(value).__module__):  # torch prints shapes for tensors, or no more than a name
                self.beside(value, where)
        else:
            self.fail(f"{where} is a {type(value).__name__}, of which nobody knows what it does")

    # ------------------------------------------------------------ modules

    def module(self, value: nn.Module, where: str) -> None:
        if isinstance(value, GENERATED):
            self.fail(f"{where} is a {type(value).__name__}, whose code is generated")
            return
        self.visit(type(value), where)
        if any(getattr(value, name, None) for name in HOOKS):
            self.fail(f"{where} has hooks")
        for name, item in sorted(vars(value).items()):
            if name not in INTERNAL:
                self.add("attribute", name)
                self.visit(item, f"{where}.{name}")
        self.add("transient", sorted(value._non_persistent_buffers_set))
        for part in (value._parameters, value._buffers, value._modules):
            for name, item in part.items():
                self.add("part", name)
                self.visit(item, f"{where}.{name}")

    # ------------------------------------------------------------ code

    def type(self, cls: type, where: str) -> None:
        self.add("class", cls.__qualname__)
        for base in cls.__bases__:  # of torch's classes too: a parametrized module's class is torch's, its base not
            self.visit(base, where)
        if self.foreign(cls.__module__):
            return
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            self.add(cls._fields)  # a named tuple's methods are generated
            return
        for name, item in sorted(vars(cls).items()):
            made = dataclasses.is_dataclass(cls) and name.startswith("__") and _is_generated(item)
            if not made and (not name.startswith("__") or isinstance(item, CODE)) and name != "_abc_impl":
                self.add("attribute", name)
                self.visit(item, f"{cls.__name__}.{name}")

    def function(self, value: types.FunctionType, where: str) -> None:
        self.add("function", value.__qualname__)
        if self.foreign(str(value.__globals__.get("__name__"))):
            if hasattr(value, "__wrapped__"):  # e.g. under torch.no_grad()
                self.visit(value.__wrapped__, where)
            for name, item in _closed(value):  # e.g. the axes of torch.vmap
                if isinstance(item, (*PLAIN, tuple, types.FunctionType, Tensor, nn.Module)):
                    self.visit(item, f"{name!r} of {value.__qualname__}")
            return
        try:
            self.add(textwrap.dedent(inspect.getsource(value.__code__)))
        except (OSError, TypeError, IndexError):
            self.fail(f"the source of {value.__qualname__} cannot be found")
            return
        if value.__name__ == "<lambda>":  # two of them may share a line
            self.bytecode(value.__code__, where)
        self.beside(value, value.__qualname__)
        self.visit((value.__defaults__, value.__kwdefaults__), f"a default of {value.__qualname__}")
        for name, item in _named(value):
            self.add("name", name)
            self.visit(item, f"{name!r}, which {value.__qualname__} uses,")

    def bytecode(self, code: types.CodeType, where: str) -> None:
        self.add(code.co_code.hex(), code.co_names)
        for const in code.co_consts:
            visit = self.bytecode if isinstance(const, types.CodeType) else self.visit
            visit(const, where)

    def method(self, value: types.MethodType, where: str) -> None:
        self.visit(value.__func__, where)
        self.visit(value.__self__, where)

    def wrapper(self, value: Any, where: str) -> None:
        """What holds functions: a static method, class method, property, cached or partial function."""
        self.add(type(value).__name__)
        for name in ("__func__", "__wrapped__", "fget", "fset", "fdel", "func", "args", "keywords"):
            self.visit(getattr(value, name, None), where)

    def reference(self, value: weakref.ref[Any], where: str) -> None:
        self.visit(value(), where)

    def named(self, value: Any, where: str) -> None:
        self.add("built in", value.__module__, value.__qualname__)
        if not isinstance(value.__self__, types.ModuleType | None):  # e.g. the get of a dict
            self.visit(value.__self__, where)

    def namespace(self, value: types.ModuleType, where: str) -> None:
        known, file = _is_known(value.__name__), getattr(value, "__file__", None)
        self.add("module", value.__name__ if known else value.__name__.rpartition(".")[2])
        if not known:
            self.file(Path(file) if file else None, f"the module {value.__name__}")

    def foreign(self, name: str) -> bool:
        """True for code of an installed module, which is added by name, or by name and file."""
        if _is_known(name):
            self.add(name)
            return True
        file = _file(name) if name != "__main__" else None  # under python -m that is the program's, not the script's
        if file is not None and any(folder in file.parents for folder in _SITES):
            self.add(name)
            self.file(file, f"the module {name}")
            return True
        return False

    def file(self, path: Path | None, what: str) -> None:
        if path is None or not path.is_file():
            self.fail(f"{what} lies in no file")
        else:
            self.add(hashlib.sha256(path.read_bytes()).hexdigest())


CODE = (types.FunctionType, staticmethod, classmethod, property)
WRAPPERS = (
    staticmethod, classmethod, property, functools.cached_property, functools.partial, functools._lru_cache_wrapper,
)  # fmt: skip
# what is tried first for a value; True where one object met twice is said to be one
HANDLERS: tuple[tuple[Any, bool, Callable[[_Walk, Any, str], None]], ...] = (
    (nn.Module, True, _Walk.module),
    (Tensor, True, _Walk.tensor),
    (np.ndarray, True, _Walk.array),
    (type, True, _Walk.type),
    (types.FunctionType, True, _Walk.function),
    (types.MethodType, False, _Walk.method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), False, _Walk.named),
    (WRAPPERS, False, _Walk.wrapper),
    (types.ModuleType, True, _Walk.namespace),
    (weakref.ref, False, _Walk.reference),
    (Enum, False, _Walk.other),
    ((tuple, list, deque), False, _Walk.sequence),
    ((set, frozenset), False, _Walk.group),
    ((dict, types.MappingProxyType), False, _Walk.mapping),
    (object, False, _Walk.other),
)


def _named(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and the variables of outer functions that a function uses."""
    for name in sorted(_globals(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from _closed(function)


def _closed(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of outer functions that a function uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _globals(code: types.CodeType) -> set[str]:
    found = {str(step.argval) for step in get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return found.union(*map(_globals, inner))


def _is_generated(item: Any) -> bool:
    """True for a function that a library wrote by exec, e.g. a data class's __repr__, which is wrapped too."""
    return isinstance(item, types.FunctionType) and inspect.unwrap(item).__code__.co_filename == "<string>"


def _file(name: str) -> Path | None:
    found = getattr(sys.modules.get(name), "__file__", None)
    return Path(found).resolve() if found else None


def _is_known(name: str) -> bool:
    """Modules that count by their name: torch and numpy are recorded with a result, not keyed, and so is Python."""
    return _is_standard(name) or name.partition(".")[0] in BY_NAME


def _is_standard(name: str) -> bool:
    file = _file(name)  # one of the user's may be called queue.py
    return name.partition(".")[0] in sys.stdlib_module_names and (file is None or _STDLIB in file.parents)
