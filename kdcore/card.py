"""What a weights file says of itself: the model that its tensors belong to, and the images that it wants.

The card is one string of a safetensors file's metadata (docs/files.md). Reading it imports no torch and runs no code: a
card names a registered model and its options, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from .codec import canonical
from .errors import RecipeError, StorageError
from .label_maps import offer
from .options import Field, Options, validate
from .origin import OWN
from .reading import parse_json, safetensors_header
from .registry import Catalog, Entry

if TYPE_CHECKING:
    from .data import DataInfo

KEY = "kdcore"
LARGEST_SIDE = 2**16


class Card(Options):
    """A model and its images: what is needed to use a weights file alone.

    The network was trained on ``(stored / scale - mean) / std``, each channel with its own mean and std.

    Args:
        format: of the card; raised when its keys change their meaning.
        model: full name of a registered model, such as ``vision/mlp``.
        options: all of the model's options, defaults included.
        shape: (C, H, W) of one image.
        classes: number of logits.
        mean: one number a channel.
        std: one number above 0 a channel.
        scale: 255 for images that are stored as uint8, 1 for others.
    """

    format: Literal[1] = Field(1, description="1")
    model: str = Field(description="the full name of a model, such as vision/mlp")
    options: dict[str, Any] = Field(description="the options of the model")
    shape: tuple[int, int, int] = Field(description="three sizes C, H, W, such as 3x32x32")
    classes: int = Field(ge=1, le=2**24, description="the number of classes, from 1")
    mean: tuple[float, ...] = Field(description="one number a channel, such as 0.5")
    std: tuple[float, ...] = Field(description="one number above 0 a channel, such as 0.25")
    scale: float = Field(gt=0, description="255 for images stored as uint8, 1 for others")

    @model_validator(mode="after")
    def _agree(self) -> Card:
        if not all(1 <= size <= LARGEST_SIDE for size in self.shape):
            raise ValueError(f"shape {list(self.shape)} is not within 1 and {LARGEST_SIDE}")
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise ValueError(f"mean and std want {self.shape[0]} numbers each, those of std above 0")
        return self

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of a safetensors file. One key: safetensors writes several in any order, so in other bytes."""
        return {KEY: canonical(self.model_dump(mode="json"))}

    @property
    def images(self) -> str:
        """The images that it takes, for people."""
        return f"{'x'.join(map(str, self.shape))} images of {self.classes} classes"


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors' names, types and places, and ``__metadata__``.

    Raises:
        StorageError: there is no such file, or it is not safetensors.
    """
    try:
        header = safetensors_header(path)
        if not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its metadata are no table")
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        fix = "Write the path of a .safetensors file; `kdcore convert` makes one of a .pth."
        raise StorageError(f"{str(path)!r} is no safetensors file: {reason}", fix=fix) from error
    return header


def find_card(path: Path) -> Card | None:
    """The card of a safetensors file; None if it has none.

    Raises:
        StorageError: the file is not safetensors, or its card is not one that this kdcore reads.
    """
    text = read_header(path).get("__metadata__", {}).get(KEY)
    if text is None:
        return None
    try:
        data = parse_json(text.encode())
        return validate(Card, data if isinstance(data, dict) else {})
    except (RecipeError, AttributeError, ValueError) as error:
        fix = "Use the kdcore that wrote it, or update."
        raise StorageError(f"the card in its metadata cannot be read: {error}", where=str(path), fix=fix) from error


def read_card(path: Path) -> Card:
    """The card of a safetensors file.

    Raises:
        StorageError: as :func:`find_card`, and where there is none.
    """
    card = find_card(path)
    if card is None:
        fix = "Add that: kdcore convert IN OUT --model NAME --shape 3x32x32 --classes 10 --mean 0.5 --std 0.25."
        raise StorageError("it does not say which model it holds", where=str(path), fix=fix)
    return card


def find_model(card: Card, catalog: Catalog, where: str) -> Entry:
    """The registered model that a card names.

    Raises:
        RecipeError: there is none, or the file is of a module that was handed over in Python.
    """
    if card.model.startswith(f"{OWN}/"):
        fix = "In Python: kdcore.load_model(path, module=...), or the result's export()."
        raise RecipeError(f"{card.model!r} was handed over in Python: no name builds it again", where=where, fix=fix)
    return catalog.find("model", card.model, where)


def check_images(path: str, data: DataInfo, where: str, mapped: str = "") -> None:
    """Refuses weights of a model that takes other images than the data's. A file without a card says nothing.

    Args:
        path: of the weights.
        data: as the weights should know them.
        where: the key that names the file.
        mapped: the key that says the number of classes, where that is a label map's.

    Raises:
        RecipeError: names both shapes and numbers of classes.
    """
    card = find_card(Path(path))
    if card is not None and (card.shape, card.classes) != (data.shape, data.classes):
        if mapped and card.shape == data.shape:
            fix = f"Map all of the {card.classes}, or give other weights."
            raise RecipeError(f"{data.classes} classes, but {path} takes {card.images}", where=mapped, fix=fix)
        here = f"{'x'.join(map(str, data.shape))} images of {data.classes} classes"
        fix = "Give weights of a model that was trained on such images."
        if card.shape == data.shape:
            fix += f" {offer(card.classes)}"
        raise RecipeError(f"{path} takes {card.images}, the data are {here}", where=where, fix=fix)
