"""Checks before the first step: is there anything to learn from the teacher, and do the losses say all of it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..card import find_card
from ..plan import ResultRef
from . import evaluate
from .member import Learner, classifies
from .session import Session

CONTROL = "control"
APART = 0.1  # of a deviation: another split of the same data moves them by less


def preflight(session: Session, inputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings about every frozen member that another one learns from, and about losses that leave classes untied.

    A teacher within two standard errors of the share of the largest class knows nothing; one that is not above the
    control, the student's architecture trained on labels alone, has nothing to teach. Weights that are given and saw
    images of another brightness or contrast are told too.
    """
    sources = {t.source for learner in session.learners.values() for t in learner.terms if t.source is not None}
    frozen = [session.learners[name] for name in sorted(sources) if not session.learners[name].terms]
    control = session.stage.uses.get(CONTROL)
    floor = None if control is None else inputs[str(control.stage)]["members"][control.member]["monitor_accuracy"]
    judged = [_judge(session, teacher, inputs, floor) for teacher in frozen if classifies(teacher.module)]
    untied = [_untied(learner) for learner in session.learners.values()]
    given = [_normalised(session, learner) for learner in session.learners.values()]
    return [text for texts in (*judged, *untied, *given) for text in texts]


def _normalised(session: Session, learner: Learner) -> list[str]:
    """Given weights saw images under the mean and deviation of the data that they were trained on."""
    path, splits = learner.spec.model.weights, session.splits
    card = None if path is None or learner.spec.init is not None else find_card(Path(path))
    if card is None:
        return []
    rows = list(zip(card.mean, card.std, splits.mean, splits.std, strict=True))
    if all(abs(mean - m) <= APART * s and abs(std - s) <= APART * s for mean, std, m, s in rows):
        return []
    numbers = "mean {:.3g} and deviation {:.3g}, here {:.3g} and {:.3g}".format(*rows[0])
    return [f"{learner.name} {learner.spec.model}: its weights were trained on images of {numbers} (first channel)"]


def _untied(learner: Learner) -> list[str]:
    """Class-normalised losses do not see what a class's logits are scaled by, or moved: the prediction is left open."""
    if not learner.terms or any(getattr(term.module, "normalize", None) != "class" for term in learner.terms):
        return []
    return [
        f'{learner.name} {learner.spec.model} learns by normalize="class" alone, which leaves the scale and offset of '
        "every class open and with them the prediction: add cross_entropy, or another loss on the logits as they are"
    ]


def _judge(session: Session, teacher: Learner, inputs: Mapping[str, Any], control: float | None) -> list[str]:
    accuracy = _accuracy(session, teacher, inputs)
    chance = session.splits.majority("monitor")
    error = math.sqrt(chance * (1 - chance) / len(session.splits.monitor))
    name = f"{teacher.name} {teacher.spec.model}"
    if accuracy <= chance + 2 * error:
        images = len(session.splits.monitor)
        told = f"{accuracy:.2%} on the monitor split is not distinguishable from the largest class alone"
        return [f"{name} is at chance: {told} ({chance:.2%}) on {images} images"]
    if control is not None and accuracy <= control:
        return [f"{name} has {accuracy:.2%} on the monitor split, not above the label-only control's {control:.2%}"]
    return []


def _accuracy(session: Session, teacher: Learner, inputs: Mapping[str, Any]) -> float:
    init = teacher.spec.init
    if isinstance(init, ResultRef):
        return float(inputs[str(init.stage)]["members"][init.member]["monitor_accuracy"])
    return evaluate.accuracy(session, teacher.module, session.splits.monitor)["accuracy"]
