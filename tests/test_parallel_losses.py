"""Two processes with parts of a batch get the loss and gradient that one process gets of the whole."""

from __future__ import annotations

import itertools

import torch
from losses_table import LOSSES, MODES, check_grad, check_value, exact, logits
from ranks import on_two_ranks

from kdcore.losses import available_backends, kd_loss

BACKENDS = [backend for backend in ("reference", "cpu") if backend in available_backends()]
CUTS = (20, 7, 40, 0)  # of 40 rows: even, uneven, and a rank without a row
CASES = [
    {"loss": loss, "normalize": mode, "backend": backend, "dtype": dtype, "cut": cut, "reduction": reduction}
    for loss, mode, backend, dtype, (cut, reduction) in itertools.product(
        LOSSES, MODES, BACKENDS, (torch.float64, torch.float32), itertools.product(CUTS, ("mean", "sum"))
    )
]


def batch(case):
    student, teacher, target = logits(40, 21, case["dtype"])
    target[[3, 4, 30]] = -100
    student[3] = float("nan")  # an ignored row may hold anything
    settings = {"normalize": case["normalize"], "ce_weight": 0.5, "reduction": case["reduction"]}
    return (student, teacher, target), settings | ({"beta": 2.0} if case["loss"] == "dkd" else {})


def part_of_a_batch(rank, group):
    """What a rank computes: value, parts and gradient for every case."""
    found = []
    for case in CASES:
        tensors, settings = batch(case)
        student, teacher, target = (z[: case["cut"]] if rank == 0 else z[case["cut"] :] for z in tensors)
        student = student.clone().requires_grad_()
        value, parts = LOSSES[case["loss"]](
            student, teacher, target, group=group, return_parts=True, backend=case["backend"], **settings
        )
        (grad,) = torch.autograd.grad(value, student)
        found.append((value.detach(), parts, grad))
    return found


def test_a_batch_in_two_processes_is_one_batch():
    ranks = on_two_ranks("test_parallel_losses:part_of_a_batch")
    for case, *parts in zip(CASES, *ranks, strict=True):
        tensors, settings = batch(case)
        truth = exact(LOSSES[case["loss"]], *tensors, **settings)
        value, grad = sum(part[0] for part in parts), torch.cat([part[2] for part in parts])
        if case["reduction"] == "mean":  # as DistributedDataParallel averages
            value, grad = value / 2, grad / 2
            for name, number in truth.parts.items():
                check_value(case["dtype"], (parts[0][1][name] + parts[1][1][name]) / 2, number, 4.0)
        check_value(case["dtype"], value, truth.value, 4.0)
        check_grad(grad, truth)


def other_ways(rank, group):
    """Losses and gradients by the ways that the op leaves to plain torch, of half a batch."""
    student, teacher, target = (z[:10] if rank == 0 else z[10:] for z in logits(20, 5))
    found = []
    for settings in ({"teacher_grad": True}, {"stats": "detached"}, {"temperature": torch.tensor(3.0)}):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        value = kd_loss(s, t, target, normalize="class", group=group, **settings)
        grads = torch.autograd.grad(value, [s, t], allow_unused=True)
        found.append([value.detach(), *(z for z in grads if z is not None)])
    return found


def test_a_teachers_gradient_detached_statistics_and_a_learned_temperature_are_shared_too():
    student, teacher, target = logits(20, 5)
    expected = []
    for settings in ({"teacher_grad": True}, {"stats": "detached"}, {"temperature": torch.tensor(3.0)}):
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        value = kd_loss(s, t, target, normalize="class", **settings)
        expected.append(
            [value.detach(), *(z for z in torch.autograd.grad(value, [s, t], allow_unused=True) if z is not None)]
        )
    first, second = on_two_ranks("test_parallel_losses:other_ways")
    for one, two, (value, *grads) in zip(first, second, expected, strict=True):
        torch.testing.assert_close((one[0] + two[0]) / 2, value)
        for a, b, grad in zip(one[1:], two[1:], grads, strict=True):
            torch.testing.assert_close(torch.cat([a, b]) / 2, grad, rtol=1e-10, atol=1e-14)
