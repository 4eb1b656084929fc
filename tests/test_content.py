"""Content keys: equal for what trains alike, different for what may not, and honest where nobody can tell."""

from __future__ import annotations

import copy
import functools
import linecache
import re
import subprocess
import sys
from collections import defaultdict, deque
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from kdcore.content import content_of

SCALE = 2.0
SOURCE = """
import torch
from torch import nn

SCALE = {scale}

def scaled(x):
    return x * SCALE

class Net(nn.Module):
    power = 1

    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.layer = nn.Linear(width, 2)

    def forward(self, x):
        return scaled(self.layer(x)) {code}
"""


def key(module: nn.Module) -> str:
    found = content_of(module)
    assert found.problem == "", found.problem
    return found.key


def problem(module: nn.Module) -> str:
    found = content_of(module)
    assert found.key != content_of(module).key, "an uncacheable module has a fresh key"
    return found.problem


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def from_cell(scale: float = 2.0, code: str = "", cell: str = "<cell 1>", lines: bool = True) -> nn.Module:
    """A module whose class a notebook's cell defines."""
    text = SOURCE.format(scale=scale, code=code)
    if lines:
        linecache.cache[cell] = (len(text), None, text.splitlines(keepends=True), cell)
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, cell, "exec"), scope)
    torch.manual_seed(0)
    return scope["Net"]()


@dataclass
class Config:
    width: int = 3
    act: Any = F.relu


class Own(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, 2)
        self.options = {"sizes": (1, 2), "names": {"a", "b"}, "kind": torch.float32, "space": SimpleNamespace(a=1)}
        self.norm = functools.partial(F.layer_norm, normalized_shape=(2,))
        self.last = lambda x: x + 1

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.config.act(self.layer(x)) * SCALE))


def own(**options: Any) -> Own:
    torch.manual_seed(0)
    return Own(Config(**options))


# ---------------------------------------------------------------- what is told apart


def test_equal_modules_and_copies_have_equal_keys():
    assert key(linear()) == key(linear()) == key(copy.deepcopy(linear())) == key(linear().eval())
    assert key(own()) == key(own()) == key(copy.deepcopy(own()))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.data[0, 0].add_(1e-7),
        lambda m: m.double(),
        lambda m: m.weight.requires_grad_(False),
        lambda m: setattr(m, "in_features", 4),
        lambda m: setattr(m, "extra", [1, {"a": None}]),
        lambda m: m.register_buffer("extra", torch.zeros(1), persistent=False),
        lambda m: setattr(m, "forward", functools.partial(F.linear, weight=m.weight)),
        lambda m: torch.nn.utils.parametrizations.weight_norm(m),
    ],
)
def test_a_changed_weight_attribute_or_part_is_another_module(change):
    module = linear()
    change(module)
    assert key(module) != key(linear())


def test_the_same_weights_tied_are_another_module():
    tied, untied = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    for module in (tied, untied):
        module.load_state_dict({name: torch.ones_like(t) for name, t in module.state_dict().items()})
    tied[1].weight = tied[0].weight
    assert key(tied) != key(untied)


def test_an_option_inside_an_attribute_counts():
    assert key(own(act=F.gelu)) != key(own())


def test_a_global_that_forward_uses_counts(monkeypatch):
    before = key(own())
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert key(own()) != before


def test_a_notebooks_class_counts_by_its_cell():
    first = key(from_cell())
    assert key(from_cell(cell="<cell 2>")) == first
    assert key(from_cell(code="+ 1", cell="<cell 3>")) != first
    assert key(from_cell(scale=3.0, cell="<cell 4>")) != first


def test_a_class_attribute_counts():
    module = from_cell()
    before = key(module)
    type(module).power = 2
    assert key(module) != before


class Add(Enum):
    ONE = 1

    def value_for(self, x):
        return x + 1


class Subtract(Enum):
    ONE = 1

    def value_for(self, x):
        return x - 1


@dataclass(slots=True)
class Slots:
    width: int


class Listed(list):
    scale = 1

    def __init__(self, scale):
        self.scale = scale


