"""What a run gives to the Python that asked for it."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError
from .plan import ModelRef
from .registry import Catalog
from .runner import Run

if TYPE_CHECKING:
    from torch import nn

    from .data import DataInfo

ROLES = ("teacher", "control", "student")


@dataclass(frozen=True, eq=False, repr=False)
class RunResult(Mapping[str, Any]):
    """A finished run: the content of its result.json as a mapping, its files, and its models.

    Args:
        folder: holds result.json, report.html and student.safetensors.
        content: what result.json says.
        builders: role -> what builds its module.
        catalog: the exporters.
    """

    folder: Path
    content: Mapping[str, Any]
    builders: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    catalog: Catalog = field(default_factory=Catalog)

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @property
    def report(self) -> Path:
        """The page that says what was found."""
        return self.folder / "report.html"

    @property
    def accuracy(self) -> float:
        """The student's share of right answers on the test split, of the weights that the protocol reports."""
        return float(self.content["student"]["test_accuracy"])

    @property
    def warnings(self) -> list[str]:
        """What a reader of the result should know."""
        return list(self.content["warnings"])

    def student(self) -> nn.Module:
        """The student with the weights of student.safetensors, in evaluation mode on the CPU; a new one every call.

        It expects images as training gave them: normalised, where they were.
        """
        return self.builders["student"]()

    def teacher(self) -> nn.Module:
        """The first teacher as :meth:`student` gives the student.

        Raises:
            RecipeError: nobody taught this student.
        """
        if "teacher" not in self.builders:
            raise RecipeError("this run has no teacher", where=str(self.folder), fix="Choose a strategy with one.")
        return self.builders["teacher"]()

    def export(self, path: str | Path, format: str = "torch-export", **options: Any) -> Path:  # noqa: A002
        """Writes the student for other programs, with the normalisation inside, as ``kdcore export`` does.

        Args:
            path: the file to write; it appears only if it gives the student's logits when it is read again.
            format: a registered exporter: ``torch-export``, ``onnx``, ``safetensors``.
            options: of the exporter.

        Raises:
            PluginError: the student cannot be traced, or the file gives other logits.
            RecipeError, StorageError: no such exporter or option; it cannot be written.
        """
        from .deploy.classifier import load_model
        from .deploy.export import export

        entry = self.catalog.find("exporter", format, "export(format=...)")
        checked = entry.options_class()(**entry.check(options, "export"))
        export(load_model(self.folder / "student.safetensors", module=self.student()), entry, checked, Path(path), 8)
        return Path(path)

    def __repr__(self) -> str:
        models = [f"{role} {row['model']} {row['test_accuracy']:.2%}" for role, row in self._rows()]
        return f"RunResult({', '.join(models)}, on {self['protocol']['test_images']} test images; {self._link()})"

    def _repr_html_(self) -> str:
        """A small table for a notebook."""
        heads = "".join(f"<th>{head}</th>" for head in ("", "model", "test accuracy", "monitor", "parameters"))
        rows = "".join(_row(role, row) for role, row in self._rows())
        notes = "".join(f"<p><b>{html.escape(text)}</b></p>" for text in self.warnings)
        link = html.escape(self._link())
        return f'<table><tr>{heads}</tr>{rows}</table>{notes}<p><a href="{link}">{link}</a></p>'

    def _rows(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(role, self.content[role]) for role in ROLES if self.content[role] is not None]

    def _link(self) -> str:
        """The report as seen from here: a notebook's server knows no absolute paths."""
        return os.path.relpath(self.report)


def _row(role: str, row: Mapping[str, Any]) -> str:
    cells = (row["model"], f"{row['test_accuracy']:.2%}", f"{row['monitor_accuracy']:.2%}", f"{row['params']:,}")
    return f"<tr><th>{role}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def result_of(run: Run, content: Mapping[str, Any]) -> RunResult:
    """The result of a run that was executed; it keeps no data."""
    kept = Catalog()
    for entry in (entry for kind in ("model", "label_map", "exporter") for entry in run.host.catalog.all(kind)):
        kept.add(entry)
    info = run.context.load(run.view.data).info
    builders = {}
    for role in ("student", "teacher"):
        if content[role] is not None:
            key, member = content[role]["stage"], content[role]["member"]
            ref = dataclasses.replace(run.stages[key].members[member].model, weights=None)
            own = run.folder / "student.safetensors"
            weights = own if role == "student" else run.store.weights(key, member)
            builders[role] = partial(_build, ref, kept, info, weights)
    return RunResult(run.folder, content, builders, kept)


def _build(ref: ModelRef, models: Catalog, info: DataInfo, weights: Path) -> nn.Module:
    from .training.member import build_model, load_weights

    module = build_model(ref, models, info, seed=0)
    load_weights(module, weights, f"model {ref}")
    return module.eval()
