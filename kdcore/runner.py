"""Drives a strategy: asks it for stages, gives it their results, and journals both so that a resume is a replay."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from . import NUMERICS, __version__
from .autosize import settled, told
from .card import check_images
from .codec import canonical, digest, encode
from .errors import Interrupted, PlanError, PluginError, PreflightError
from .executor import Context, Executor
from .files import replace_file
from .generators import kept
from .job import Event, Settings
from .keys import Keys, in_order
from .label_maps import seen_by
from .measure import Measure
from .named import Names
from .plan import Choice, Json, Outcome, Result, ResultRef, Stage
from .plugins import PluginHost
from .recipe import AUTO, Recipe, compile_recipe
from .record import Record
from .replay import first_binding, last, open_journal
from .store import Store
from .stored import check_stored
from .strategy import check_outcome, check_stages, start, view_result
from .summary import asked, chosen, placed, summarise


class Console(Protocol):
    """Shows a run to a person."""

    def handle(self, event: Event) -> None: ...


@dataclass
class Run:
    """A run of a recipe in its folder; running it again replays what is finished.

    Args:
        recipe: a checked recipe.
        host: loaded plugins.
        settings: how stages are executed.
        folder: journal, record, result, student and report.
        console: shown every event.
        jobs: stages at once.
        context: data, catalog and the stop flag of this process.
        allow_plugin_change: go on although other plugins are loaded than when the run began.
        warnings: what the result and the report must say beside the stages' own warnings.
        binding: index of the first journal record whose asks the strategy must repeat.
    """

    recipe: Recipe
    host: PluginHost
    settings: Settings
    folder: Path
    console: Console
    jobs: int
    context: Context
    allow_plugin_change: bool = False
    warnings: tuple[str, ...] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    binding: int = 0
    rehearsed: bool = False
    ending: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.store = Store(self.settings.store, lambda text: self.handle({"kind": "warning", "text": text}))
        self.record = Record(self.folder, lambda text: self.console.handle({"kind": "warning", "text": text}))
        load = self.context.load
        self.asked_for = self.recipe.data.batch_size
        self.recipe = settled(self.recipe, self.host.catalog, self.settings, load, self.folder / "journal.jsonl")
        view, self.strategy = compile_recipe(self.recipe, self.host.catalog)
        measure = Measure(self.host.catalog, load, view.data)
        self.names = Names(self.recipe, replace(view, measure=measure.model, estimate=measure.stage))
        self.view = self.names.noted()
        self.keys = Keys(self.host.catalog, self.recipe.seed, self.settings, lambda spec: str(load(spec).fingerprint))
        self.info = {"id": self.folder.name, "dir": str(self.folder), "seed": self.recipe.seed}

    @kept()
    def execute(self) -> dict[str, Any]:
        """Runs the strategy to its outcome; returns the content of result.json."""
        started = time.perf_counter()
        self.journal = open_journal(self.folder / "journal.jsonl")
        self.binding = first_binding(self.journal.records)
        self._check_given()
        self._record_run()
        self.record.begin()
        self.host.emit("kdcore_run_started", run=self.info)
        for text in self.warnings:
            self.handle({"kind": "warning", "text": text})
        self._record_batch_size()
        with self.ending, self._delivering_best():
            outcome = self._drive()
            named = [outcome.student, outcome.teacher, *(ref for refs in outcome.replicates.values() for ref in refs)]
            self._obtain([ref.stage for ref in named if ref is not None and isinstance(ref.stage, Stage)])
        result = summarise(self, outcome, time.perf_counter() - started)
        self._deliver(outcome, result)
        self.host.emit("kdcore_run_finished", run=self.info, outcome=result)
        if result["degraded"] != self.host.muted:
            result["degraded"] = dict(self.host.muted)  # this last hook muted one more
            self._deliver(outcome, result)
        return result

    def _record_batch_size(self) -> None:
        """Shows the batch size that was found, and journals it: a resume or a replay takes the same."""
        if self.asked_for != AUTO:
            return
        self.handle({"kind": "note", "name": "data", "text": told(self.recipe)})
        if not any(self.journal.of("batch_size")):
            self.journal.append({"kind": "batch_size", "value": self.recipe.data.batch_size})

    def _check_given(self) -> None:
        """Refuses given weights of a model for other images before anything is trained."""
        for role, model in (("teacher", self.view.teacher), ("student", self.view.student)):
            if model.weights is not None:
                info = self.context.load(self.view.data).info
                mapped = "" if model.label_map is None else f"{role}.label_map.of"
                check_images(model.weights, seen_by(model, self.host.catalog, info), f"{role}.weights", mapped)

    # ------------------------------------------------------------ the strategy

    def _drive(self) -> Outcome:
        plan = start(self.strategy, self.view, self.host)
        answer: Any = None
        number = 0
        while True:
            try:
                wanted = plan.send(answer)
            except StopIteration as end:
                return check_outcome(end.value, self.strategy)
            if isinstance(wanted, Choice):
                self._choose(wanted)
                answer = None
                continue
            stages = check_stages(wanted, self.strategy)
            self._replay(number, stages)
            self._obtain(stages)
            found = [self._result(stage) for stage in stages]
            answer = found if isinstance(wanted, list) else found[0]
            number += 1

    def _choose(self, choice: Choice) -> None:
        """Shows and journals what the strategy decided; a replay decides it again."""
        number, told = len(self.choices), chosen(self, choice)
        record = {"kind": "choice", "number": number, **{name: told[name] for name in ("text", "margin", "error")}}
        if last(self.journal, "choice", number) != record:
            self.journal.append(record)
        self.choices.append(choice)
        self.handle({"kind": "choice", **told})

    @contextmanager
    def _delivering_best(self) -> Iterator[None]:
        """A run that is interrupted leaves the best student so far; going on replaces it."""
        try:
            yield
        except Interrupted:
            if self.choices:
                self._write_student(self.choices[-1].best)
                self.handle({"kind": "best_so_far", "text": self.choices[-1].text, "folder": str(self.folder)})
            raise

    def _replay(self, number: int, stages: list[Stage]) -> None:
        """Compares what the strategy asks for with what it asked for before a kill."""
        now = {"plan": [s.identity for s in stages], "keys": [self.keys.of(s) for s in stages]}
        names = [stage.name for stage in stages]
        before = last(self.journal, "ask", number)
        binding = self.journal.records[self.binding :]
        if before is not None and before in binding and before["plan"] != now["plan"]:
            raise PlanError(
                f"step {number + 1} was {before['names']}, now it is {names}",
                where=f"strategy {self.strategy.name!r}",
                fix="plan() must depend on options and results alone: no clock, no random numbers, no set order.",
            )
        if before is None or before["keys"] != now["keys"]:
            if before is not None:
                self._unbind()  # code or data changed
            self.journal.append({"kind": "ask", "number": number, "names": names, **now})

    def _unbind(self) -> None:
        """What was asked for so far binds no longer: from here on the strategy may ask for something else."""
        self.binding = len(self.journal.records)

    def _obtain(self, stages: list[Stage]) -> None:
        """Brings the results of the stages, and of all that they need, from the store or from training."""
        wanted = [s for s in in_order(stages, self.keys) if self.keys.of(s) not in self.results]
        self.stages |= {self.keys.of(stage): stage for stage in wanted}
        if wanted:
            self.handle({"kind": "asked", "stages": [asked(self, self.keys.of(stage)) for stage in wanted]})
        missing = [stage for stage in wanted if not self._reuse(self.keys.of(stage))]
        if len(missing) < len(wanted):
            self._record_curves()  # once: a long search may find everything there
        if missing:
            self._rehearse()
            jobs = [self.keys.job(stage) for stage in missing]
            with closing(self.executor.execute(jobs, self.handle)) as finished:  # type: ignore[type-var]
                for key, result in finished:
                    self._accept(key, {"reused": False, **check_stored(result, key)})
                    self._record_curves()

    def _rehearse(self) -> None:
        """Before the first stage that is trained: a student's fault must not show after its teacher's hours."""
        if not self.rehearsed:
            from .training.rehearsal import rehearse

            splits = self.context.load(self.view.data)
            rehearse(self.names, self.host.catalog, splits, self.store, self.settings)
            self.rehearsed = True

    def _reuse(self, key: str) -> bool:
        """Takes the result from the store, if it is there."""
        stored = self.store.result(key)
        if stored is not None:
            self._accept(key, {**check_stored(stored, key), "reused": True})
        return stored is not None

    def _record_curves(self) -> None:
        self.record.curves((s.name, self.results[key]) for key, s in self.stages.items() if key in self.results)

    @cached_property
    def executor(self) -> Executor:
        """Made when the first stage has to be trained."""
        spec = self.recipe.execute
        entry = self.host.catalog.find("executor", spec.name)
        executor: Executor = entry.load()(entry.options_class()(**spec.extras), self.context, self.jobs)
        self.ending.callback(executor.close)
        return executor

    def _accept(self, key: str, result: dict[str, Any]) -> None:
        summary = digest({name: member["curve"] for name, member in result["members"].items()})
        before = [r for r in self.journal.of("result") if r["key"] == key]
        if before and before[-1]["curves"] != summary:
            self._unbind()  # the store lost it and another machine trained it again
        if not before or before[-1]["curves"] != summary:
            record = {"kind": "result", "key": key, "name": self.stages[key].name, "curves": summary}
            cost = {"seconds": result["seconds"], "flops": sum(result["flops"].values()), "reused": result["reused"]}
            self.journal.append({**record, **cost})
        else:
            result = {**result, "seconds": before[-1]["seconds"]}  # what decided the first time decides again
        self.results[key] = {**result, **placed(self, key)}
        self.handle({"kind": "stage_finished", "key": key, "name": self.stages[key].name, "result": self.results[key]})
        if result["reused"]:
            for text in result["warnings"]:
                name = self.stages[key].name
                self.handle({"kind": "warning", "key": key, "name": name, "text": text, "preflight": True})
            self._compare_environment(key, result["environment"])

    def _compare_environment(self, key: str, made: Mapping[str, Json]) -> None:
        """Says once that a reused result was made by another torch or machine: its bits may differ from ours."""
        torch = version("torch").partition("+")[0]
        theirs = f"torch {made['torch'].partition('+')[0]} on {made['machine']}"
        if theirs != f"torch {torch} on {platform.machine()}":
            self.handle({"kind": "note", "key": key, "name": self.stages[key].name, "text": f"was made with {theirs}"})

    def _result(self, stage: Stage) -> Result:
        """What the strategy sees: monitor accuracies, curves and costs, nothing of the test split."""
        return view_result(stage, self.results[self.keys.of(stage)])

    # ------------------------------------------------------------ events

    def handle(self, event: Event) -> None:
        """Shows an event, journals starts, and tells observers."""
        self.console.handle(event)
        self.record.event(event)
        kind = event["kind"]
        if event.get("preflight") and self.settings.strict:
            raise PreflightError(event["text"], where=f"stage {event.get('name', '')!r}", fix="Leave out --strict.")
        if "key" not in event or event["key"] not in self.stages:
            return
        stage = self._stage_info(event["key"])
        if kind == "stage_started":
            self.journal.append({"kind": "start", "key": event["key"], "name": event["name"], "step": event["step"]})
            self.host.emit("kdcore_stage_started", run=self.info, stage=stage)
        elif kind == "stage_finished":
            self.host.emit("kdcore_stage_finished", run=self.info, stage=stage, result=event["result"])
        elif kind == "tick":
            self.host.emit(
                "kdcore_epoch_finished", run=self.info, stage=stage, epoch=event["tick"], metrics=event["metrics"]
            )
        elif kind == "log":
            self.host.emit("kdcore_log_line", run=self.info, stage=stage, step=event["step"], metrics=event["metrics"])
        elif kind == "checkpoint":
            self.host.emit(
                "kdcore_checkpoint_saved", run=self.info, stage=stage, step=event["step"], path=event["path"]
            )

    def _stage_info(self, key: str) -> dict[str, Json]:
        stage = self.stages[key]
        members = {name: str(member.model) for name, member in stage.members.items()}
        return {"key": key, "name": stage.name, "members": members, "length": stage.length}

    # ------------------------------------------------------------ files

    def _record_run(self) -> None:
        """Writes run.json, and journals plugins and code where they are new."""
        used = [self.host.origins[name] for name in sorted(self._used())]
        plugins = [[o.plugin, o.distribution, o.version] for o in used]
        code = digest([NUMERICS, [origin.code() for origin in used]])
        previous = list(self.journal.of("run"))
        before = previous[-1]["plugins"] if previous else plugins
        if before != plugins and not self.allow_plugin_change:
            changed = [p for p in [*before, *plugins] if (p in plugins) != (p in before)]
            text = ", ".join(" ".join(filter(None, p)) for p in changed)
            raise PluginError(
                f"the run began with other plugins (changed: {text})",
                where=str(self.folder),
                fix="Load the same ones, or give --allow-plugin-change.",
            )
        if not previous or (previous[-1]["plugins"], previous[-1]["code"]) != (plugins, code):
            self._unbind()  # the strategy may have been edited
            self.journal.append({"kind": "run", "plugins": plugins, "code": code, "kdcore": __version__})
        replace_file(self.folder / "run.json", pretty({**self._saved(), "plugins": plugins}))
        self.store.register(self.folder)

    def _used(self) -> set[str]:
        """Plugins that the recipe names; others may come and go."""
        view, find, execute = self.view, self.host.catalog.find, self.recipe.execute
        executed = [find("executor", execute.name).full_name, find("failure_policy", execute.failure.name).full_name]
        words = [view.teacher, view.student, view.objective, view.labels, view.optimizer, view.teacher_optimizer]
        text = canonical(encode([*words, view.data, view.controllers, self.strategy, executed], str))
        return {name for name in self.host.origins if f'"{name}/' in text}

    def _saved(self) -> dict[str, Json]:
        """What `kdcore resume` needs; paths in the recipe are relative to ``cwd``."""
        settings = self.settings
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "store": settings.store,
            "plugin_files": list(settings.plugin_files),
            "blocked": list(settings.blocked),
            "threads": settings.threads,
            "jobs": self.jobs,
            "world_size": settings.world_size,
            "cwd": str(Path.cwd()),
        }

    def _deliver(self, outcome: Outcome, result: dict[str, Any]) -> None:
        """student.safetensors, result.json and report.html, each replaced whole."""
        from .report import write

        self._write_student(outcome.student)
        replace_file(self.folder / "result.json", pretty(result))
        write(result, self.folder / "report.html")

    def _write_student(self, ref: ResultRef) -> None:
        assert isinstance(ref.stage, Stage)
        weights = self.store.weights(self.keys.of(ref.stage), ref.member).read_bytes()
        replace_file(self.folder / "student.safetensors", weights)


def pretty(data: Json) -> bytes:
    """Indented JSON for people."""
    import json

    return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"


def now() -> str:
    """The time of day in UTC, for records only."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