def marked(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    tensor.scale = scale
    return tensor


def one_hot(place: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(place), 3000)


LONG, OTHER = one_hot(1400), one_hot(1500)  # printing shows neither's one
Subtract.__qualname__ = "Add"
PAIRS = {
    "tensors in an object of torch": (Normal(0.0 * LONG, 1.0 + LONG), Normal(0.0 * LONG, 1.0 + OTHER)),
    "tensors in a deque": (deque([LONG]), deque([OTHER])),
    "tensors in a read-only mapping": (MappingProxyType({"a": LONG}), MappingProxyType({"a": OTHER})),
    "axes of two lambdas": (lambda x: x.mean((2, 3)), lambda x: x.mean((0, 1))),
    "lambdas in lambdas": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "axes of vmap": (torch.vmap(torch.relu, in_dims=0), torch.vmap(torch.relu, in_dims=1)),
    "owners of built-in methods": ({"a": 1}.get, {"a": 2}.get),
    "modules of one name": (torch.nn.functional, torchvision.transforms.functional),
    "defaults of dicts": (defaultdict(functools.partial(int, 1)), defaultdict(functools.partial(int, 2))),
    "attributes of lists": (Listed(1), Listed(2)),
    "attributes of tensors": (marked(torch.zeros(2), 1), marked(torch.zeros(2), 2)),
    "methods of enums": (Add.ONE, Subtract.ONE),
    "data classes with slots": (Slots(1), Slots(2)),
    "functions in a transform": (torchvision.transforms.Lambda(torch.relu), torchvision.transforms.Lambda(torch.sin)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_prints_alike_but_does_something_else_has_another_key(name):
    def of(value: Any) -> str:
        module = linear()
        module.it = value
        return key(module)

    one, other = PAIRS[name]
    assert of(one) == of(one)
    assert of(one) != of(other)


def test_keys_are_the_same_in_another_process():
    program = "import test_content as t; print(t.key(t.own()), t.key(t.from_cell()))"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert found.split() == [key(own()), key(from_cell())]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_torchvisions_models_have_keys(name):
    import torchvision

    with torch.device("meta"):
        module = getattr(torchvision.models, name)()
    module = module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert key(module) == key(copy.deepcopy(module))


@pytest.mark.parametrize("build", [lambda: nn.LSTM(2, 3), lambda: nn.TransformerEncoderLayer(4, 2)])
def test_torchs_larger_modules_have_keys(build):
    module = build()
    assert key(module) == key(copy.deepcopy(module))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.sets(st.text()),
    max_leaves=8,
)


@given(NESTED, NESTED)
@example([1, True, 1.0], [True, 1, 1.0])
@example([[], []], [[[]]])
@example({"a": "b"}, {"b": "a"})
@example(["ab", "c"], ["a", "bc"])
def test_plain_values_have_equal_keys_if_they_print_alike(one, other):
    assert content_of(one).key == content_of(copy.deepcopy(one)).key
    if repr(one) != repr(other) and one != other:
        assert content_of(one).key != content_of(other).key


# ---------------------------------------------------------------- what nobody can tell


class Mystery:
    pass


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.register_forward_hook(lambda *_: None), "Linear has hooks"),
        (lambda m: setattr(m, "it", Mystery()), "Linear.it is a Mystery"),
        (lambda m: setattr(m, "it", {"a": [Mystery()]}), r"Linear.it\['a'\]\[0\] is a Mystery"),
        (lambda m: setattr(m, "it", torch.Generator()), "Linear.it is a Generator"),
        (lambda m: setattr(m, "it", functools.reduce(lambda inner, _: [inner], range(2000), [])), "nested too deeply"),
        (lambda m: setattr(m, "it", (loop := [], loop.append(loop))), "holds itself"),
        (lambda m: setattr(m, "it", eval("lambda x: x")), "the source of <lambda> cannot be found"),
    ],
)
def test_what_cannot_be_recognised_says_why_and_gets_a_fresh_key(change, why):
    module = linear()
    change(module)
    assert re.search(why, problem(module))


def test_a_class_without_source_is_uncacheable():
    assert problem(from_cell(cell="<lost>", lines=False)) == "the source of Net.__init__ cannot be found"


def test_generated_code_is_uncacheable():
    assert "whose code is generated" in problem(torch.fx.symbolic_trace(linear()))
