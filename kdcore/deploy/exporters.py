"""The formats that the core writes: safetensors, torch.export and ONNX."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..card import KEY
from ..errors import PluginError
from ..files import write_file
from ..options import Options as NoOptions
from ..training.member import host_state, load_weights
from .classifier import Classifier
from .options import OnnxOptions

NEEDED = ("onnx", "onnxscript", "onnxruntime")


class SafetensorsExporter:
    """Weights and card, as a run's ``student.safetensors``: for kdcore.load_model and for recipes."""

    suffix = ".safetensors"

    def __init__(self, options: NoOptions) -> None:
        pass

    def export(self, module: Classifier, images: Tensor, path: Path) -> None:
        write_file(path, save(host_state(module.network), module.card.metadata))

    def load(self, path: Path, module: Classifier) -> Callable[[Tensor], Tensor]:
        twin = copy.deepcopy(module)
        for tensor in twin.network.state_dict().values():  # buffers that no file holds are made by the model
            tensor.zero_()
        load_weights(twin.network, path, "the exported file")
        return twin


class TorchExporter:
    """A program of torch.export as one .pt2 file; ``torch.export.load(path).module()`` runs it without kdcore."""

    suffix = ".pt2"

    def __init__(self, options: NoOptions) -> None:
        pass

    def export(self, module: Classifier, images: Tensor, path: Path) -> None:
        with traced(module):
            program = torch.export.export(module, (images,), dynamic_shapes=any_batch())
        data = io.BytesIO()  # given a path, torch wants a certain suffix, and hides what a full disk says
        torch.export.save(program, data, extra_files=dict(module.card.metadata))
        write_file(path, data.getvalue())

    def load(self, path: Path, module: Classifier) -> Callable[[Tensor], Tensor]:
        with path.open("rb") as file:
            return torch.export.load(file).module()


class OnnxExporter:
    """One .onnx file, input ``images`` and output ``logits``; checked with onnxruntime.

    Raises:
        PluginError: the packages that it needs are not installed.
    """

    suffix = ".onnx"

    def __init__(self, options: OnnxOptions) -> None:
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            fix = f"Write: pip install {' '.join(NEEDED)}"
            raise PluginError(f"{' and '.join(missing)} cannot be imported", where="exporter 'onnx'", fix=fix)
        self.options = options

    def export(self, module: Classifier, images: Tensor, path: Path) -> None:
        with traced(module):
            program = torch.onnx.export(
                module, (images,), dynamo=True, dynamic_shapes=any_batch(), opset_version=self.options.opset,
                input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
            )  # fmt: skip
        assert program is not None, "dynamo gives a program"
        program.model.metadata_props[KEY] = module.card.metadata[KEY]
        program.save(path, external_data=False)

    def load(self, path: Path, module: Classifier) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def any_batch() -> Any:
    """Shapes of one argument whose first size is left open."""
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def traced(module: Classifier) -> Iterator[None]:
    """What torch says of a model that it cannot trace becomes readable."""
    try:
        yield
    except Exception as error:
        what = f"torch.export cannot trace it: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        fix = "Its forward must not branch on the values of tensors, nor on the size of the batch."
        raise PluginError(what, where=f"model {module.card.model!r}", fix=fix) from error
