"""A loss and a controller in one file: kdcore run RECIPE --plugin-file examples/match_and_cool.py"""

import torch.nn.functional as F
from torch import nn

import kdcore


@kdcore.hookimpl
def kdcore_register(registry):
    registry.loss("match", Match, about="mean squared difference of logits (Ba & Caruana 2014)")
    registry.controller("cool", Cool, about="lowers a temperature as training goes")


class Match(nn.Module):
    needs = frozenset({"logits"})  # of {"logits", "taps", "index", "target"}
    shift_invariant = False  # of a promise that most losses keep: see docs/plugin-reference.md

    @classmethod
    def build(cls, shapes, options):  # options: an instance of cls.Options, if it has one
        return cls()

    def forward(self, student, teacher, batch):  # Outputs with .logits [B, C] and .taps; batch.target [B]
        return F.mse_loss(student.logits, teacher.logits.detach())


class Cool:
    class Options(kdcore.Options):
        knob: str = kdcore.Field("student.kd.temperature", description="a knob: MEMBER.TERM.OPTION")
        factor: float = kdcore.Field(0.9, gt=0, lt=1, description="a factor between 0 and 1")

    needs = frozenset()  # of {"accuracy", "loss", ...} or the names of registered metrics

    def __init__(self, options):
        self.options = options

    def decide(self, view):  # after every epoch; view.now("student", "accuracy"), view.curves, view.knobs, view.tick
        value = view.knobs[self.options.knob] * self.options.factor
        return [kdcore.Set(self.options.knob, value, "one epoch cooler")]

    def state_dict(self):  # JSON; what decide() must remember over a resume
        return {}

    def load_state_dict(self, state):
        pass
