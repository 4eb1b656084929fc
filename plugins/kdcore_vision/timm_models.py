"""Any classifier of timm by its name: ``model = "timm"``, ``name = "convnext_tiny"``. Nothing is downloaded.

Taps are timm's own list of features, ``stage1`` to ``stageN``: a convolutional net's may begin with its stem, a vision
transformer's are tokens [B, N, D] after every block. ``pooled`` exists where the last layer is linear.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kdcore import DataInfo, PluginError, RecipeError, suggest

from .options import TimmOptions
from .taps import UNFIT, cannot_take, check_images, tap_head, tap_map


def build(options: TimmOptions, data: DataInfo) -> nn.Module:
    """The model with ``data.classes`` classes for images of any number of channels, with random weights.

    Raises:
        PluginError: timm is not installed.
        RecipeError: timm has no such model.
        DataError: the model cannot take images of this shape; says what timm says.
    """
    try:
        import timm
    except ImportError as error:
        fix = "Write: pip install timm"
        raise PluginError("timm cannot be imported", where="model 'timm'", fix=fix) from error
    if not timm.is_model(options.name):  # names with a host, such as hf-hub:, would be looked up there
        meant = suggest(options.name, timm.list_models())
        fix = meant if meant.startswith("Did") else "timm.list_models() lists them."
        raise RecipeError(f"timm has no model {options.name!r}", where="model 'timm'", fix=fix)
    fixed = timm.get_pretrained_cfg(options.name).fixed_input_size
    size: dict[str, Any] = {"img_size": data.shape[1:]} if fixed else {}
    try:
        model: nn.Module = timm.create_model(
            options.name, pretrained=False, num_classes=data.classes, in_chans=data.shape[0], **size
        )
    except UNFIT as error:
        raise cannot_take(data, options.name, error) from error
    model.taps = _stages(model) | _pooled(model)
    check_images(model, data, options.name)
    return model


def _stages(model: nn.Module) -> dict[str, str]:
    modules = dict(model.named_modules())
    paths = [feature["module"] for feature in getattr(model, "feature_info", ()) if feature["module"] in modules]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        paths = [f"{path}.{tap_map(modules[path])}" for path in paths]
    return {f"stage{i}": path for i, path in enumerate(paths, start=1)}


def _pooled(model: nn.Module) -> dict[str, str]:
    head = model.get_classifier()
    paths = [path for path, module in model.named_modules() if module is head]
    return tap_head(model, paths[0]) if isinstance(head, nn.Linear) else {}
