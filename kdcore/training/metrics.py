"""Metrics of a learner against its source on the monitor split, computed only if a controller needs them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kl(
    student: Tensor,  # [B, C] logits
    teacher: Tensor,  # [B, C] logits
    target: Tensor,  # [B]
) -> Tensor:
    """KL(teacher || student) of each sample in nats, at temperature 1. Returns [B]."""
    log_q, log_p = F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
