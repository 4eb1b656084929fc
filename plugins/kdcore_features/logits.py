"""What losses on logits share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore import Outputs


def logits(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """Both logits [B, C] in float32, or float64 where the learner's are; the source's without its graph."""
    dtype = torch.promote_types(student.logits.dtype, torch.float32)
    return student.logits.to(dtype), teacher.logits.detach().to(dtype)


def label(target: Tensor) -> Tensor:
    """The target class [B] of labels [B], or of soft labels [B, C], whose largest share counts."""
    return target.argmax(1) if target.dim() == 2 else target
