"""Checks of models, on images of the first shape that they take of a few usual ones.

A module with ``classifies = False`` (a generator) takes what its own step gives it, so that checks which would have to
run it do not apply.
"""

from __future__ import annotations

import copy
from unittest import SkipTest

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..data import DataInfo
from ..errors import KdError, PluginError
from ..training.evaluate import evaluating
from ..training.member import Tapped, classifies, host_state
from . import purity
from .subject import Subject, advising, check, require

CLASSES = 7
SHAPES = ((3, 16, 16), (3, 32, 32), (3, 64, 64), (3, 224, 224))
"""Shapes of images to check a model with; the first that it does not refuse."""
OTHERS = ((1, 8, 8), (1, 28, 28), (3, 20, 24), (4, 16, 16))
"""Shapes that a data set may have, and that a model may refuse."""


def built(subject: Subject, info: DataInfo, seed: int = 0) -> nn.Module:
    """The model as the framework builds it: initial weights are drawn under ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = subject.load()(subject.example(), info)
    return module


def usual(subject: Subject) -> tuple[nn.Module, DataInfo]:
    """A model for :data:`CLASSES` classes, and what it was built for.

    Raises:
        SkipTest: a package that it needs is not installed.
    """
    problem: KdError | None = None
    for shape in SHAPES:
        info = DataInfo(shape, CLASSES)
        try:
            return built(subject, info), info
        except KdError as error:
            if isinstance(error, PluginError) and isinstance(error.__cause__, ImportError):
                raise SkipTest(str(error)) from error
            problem = problem or error
    raise AssertionError(f"it refuses every usual shape of images: {problem}")


def classifier(subject: Subject) -> tuple[nn.Module, DataInfo]:
    """The usual model.

    Raises:
        SkipTest: it takes no images.
    """
    module, info = usual(subject)
    if not classifies(module):
        raise SkipTest("it declares classifies = False")
    return module, info


def images(info: DataInfo, count: int = 4) -> Tensor:
    """Random images [count, C, H, W]."""
    return torch.randn(count, *info.shape, generator=torch.Generator().manual_seed(0))


def evaluated(module: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    with evaluating(module):
        found: Tensor = module(inputs)
    return found


@check
def options_survive_json(subject: Subject) -> None:
    """Its options are JSON from which the same options are read back.

    They are part of the seed of its initial weights, and of a result's key.
    """
    purity.options_survive_json(subject)


@check
def follows_the_classes(subject: Subject) -> None:
    """It gives [B, classes] for the number of classes of the data, and for one image.

    The last batch of an evaluation may have one image.
    """
    _, info = classifier(subject)
    for classes in (2, CLASSES):
        module = built(subject, DataInfo(info.shape, classes))
        for count in (1, 3):
            shape = tuple(evaluated(module, images(info, count)).shape)
            what = f"it gives {shape} for a batch of {count} and {classes} classes"
            require(shape == (count, classes), what, "Size the last layer by data.classes.")


@check
def takes_other_images(subject: Subject) -> None:
    """Other sizes and channels work, or are refused by a KdError when it is built.

    A shape error from the depth of a model tells a user nothing.
    """
    classifier(subject)
    for shape in OTHERS:
        info = DataInfo(shape, CLASSES)
        fix = 'Raise kdcore.DataError(what, where="model NAME", fix=...) in build where data.shape does not fit.'
        try:
            module = built(subject, info)
        except KdError:
            continue
        except Exception as error:
            raise AssertionError(f"for images {shape} it raises {type(error).__name__}: {error}. {fix}") from error
        try:
            found = evaluated(module, images(info))
        except Exception as error:
            raise AssertionError(f"on images {shape} it raises {type(error).__name__}: {error}. {fix}") from error
        require(torch.isfinite(found).all(), f"on images {shape} its logits are not finite", fix)


@check
def starts_from_the_seed(subject: Subject) -> None:
    """Its initial weights are a function of torch's seed alone, and others under another seed.

    Runs are compared over seeds, and a student and its control start from the same weights.
    """
    module, info = usual(subject)
    with purity.other_random_state():
        again = built(subject, info)
    fix = "Draw weights from torch's global generator alone, and seed nothing."
    require(_same(module, again), "built twice under one seed it has different weights", fix)
    if any(p.ndim > 1 for p in module.parameters()):
        require(not _same(module, built(subject, info, seed=1)), "another seed gives the same weights", fix)


def _same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@check
def survives_safetensors(subject: Subject) -> None:
    """Its weights, written to safetensors, make another one give the same logits.

    Results are stored and students delivered so.
    """
    module, info = classifier(subject)
    twin = built(subject, info, seed=1)
    twin.load_state_dict(load(save(host_state(module))))
    same = torch.equal(evaluated(module, images(info)), evaluated(twin, images(info)))
    fix = "Register every layer and buffer, so that state_dict holds them."
    require(same, "with its weights loaded another one gives other logits", fix)


@check
def copies_are_alike(subject: Subject) -> None:
    """``copy.deepcopy`` gives a module with the same logits that shares nothing.

    A moving average (``ema``) is made so.
    """
    module, info = classifier(subject)
    before = evaluated(module, images(info))
    twin = copy.deepcopy(module)
    same = torch.equal(evaluated(twin, images(info)), before)
    require(same, "a copy gives other logits", "Keep state in parameters and buffers.")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    fix = "Keep state in parameters and buffers, and no function that holds the module."
    require(torch.equal(evaluated(module, images(info)), before), "a change of a copy changes the original", fix)
    require(not torch.equal(evaluated(twin, images(info)), before), "a copy does not follow its own weights", fix)


@check
def evaluates_alike(subject: Subject) -> None:
    """In evaluation mode the same images give the same logits, and nothing in it changes.

    Decisions are made on them, and a teacher is asked for the same image again and again.
    """
    module, info = classifier(subject)
    before = copy.deepcopy(module.state_dict())
    first = evaluated(module, images(info))
    with purity.other_random_state():
        second = evaluated(module, images(info))
    fix = "Switch dropout, noise and running statistics off in evaluation mode (self.training)."
    require(torch.equal(first, second), "the same images give other logits the second time", fix)
    changed = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])]
    require(not changed, f"evaluation changes {', '.join(changed)}", fix)


@check
def minds_no_company(subject: Subject) -> None:
    """In evaluation mode an image's logits do not depend on the others of its batch.

    Otherwise accuracy depends on the size of batches in evaluation.
    """
    module, info = classifier(subject)
    together = evaluated(module, images(info))
    alone = torch.cat([evaluated(module, image[None]) for image in images(info)])
    same = torch.allclose(together, alone, rtol=1e-3, atol=1e-4)
    require(same, "alone an image gets other logits than in a batch", "Use running statistics in evaluation mode.")


@check
def keeps_its_images(subject: Subject) -> None:
    """It does not change the images.

    All members of a stage get the same tensor.
    """
    module, info = classifier(subject)
    for mode in (True, False):
        given = images(info)
        module.train(mode)(given)
        require(torch.equal(given, images(info)), "it changes the images", "Use no in-place operation on the input.")


@check
def taps_are_tensors(subject: Subject) -> None:
    """Every tap names a submodule that gives a tensor [B, ...] with a gradient.

    Losses on features find them by these names.
    """
    module, info = classifier(subject)
    taps = getattr(module, "taps", {})
    if not taps:
        raise SkipTest("it has no taps")
    modules = dict(module.named_modules())
    for name, path in taps.items():
        require(path in modules, f"tap {name!r} names no submodule: {path!r}", "See named_modules() for the paths.")
    tapped = Tapped(module, frozenset(taps))
    module.train()(images(info))
    for name in taps:
        found = tapped.taps.get(name)
        fix = "Tap a submodule that forward() calls, and that returns one tensor."
        right = isinstance(found, Tensor) and found.shape[:1] == (4,) and found.requires_grad
        require(right, f"tap {name!r} gives {_described(found)} for 4 images", fix)


def _described(found: object) -> str:
    if not isinstance(found, Tensor):
        return "nothing" if found is None else f"a {type(found).__name__}"
    return f"shape {tuple(found.shape)}" + ("" if found.requires_grad else " without a gradient")


@check
def all_parameters_learn(subject: Subject) -> None:
    """Every parameter gets a finite gradient from the logits.

    One that does not is dead weight, which distributed training refuses.
    """
    module, info = classifier(subject)
    module.train()(images(info)).square().sum().backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    idle = [name for name, grad in trained.items() if grad is None]
    require(not idle, f"{', '.join(idle[:3])} gets no gradient", "Use it in forward(), or leave it out.")
    odd = [name for name, grad in trained.items() if grad is not None and not torch.isfinite(grad).all()]
    require(not odd, f"the gradient of {', '.join(odd[:3])} is not finite", "Scale the initial weights.")


@check
def takes_autocast(subject: Subject) -> None:
    """Under bfloat16 autocast it gives finite logits.

    ``precision = "bf16"`` runs it so.
    """
    module, info = classifier(subject)
    fix = "Make tensors in forward() in the dtype of the layer before."
    with torch.autocast("cpu", torch.bfloat16), advising(fix):
        found = evaluated(module, images(info))
    require(torch.isfinite(found).all(), "under autocast its logits are not finite", fix)
