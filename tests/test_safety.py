"""Nothing in kdcore or its plugins can execute what a file says: by the names that its source uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "kdcore").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"), ("torch.jit", "load"), ("torch.serialization", "load"), ("torch.package", "PackageImporter"),
    ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load"), ("yaml", "load"), ("pd", "read_pickle"),
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            top = (node.module or "").partition(".")[0]
            yield from (name.name for name in node.names if top in MODULES or (node.module, name.name) in ATTRIBUTES)
        elif isinstance(node, ast.Attribute) and (dotted(node.value), node.attr) in ATTRIBUTES:
            yield dotted(node)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.func.id
            for word in node.keywords:
                if word.arg in ("shell", "allow_pickle") and not is_false(word.value):
                    yield f"{word.arg}="
                if word.arg == "weights_only":
                    yield "weights_only="


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_the_source_names_nothing_that_executes_what_it_reads(file: Path) -> None:
    if file.name.startswith("convert"):
        pytest.skip("it reads a .pth in a process of its own, under limits")
    assert not list(faults(ast.parse(file.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "from torch import load", "torch.load(x)",
        "import torch as torch; torch.jit.load(x)", "eval(x)", "exec(x)", "os.system(x)", "run(x, shell=True)",
        "run(x, shell=y)", "np.load(x, allow_pickle=True)", "import marshal, os", "__import__(x)",
        "import shelve", "from os import system",
    ],
)  # fmt: skip
def test_the_test_finds_what_it_looks_for(text: str) -> None:
    assert list(faults(ast.parse(text)))


def test_what_only_looks_like_it_is_left_alone() -> None:
    assert not list(faults(ast.parse("model.eval(); re.compile(x); store.load(x); run(x, shell=False)")))
