"""Checks of the losses' arguments: once, in Python, and without a device-to-host copy."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import Normalize
from .reference import Reduction, Settings, Target

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(student: Tensor, teacher: Tensor, target: Target, settings: Settings, group: Any) -> None:
    check_logits(student)
    _check_pair(student, teacher)
    check_target(target, student, settings.ignore_index)
    _check_settings(settings)
    _check_statistics(student, settings, group)
    if target is None and (isinstance(settings.ce_weight, Tensor) or settings.ce_weight != 0):
        raise ValueError("ce_weight asks for cross-entropy but target is None. Pass labels, or ce_weight=0.")


def check_logits(student: Tensor) -> None:
    if not isinstance(student, Tensor) or student.dtype not in _FLOATS:
        found = student.dtype if isinstance(student, Tensor) else type(student).__name__
        raise TypeError(f"student is {found}. Pass float16, bfloat16, float32 or float64 logits.")
    if student.dim() != 2:
        raise ValueError(f"student has shape {_shape(student)}. Pass logits [B, C]; flatten positions into rows.")
    if student.shape[1] < 2:
        raise ValueError("student has C=1 class: nothing to distil. Pass logits of at least 2 classes.")


def check_target(target: Target, student: Tensor, ignore_index: int) -> None:
    if target is None or (isinstance(target, str) and target == "teacher"):
        return
    if not isinstance(target, Tensor):
        raise TypeError(f'target is {target!r}. Pass labels [B], soft labels [B, C], or "teacher".')
    if target.device != student.device:
        raise ValueError(f"target is on {target.device}, student on {student.device}. Pass target.to(student.device).")
    rows, classes = student.shape
    if target.dim() == 2:
        _check_soft(target, student)
    elif target.shape != (rows,):
        raise ValueError(f"target has shape {_shape(target)}. Pass labels [{rows}] or soft labels [{rows}, {classes}].")
    elif target.dtype != torch.int64:
        raise TypeError(f"target is {target.dtype}. Pass int64 labels: target.long().")
    else:
        _check_range(target, classes, ignore_index)


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} is outside [0, 1]. Pass a share between 0 and 1.")


def check_dkd(student: Tensor, target: Target, alpha: float | Tensor, beta: float | Tensor) -> None:
    if target is None:
        raise ValueError('target is None, but DKD needs a target class. Pass labels, or target="teacher".')
    _check_weight("alpha", alpha)
    if not isinstance(beta, Tensor) or beta.shape != student.shape[:1]:
        _check_weight("beta", beta, "a number, a 0-d tensor or one per row")


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher is {type(teacher).__name__}. Pass logits of the student's shape and dtype.")
    if teacher.shape != student.shape:
        what = (
            f"teacher has shape {_shape(teacher)}, student {_shape(student)}. Pass logits of the same rows and classes"
        )
        others = teacher.shape[:1] == student.shape[:1] and teacher.dim() == 2
        raise ValueError(f"{what}; in a recipe, label_map brings a teacher to them." if others else f"{what}.")
    if teacher.dtype != student.dtype:
        raise TypeError(f"teacher is {teacher.dtype}, student {student.dtype}. Pass teacher.to(student.dtype).")
    if teacher.device != student.device:
        raise ValueError(
            f"teacher is on {teacher.device}, student on {student.device}. Pass teacher.to(student.device)."
        )


def _check_soft(target: Tensor, student: Tensor) -> None:
    if target.shape != student.shape:
        raise ValueError(f"target has shape {_shape(target)}, student {_shape(student)}. Pass one row per sample.")
    if not target.is_floating_point():
        raise TypeError(f"target is {target.dtype}. Pass probabilities: target.to(student.dtype).")


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    # on a GPU the check would wait for the device, and a label that is traced or mapped has no value to look at: what
    # computes the loss finds the label as well
    if target.device.type != "cpu" or _is_traced() or not target.numel():
        return
    low, high = (int(end) for end in torch.aminmax(target))
    if low >= 0 and high < classes:
        return
    bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if bad.numel():
        raise IndexError(
            f"target holds {int(bad[0])}, outside the {classes} classes. "
            f"Pass labels from 0 to {classes - 1}, or ignore_index={ignore_index} for rows to leave out."
        )


def _is_traced() -> bool:
    if torch.compiler.is_compiling():
        return True
    signs = ("_are_functorch_transforms_active", "_len_torch_dispatch_stack")  # names that torch does not promise
    return any(getattr(torch._C, sign, bool)() for sign in signs)


def _check_settings(settings: Settings) -> None:
    for name in ("temperature", "kd_weight", "ce_weight"):
        _check_weight(name, getattr(settings, name))
    if not isinstance(settings.temperature, Tensor) and settings.temperature <= 0:
        raise ValueError(f"temperature={settings.temperature} is not above 0. Pass a temperature above 0.")
    if settings.normalize not in get_args(Normalize):
        raise ValueError(f'normalize={settings.normalize!r} is unknown. Pass "none", "class" or "instance".')
    if settings.eps is not None and not 0 < settings.eps < math.inf:
        raise ValueError(f"eps={settings.eps} is not above 0. Pass None for the default.")
    if settings.reduction not in get_args(Reduction):
        raise ValueError(f'reduction={settings.reduction!r} is unknown. Pass "none", "sum" or "mean".')
    check_label_smoothing(settings.label_smoothing)


def _check_weight(name: str, value: float | Tensor, kinds: str = "a number or a 0-d tensor") -> None:
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(f"{name} has shape {_shape(value)}. Pass {kinds}.")
    elif not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} is not finite. Pass a finite number.")


def _check_statistics(student: Tensor, settings: Settings, group: Any) -> None:
    if not (group is None or isinstance(group, ProcessGroup)):
        raise TypeError(f"group is {type(group).__name__}. Pass a torch.distributed.ProcessGroup, or None.")
    stats, classes = settings.stats, student.shape[1]
    if isinstance(stats, str):
        if stats not in ("batch", "detached"):
            raise ValueError(f'stats={stats!r} is unknown. Pass "batch", "detached" or four tensors [C].')
    elif len(stats) != 4 or any(not isinstance(part, Tensor) or part.shape != (classes,) for part in stats):
        raise ValueError(f"stats must be (mean_s, var_s, mean_t, var_t). Pass four tensors of shape ({classes},).")
    if settings.normalize != "class" and stats != "batch":
        raise ValueError(f'stats has no meaning with normalize="{settings.normalize}". Pass normalize="class".')
    if settings.normalize == "class" and isinstance(stats, str) and student.shape[0] == 1 and group is None:
        raise ValueError(
            'normalize="class" needs statistics of at least 2 rows, student has 1. '
            "Pass a larger batch, or stats=(mean_s, var_s, mean_t, var_t)."
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
