"""The tables of a recipe, with the text that an error says of each key."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, model_validator

from .options import Field, Options, Plain
from .plan import Json


class Table(Plain):
    """A table whose further keys are options of the thing it names."""

    model_config = ConfigDict(extra="allow")
    name_key: ClassVar[str] = "name"

    @property
    def extras(self) -> dict[str, Json]:
        return dict(self.model_extra or {})


class Named(Table):
    """``"cosine"``, or ``{ name = "step", milestones = [30, 60] }``."""

    name: str = Field(description="a name that `kdcore plugins` lists")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class ModelTable(Table):
    """``{ model = "cnn", size = 3 }``; further keys are the model's options. A weights file with a card says both."""

    name_key: ClassVar[str] = "model"
    model: str | None = Field(None, description='a model, e.g. { model = "cnn", size = 3 }')
    weights: str | None = Field(None, description="the path of a .safetensors file")
    label_map: Named | None = Field(
        None,
        description='a map of its classes to the data\'s, e.g. { name = "groups", of = 4, groups = [[0, 3], [1]] }',
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        return {"model": data} if isinstance(data, str) else data


class DataTable(Table):
    """The data set by name, its options, batches, split and augmentation."""

    name: str = Field(description='a data set, e.g. "digits"')
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        128, description='a number of samples from 1, or "auto"'
    )
    monitor: float = Field(0.1, gt=0, lt=1, description="the share of training data held out for decisions, e.g. 0.1")
    split_seed: int = Field(0, ge=0, lt=2**63, description="a seed from 0")
    drop_last: bool | None = Field(None, description="true or false")
    shift: int = Field(0, ge=0, description="pixels of random translation, e.g. 1 (CIFAR: 4)")
    flip: bool = Field(False, description="true or false")
    transforms: tuple[Named, ...] = Field((), description='a list like ["flip", { name = "shift", pixels = 1 }]')
    workers: int | None = Field(
        None, ge=0, le=512, description="processes that read images, from 0; the cores by default"
    )
    source: Named = Field(Named(name="epochs"), description='a name, e.g. "epochs"')


class TrainTable(Options):
    """How members are trained."""

    epochs: int = Field(30, ge=1, description="a number of epochs from 1")
    lr: float = Field(0.05, gt=0, description="a learning rate above 0")
    lr_batch: int | None = Field(None, ge=1, description="the batch size that train.lr is meant for, e.g. 256")
    lr_scaling: Literal["linear", "sqrt"] | None = Field(
        None, description='how the rate grows with the batch size: "linear" or "sqrt"'
    )
    optimizer: Named = Field(Named(name="sgd"), description='"sgd", or { name = "sgd", momentum = 0.9 }')
    schedule: Named = Field(Named(name="cosine"), description='"cosine", or { name = "step", milestones = [30, 60] }')
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up, from 0")
    clip: float | None = Field(None, gt=0, description="the largest gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="the decay of a moving average of weights, e.g. 0.999")
    accumulate: int = Field(1, ge=1, description="in how many pieces a batch is trained, from 1")
    keep: Literal["last", "best"] = Field("last", description='"last", or "best" (on the monitor split)')
    ledger: int = Field(0, ge=0, description="steps between two looks at the terms' gradients; 0 for none")
    teacher: dict[str, Any] = Field({}, description="keys of train that differ for the teacher")


class ObjectiveTable(Table):
    """One term of the student's objective; further keys are the loss's options."""

    name_key: ClassVar[str] = "loss"
    loss: str = Field(description='a loss, e.g. "dkd"')
    name: str = Field("", pattern=r"^[a-z0-9_-]*$", description="a name for knobs and curves, of a-z, 0-9, - and _")
    weight: float = Field(1.0, ge=0, description="a weight from 0")
    warmup_epochs: float = Field(0, ge=0, description="epochs over which the weight grows, from 0")
    schedule: Named = Field(Named(name="constant"), description='the shape of the weight, "constant" or e.g. "cosine"')


class CacheTable(Options):
    """Outputs of frozen members that are stored."""

    views: int = Field(1, ge=1, description="after how many epochs augmentations repeat, from 1")
    top: int = Field(0, ge=0, description="how many logits of a sample are stored, the largest; 0 for all")


class ExecuteTable(Table):
    """Where stages run."""

    name: str = Field("local", description='an executor, e.g. "local"')
    jobs: int = Field(1, ge=1, description="how many stages may run at once, from 1")
    log_every: int = Field(50, ge=1, description="steps between two log points")
    failure: Named = Field(Named(name="stop"), description='what to do when memory runs out: "stop" or "retry"')
    checkpoint_seconds: float = Field(20, ge=0, description="seconds between checkpoints; 0 for every epoch")


class PluginsTable(Options):
    """What must be installed."""

    require: tuple[str, ...] = Field((), description='a list like ["acme>=1.0"]')
