"""kdcore: knowledge distillation as plugins on one runner.

Importing this package imports neither torch nor pydantic; names are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

NUMERICS = 2
"""Raised when a change to kdcore can change a trained weight; part of the key of every stage."""

_EXPORTS = {
    "errors": ("KdError RecipeError PluginError StorageError DataError NumericError DeviceError PlanError "
               "PreflightError Interrupted suggest"),
    "hookspecs": "hookimpl HOOKS_VERSION",
    "options": "Options Field",
    "registry": "Registrar",
    "plan": ("Stage Member Term Schedule Spec ModelRef ResultRef OptimizerSpec SourceSpec Set Drop Finish Decision "
             "Result MemberResult Choice Outcome TickView Controller labels_alone Plan Json"),
    "runview": "RunView ModelCost Strategy",
    "paired": "Difference paired_difference",
    "failure": "Failure FailurePolicy Retry",
    "job": "Job",
    "executor": "Executor Context perform under_lease",
    "pool": "Pool Worker WorkerProcess",
    "worker": "describe",
    "depot": "Depot open_depot",
    "deploy.classifier": "Classifier load_model",
    "deploy.export": "Exporter",
    "data": "Dataset Split Images TrainData DataInfo Batch Random Source SourceContext",
    "outputs": "Outputs Shapes Loss",
    "training.step": "StepContext",
    "transforms": "TransformContext",
    "api": "run distill",
    "runresult": "RunResult",
    "seeds": "derive",
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = ["NUMERICS", "__version__", *sorted(_HOME)]


if TYPE_CHECKING:  # the same names for type checkers, which would else see Any (a test compares the two)
    from .api import distill as distill
    from .api import run as run
    from .data import Batch as Batch
    from .data import DataInfo as DataInfo
    from .data import Dataset as Dataset
    from .data import Images as Images
    from .data import Random as Random
    from .data import Source as Source
    from .data import SourceContext as SourceContext
    from .data import Split as Split
    from .data import TrainData as TrainData
    from .deploy.classifier import Classifier as Classifier
    from .deploy.classifier import load_model as load_model
    from .deploy.export import Exporter as Exporter
    from .depot import Depot as Depot
    from .depot import open_depot as open_depot
    from .errors import DataError as DataError
    from .errors import DeviceError as DeviceError
    from .errors import Interrupted as Interrupted
    from .errors import KdError as KdError
    from .errors import NumericError as NumericError
    from .errors import PlanError as PlanError
    from .errors import PluginError as PluginError
    from .errors import PreflightError as PreflightError
    from .errors import RecipeError as RecipeError
    from .errors import StorageError as StorageError
    from .errors import suggest as suggest
    from .executor import Context as Context
    from .executor import Executor as Executor
    from .executor import perform as perform
    from .executor import under_lease as under_lease
    from .failure import Failure as Failure
    from .failure import FailurePolicy as FailurePolicy
    from .failure import Retry as Retry
    from .hookspecs import HOOKS_VERSION as HOOKS_VERSION
    from .hookspecs import hookimpl as hookimpl
    from .job import Job as Job
    from .options import Field as Field
    from .options import Options as Options
    from .outputs import Loss as Loss
    from .outputs import Outputs as Outputs
    from .outputs import Shapes as Shapes
    from .paired import Difference as Difference
    from .paired import paired_difference as paired_difference
    from .plan import Choice as Choice
    from .plan import Controller as Controller
    from .plan import Decision as Decision
    from .plan import Drop as Drop
    from .plan import Finish as Finish
    from .plan import Json as Json
    from .plan import Member as Member
    from .plan import MemberResult as MemberResult
    from .plan import ModelRef as ModelRef
    from .plan import OptimizerSpec as OptimizerSpec
    from .plan import Outcome as Outcome
    from .plan import Plan as Plan
    from .plan import Result as Result
    from .plan import ResultRef as ResultRef
    from .plan import Schedule as Schedule
    from .plan import Set as Set
    from .plan import SourceSpec as SourceSpec
    from .plan import Spec as Spec
    from .plan import Stage as Stage
    from .plan import Term as Term
    from .plan import TickView as TickView
    from .plan import labels_alone as labels_alone
    from .pool import Pool as Pool
    from .pool import Worker as Worker
    from .pool import WorkerProcess as WorkerProcess
    from .registry import Registrar as Registrar
    from .runresult import RunResult as RunResult
    from .runview import ModelCost as ModelCost
    from .runview import RunView as RunView
    from .runview import Strategy as Strategy
    from .seeds import derive as derive
    from .training.step import StepContext as StepContext
    from .transforms import TransformContext as TransformContext
    from .worker import describe as describe
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
