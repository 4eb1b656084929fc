"""The names that kdcore exports, which are all that a plugin may use."""

from __future__ import annotations

from pathlib import Path

import pytest

import kdcore

# ---------------------------------------------------------------- the exported names


def test_type_checkers_see_every_exported_name() -> None:
    import ast

    tree = ast.parse(Path(kdcore.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {(node.module, alias.name) for node in imports for alias in node.names}
    assert seen == {(home, name) for name, home in kdcore._HOME.items()}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)


def test_every_exported_name_exists() -> None:
    for name in kdcore.__all__:
        assert getattr(kdcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Stag'"):
        _ = kdcore.Stag
