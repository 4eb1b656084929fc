"""A delivered model, ready to use: images in, logits out, the normalisation inside."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..card import Card, find_model, read_card
from ..data import DataInfo
from ..errors import RecipeError
from ..plan import ModelRef
from ..plugins import load_plugins
from ..registry import Catalog
from ..training.member import build_model, classifies, load_weights


class Classifier(nn.Module):
    """A trained network behind the normalisation of its images.

    Args:
        network: normalised images [B, C, H, W] -> logits [B, classes].
        card: what its weights file says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, card: Card) -> None:
        super().__init__()
        self.network, self.card = network, card
        for name, values in (("mean", card.mean), ("std", card.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], float32.

        Images of a set that is stored as uint8 are in 0..1, as torchvision's ToTensor gives them; those of another set
        are as the set has them.
        """
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    def example(self, batch: int) -> Tensor:
        """Random images [batch, C, H, W] like those that it takes, the same at every call."""
        noise = torch.randn(batch, *self.card.shape, generator=torch.Generator().manual_seed(0))
        images = noise * self.std.cpu() + self.mean.cpu()
        return images.clamp(0, 1) if self.card.scale == 255 else images


def load_model(
    path: str | Path, *, module: nn.Module | None = None, plugin_files: Sequence[str | Path] = ()
) -> Classifier:
    """The model of a safetensors file that kdcore wrote, with its weights, on the CPU, in evaluation mode.

    ::

        model = kdcore.load_model("runs/digits-1a2b3c4d/student.safetensors")
        logits = model(images)  # [B, C, H, W] float32 in 0..1
        model.network  # the trained network as such, for normalised images

    The file names a registered model and its options; no code comes from it.

    Args:
        path: e.g. a run's ``student.safetensors``.
        module: of the same architecture, where the file is of a module of your own; it is copied.
        plugin_files: files that are plugins, if the model is registered by one.

    Raises:
        StorageError: no safetensors file, or one that does not say which model it holds.
        RecipeError: no such model is registered, or the tensors are not its.
        PluginError: the model's plugin is broken.
    """
    if module is None:
        return classifier(Path(path), load_plugins(files=[str(file) for file in plugin_files]).catalog)
    card, network = read_card(Path(path)), copy.deepcopy(module).cpu()
    load_weights(network, Path(path), "module")
    return Classifier(network, card).eval()


def classifier(path: Path, catalog: Catalog) -> Classifier:
    """As :func:`load_model`, of the models in ``catalog``."""
    card = read_card(path)
    entry = find_model(card, catalog, str(path))
    ref = ModelRef(entry.full_name, entry.check(card.options, str(path)), str(path))
    network = build_model(ref, catalog, DataInfo(card.shape, card.classes), seed=0)
    if not classifies(network):
        raise RecipeError(f"{ref} is no classifier", where=str(path), fix="Give the file of a model that gives logits.")
    return Classifier(network, card).eval()
