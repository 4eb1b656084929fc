"""torch.compile takes the losses whole, and a schedule of numbers or batch sizes compiles nothing anew."""

import itertools

import pytest
import torch

from kdcore.losses import DKDLoss, KDLoss, dkd_loss, kd_loss

CLASSES = 7
LOSSES = {"kd": kd_loss, "dkd": dkd_loss}
pytestmark = [
    pytest.mark.usefixtures("compiled_op"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def compiled(function, backend="aot_eager", **settings):
    """All of inductor but its code generation, which is what takes the time."""
    return torch.compile(function, fullgraph=True, backend=backend, **settings)


def sample(rows=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, CLASSES, generator=generator).to(dtype) for _ in range(2))
    target = torch.arange(rows) % CLASSES
    target[1] = -100
    return student.requires_grad_(), teacher, target


def same(function, traced, student, teacher, target, *args, **settings):
    """Value, parts and gradient are those of the eager call."""
    found = []
    for call in (function, traced):
        value, parts = call(student, teacher, target, *args, return_parts=True, **settings)
        found.append((value.detach(), parts, torch.autograd.grad(3 * value.sum(), student)[0]))
    torch.testing.assert_close(*found)


def never_again():
    return torch._dynamo.config.patch(error_on_recompile=True)


def schedule(loss, tick):
    """Numbers that change at every step."""
    numbers = {"temperature": 1.0 + tick / 3, "kd_weight": 2.0 / (1 + tick), "ce_weight": 0.1 + tick}
    return {**numbers, "alpha": 0.5 + tick, "beta": 8.0 - tick} if loss is dkd_loss else numbers


FEW = {  # the others take a minute: they are for test-long
    ("dkd", "class", "mean", True),
    ("dkd", "class", "mean", None),  # numbers and sizes become dynamic when they first change
    ("dkd", "class", "none", True),
    ("kd", "none", "mean", True),
    ("kd", "instance", "sum", True),
}
EVERY = itertools.product(LOSSES, ("none", "class", "instance"), ("mean", "sum", "none"), (True, None))


@pytest.mark.parametrize(
    ("name", "mode", "reduction", "dynamic"),
    [pytest.param(*case, marks=[] if case in FEW else pytest.mark.long) for case in EVERY],
)
def test_one_graph_serves_every_number_and_batch_size(name, mode, reduction, dynamic):
    loss = LOSSES[name]
    traced = compiled(loss, dynamic=dynamic)

    def step(tick):
        numbers = schedule(loss, tick)
        same(loss, traced, *sample(4 + 3 * tick, seed=tick), normalize=mode, reduction=reduction, **numbers)

    step(0)
    step(1)
    with never_again():
        for tick in range(2, 6):
            step(tick)


@pytest.mark.parametrize("module", [KDLoss, DKDLoss])
def test_a_modules_attributes_may_be_scheduled(module):
    loss = module(normalize="class", return_parts=True)
    function = LOSSES["kd" if module is KDLoss else "dkd"]
    traced = compiled(loss, dynamic=True)

    def step(tick):
        numbers = schedule(function, tick)
        for name, value in numbers.items():
            setattr(loss, name, value)
        student, teacher, target = sample(seed=tick)
        for call in (loss, traced):
            value, parts = call(student, teacher, target)
            expected = function(student, teacher, target, normalize="class", return_parts=True, **numbers)
            torch.testing.assert_close((value, parts), expected)

    step(0)
    step(1)
    with never_again():
        for tick in range(2, 6):
            step(tick)


def given(student, teacher):
    return (0.1 * student.mean(0), student.var(0) + 0.1, 0.1 * teacher.mean(0), teacher.var(0) + 0.1)


OTHERS = {
    "unlabelled": (kd_loss, lambda s, t, y: {"target": None}),
    "teacher": (dkd_loss, lambda s, t, y: {"target": "teacher", "ce_weight": 0.5}),
    "soft": (dkd_loss, lambda s, t, y: {"target": t.softmax(1), "ce_weight": 0.5, "label_smoothing": 0.1}),
    "soft-rows": (kd_loss, lambda s, t, y: {"target": t.softmax(1), "ce_weight": 0.5, "reduction": "none"}),
    "beta-by-row": (dkd_loss, lambda s, t, y: {"beta": torch.arange(6.0)}),
    "detached": (dkd_loss, lambda s, t, y: {"normalize": "class", "stats": "detached"}),
    "given": (dkd_loss, lambda s, t, y: {"normalize": "class", "stats": given(s.detach(), t)}),
    "given-rows": (kd_loss, lambda s, t, y: {"normalize": "class", "stats": given(s.detach(), t), "reduction": "none"}),
    "integers": (dkd_loss, lambda s, t, y: {"temperature": 2, "kd_weight": 3, "eps": 0.1, "normalize": "instance"}),
    "learned": (kd_loss, lambda s, t, y: {"temperature": torch.tensor(2.0, requires_grad=True)}),
    "weights": (dkd_loss, lambda s, t, y: {"kd_weight": torch.tensor(2.0), "beta": torch.tensor(3.0)}),
    "teacher-grad": (kd_loss, lambda s, t, y: {"teacher_grad": True, "normalize": "class"}),
    "reference": (dkd_loss, lambda s, t, y: {"backend": "reference"}),
    "cpu": (dkd_loss, lambda s, t, y: {"backend": "cpu"}),
}


SLOW = {"weights", "teacher-grad", "reference"}  # traced through the reference, as "learned" is


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in SLOW else ()) for n in OTHERS])
def test_every_kind_of_call_is_one_graph(name):
    loss, change = OTHERS[name]
    student, teacher, target = sample()
    teacher.requires_grad_()
    settings = {"target": target, **change(student, teacher, target)}
    same(loss, compiled(loss, dynamic=True), student, teacher, settings.pop("target"), **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_dtype_is_traced(dtype, reduction):
    same(dkd_loss, compiled(dkd_loss, dynamic=True), *sample(dtype=dtype), normalize="class", reduction=reduction)


def test_without_a_gradient_none_is_computed():
    traced, (student, teacher, target) = compiled(dkd_loss, dynamic=True), sample()
    with torch.no_grad():
        found = traced(student, teacher, target)
    assert not found.requires_grad
    torch.testing.assert_close(found, dkd_loss(student, teacher, target).detach())


def test_a_label_outside_the_classes_is_found_where_the_graph_runs():
    traced, (student, teacher, target) = compiled(dkd_loss, dynamic=True), sample()
    traced(student, teacher, target)
    target[3] = CLASSES
    with pytest.raises(IndexError, match=f"label {CLASSES} is outside"):
        traced(student, teacher, target)


def test_a_transform_of_the_loss_is_one_graph():
    student, teacher, target = sample()

    def function(s):
        return dkd_loss(s, teacher, target, normalize="class")

    (expected,) = torch.autograd.grad(function(student), student)
    torch.testing.assert_close(compiled(torch.func.grad(function))(student.detach()), expected)


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.loss = torch.nn.Linear(3, CLASSES), DKDLoss(normalize="class", ce_weight=1.0)

    def forward(self, x, teacher, target):
        return self.loss(self.head(x), teacher, target)


def test_an_exported_model_holds_the_op():
    _, teacher, target = sample()
    model, x = Student(), torch.randn(6, 3)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"x": {0: rows}, "teacher": {0: rows}, "target": {0: rows}}
    exported = torch.export.export(model, (x, teacher, target), dynamic_shapes=shapes)
    assert torch.ops.kdcore.fused_dynamic.default in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x[:4], teacher[:4], target[:4]), model(x[:4], teacher[:4], target[:4]))


@pytest.mark.parametrize(
    "reduction", ["mean", pytest.param("sum", marks=pytest.mark.long), pytest.param("none", marks=pytest.mark.long)]
)
def test_inductor_trains_a_model_as_eager_does(reduction):
    model = Student()
    model.loss.reduction = reduction
    traced = torch.compile(model, fullgraph=True, dynamic=True)
    for tick in range(3):
        model.loss.temperature = 2.0 + tick
        student, teacher, target = sample(4 + 3 * tick, seed=tick)
        x, grads = student[:, :3].detach(), []
        for call in (model, traced):
            model.zero_grad()
            value = call(x, teacher, target).sum()
            value.backward()
            grads.append((value.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        torch.testing.assert_close(*grads)
