"""``kdcore export`` and ``kdcore convert``: models out of runs, and checkpoints of others in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..card import Card
from ..errors import RecipeError, StorageError
from ..options import validate
from ..overrides import override
from ..plugins import PluginHost

EXAMPLES = {"shape": "3x32x32", "classes": "10", "mean": "0.5 (0 without one)", "std": "0.25 (1 without one)"}


def export_model(
    host: PluginHost, source: Path, name: str, sets: list[str], out: Path | None, beside: Path, batch: int
) -> None:
    """Exports the model of a safetensors file, and prints how the file compares with it.

    The file is ``out``, or ``beside`` with the exporter's suffix.
    """
    entry = host.catalog.find("exporter", name, "--format")
    options = entry.options_class()(**entry.check(_options(sets), "--set"))
    from ..deploy.classifier import classifier
    from ..deploy.export import export

    module = classifier(source, host.catalog)
    target = out or beside.with_suffix(entry.load().suffix)
    if target.resolve() == source.resolve():
        raise RecipeError(f"{target} is what is exported", where="--out", fix="Write --out with another name.")
    matches = export(module, entry, options, target, batch)
    print(f"{target}: {module.card.model} for float32 {module.card.images}, {_range(module.card)}")
    for match in matches:
        print(
            f"read again and compared, {match.batch} at once: the same classes, logits at most {match.difference:.2g} "
            f"apart (tolerance {match.tolerance:.2g})"
        )


def member_file(folder: Path, member: str, store: Path, result: Mapping[str, Any]) -> Path:
    """The weights file of a finished run's student or teacher."""
    from ..store import Store

    if member == "student":
        return folder / "student.safetensors"
    found = result.get(member) if member == "teacher" else None
    if found is None:
        raise RecipeError(f"the run has no {member!r}", where="--member", fix="Write student or teacher.")
    if Store(store).result(found["stage"]) is None:
        raise StorageError(f"the {member} is not stored any more", where=str(store), fix="Run the recipe again.")
    return Store(store).weights(found["stage"], found["member"])


def _range(card: Card) -> str:
    return "in 0..1" if card.scale == 255 else "as the data set has them"


def _options(sets: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in sets:
        options = override(options, text)
    return options


# ---------------------------------------------------------------- convert


def convert_file(
    host: PluginHost, source: Path, target: Path, key: str, model: str, sets: list[str], images: dict[str, Any]
) -> None:
    """Converts a checkpoint; with ``model`` it is checked against that, and says so in its card."""
    from ..convert import convert

    card = _card(host, model, sets, images) if model else None
    extra = [f"--{name}" for name, value in images.items() if value is not None]
    if card is None and (extra or sets):
        raise RecipeError("means nothing without --model", where=(extra or ["--set"])[0], fix="Write --model NAME.")
    tensors = convert(source, target, key=key, card=card, catalog=host.catalog)
    print(f"{target}: {tensors} tensors" + (f" of {card.model}, {card.images}" if card else ", no model named"))


def _card(host: PluginHost, name: str, sets: list[str], images: dict[str, Any]) -> Card:
    if missing := {f"--{key}": example for key, example in EXAMPLES.items() if images[key] is None}:
        words = ", ".join(f"{option} {example}" for option, example in missing.items())
        raise RecipeError("missing", where=", ".join(missing), fix=f"Write what {name} was trained on, e.g. {words}.")
    entry = host.catalog.find("model", name, "--model")
    shape = _numbers(images["shape"].replace("x", ","), int, "--shape", "3x32x32")
    mean, std = (_numbers(images[key], float, f"--{key}", "0.5 or 0.49,0.48,0.45") for key in ("mean", "std"))
    channels = shape[0]
    data = {
        "model": entry.full_name, "options": entry.check(_options(sets), "--set"), "shape": shape,
        "classes": images["classes"], "mean": mean * channels if len(mean) == 1 else mean,
        "std": std * channels if len(std) == 1 else std, "scale": images["scale"] or 255,
    }  # fmt: skip
    return validate(Card, data, "--model")


def _numbers(text: str, kind: type, where: str, example: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{text!r} is not numbers", where=where, fix=f"Write {where} {example}.") from None
