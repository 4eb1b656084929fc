"""Any classifier of timm by its name: ``model = "timm"``, ``name = "convnext_tiny"``. Nothing is downloaded.

Taps are timm's own list of features, ``stage1`` to ``stageN``: a convolutional net's may begin with its stem, a vision
transformer's are tokens [B, N, D] after every block. Features that are no single tensor are left out. ``pooled`` exists
where the last layer is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdcore import DataInfo, PluginError, RecipeError, suggest

from .options import TimmOptions
from .taps import UNFIT, cannot_take, check_images, tap_head, tap_map


def build(options: TimmOptions, data: DataInfo) -> nn.Module:
    """The model with ``data.classes`` classes for images of any number of channels, with random weights.

    Raises:
        PluginError: timm is not installed.
        RecipeError: timm has no such model, or it is no classifier.
        DataError: the model cannot take images of this shape; says what timm says.
    """
    try:
        import timm
    except ImportError as error:
        fix = "Write: pip install timm"
        raise PluginError("timm cannot be imported", where="model 'timm'", fix=fix) from error
    if not timm.is_model(options.name):  # names with a host, such as hf-hub:, would be looked up there
        raise _unknown(options.name, timm.list_models())
    sizes: dict[str, Any] = {"num_classes": data.classes, "in_chans": data.shape[0]}
    if timm.get_pretrained_cfg(options.name).fixed_input_size:
        sizes["img_size"] = data.shape[1:]
    try:
        model: nn.Module = timm.create_model(options.name, pretrained=False, **sizes)
    except UNFIT as error:
        raise cannot_take(data, options.name, error) from error
    if not hasattr(model, "get_classifier"):
        fix = "Choose a model with a head for classes."
        raise RecipeError(f"timm's {options.name!r} is no classifier", where="model 'timm'", fix=fix)
    paths = _features(model, lambda: check_images(model, data, options.name))
    model.taps = _stages(model, paths) | _pooled(model)
    return model


def _unknown(name: str, known: list[str]) -> RecipeError:
    meant = suggest(name, known)
    fix = meant if meant.startswith("Did") else "timm.list_models() lists them."
    return RecipeError(f"timm has no model {name!r}", where="model 'timm'", fix=fix)


def _features(model: nn.Module, run: Callable[[], None]) -> list[str]:
    """Modules of timm's list that give one tensor when the model runs."""
    modules = dict(model.named_modules())
    listed = [feature["module"] for feature in getattr(model, "feature_info", ()) if feature["module"] in modules]
    given: dict[str, Any] = {}
    hooks = [modules[path].register_forward_hook(partial(_keep, given, path)) for path in listed]
    run()
    for hook in hooks:
        hook.remove()
    return [path for path in listed if isinstance(given.get(path), Tensor)]


def _keep(given: dict[str, Any], path: str, module: nn.Module, args: Any, output: Any) -> None:
    given[path] = output


def _stages(model: nn.Module, paths: list[str]) -> dict[str, str]:
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        paths = [f"{path}.{tap_map(model.get_submodule(path))}" for path in paths]
    return {f"stage{i}": path for i, path in enumerate(paths, start=1)}


def _pooled(model: nn.Module) -> dict[str, str]:
    head = model.get_classifier()
    paths = [path for path, module in model.named_modules() if module is head]
    return tap_head(model, paths[0]) if isinstance(head, nn.Linear) else {}
