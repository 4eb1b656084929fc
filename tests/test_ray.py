"""The executor ray: the same weights from the machines of a cluster, whatever dies there. `make test-ray` has Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from kdcore_ray import executor
from kdcore_ray.parcel import make_parcel, open_parcel, pack_results
from small import RECIPE, Quiet, file_hash, make_run, weights
from test_workers import alive, wait_for

from kdcore.errors import DeviceError, RecipeError, StorageError
from kdcore.job import Settings
from kdcore.plugins import load_plugins
from kdcore.store import Store

PLUGIN = Path(__file__).parent / "pair_plugin.py"
HOLD = "KDCORE_TEST_HOLD"
PAIR = ("train.epochs=5", "data.batch_size=64", "execute.checkpoint_seconds=0", "strategy.name='pair'")
RAY = "execute.name='ray'"
SEARCH = {
    **RECIPE,
    "train": {"epochs": 2, "lr": 0.1},
    "strategy": {
        "name": "search",
        "mode": "exhaustive",
        "candidates": [{"model": "mlp", "size": 2, "width": 16}],
    },
}
SLOW = """
strategy = { name = "pair", seconds = 0.01 }
threads = 1
data = { name = "digits", batch_size = 64 }
teacher = { model = "mlp", size = 2 }
student = { model = "mlp", size = 1 }
train = { epochs = 20 }
execute = { name = "ray", jobs = 2, checkpoint_seconds = 0 }
"""
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
quiet = pytest.mark.filterwarnings("ignore::Warning:ray", "ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def host():
    return load_plugins(files=[PLUGIN])


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A cluster of two machines with a CPU each."""
    from ray.cluster_utils import Cluster

    hold = tmp_path_factory.mktemp("hold") / "hold"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(HOLD, str(hold))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def hold(machines):
    """The file that holds the stages of the cluster at their 60th step."""
    path = Path(os.environ[HOLD])
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, host):
    """The pair of stages in one process."""
    root = tmp_path_factory.mktemp("alone")
    make_run(root, host=host, sets=PAIR).execute()
    return root


def at(cluster) -> tuple[str, str]:
    """What a recipe says to run there."""
    return RAY, f"execute.address={cluster.address!r}"


def parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def descendants(process: int) -> list[int]:
    """All processes below one, whichever of its threads started them."""
    below: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        below.setdefault(parent(int(path.name)), []).append(int(path.name))
    found = [process]
    for one in found:
        found += below.get(one, [])
    return found[1:]


def trainers(process: int) -> list[int]:
    """Worker processes among them."""
    return [one for one in descendants(process) if is_trainer(one)]


def is_trainer(process: int) -> bool:
    try:
        return b"kdcore.worker" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------- without Ray


def test_without_ray_the_plugin_is_listed_and_a_recipe_that_names_it_says_what_to_install(cli, tiny, monkeypatch):
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    assert re.search(r"ray: the machines of a Ray", cli("plugins").out)
    done = cli("run", tiny('execute = { name = "ray" }'))
    assert done.code == 3
    assert "Ray is not installed. Write: pip install 'kdcore[ray]'" in done.err
    assert cli("run", tiny('execute = { name = "ray", cpu = 2 }')).code == 2


def parcel_of(tmp_path, host):
    """A finished teacher, its student's job with files of its own, and what is sent of them."""
    weights_file, plugin_file = tmp_path / "start.safetensors", tmp_path / "helper_plugin.py"
    plugin_file.write_text("import kdcore\n\n\n@kdcore.hookimpl\ndef kdcore_register(registry):\n    pass\n")
    made = make_run(tmp_path)
    made.execute()
    weights_file.write_bytes((tmp_path / "run" / "student.safetensors").read_bytes())
    job = next(job for job in map(made.keys.job, made.stages.values()) if job.needs)
    job.stage["members"]["student"]["model"]["weights"] = str(weights_file)
    job = replace(job, settings=replace(job.settings, plugin_files=(str(plugin_file),)))
    store = Store(tmp_path / "store")
    store.save_checkpoint(job.key, 7, {"state.json": b"{}"})
    return job, make_parcel(job, store), [pack_results(store, [key]) for key in job.needs]


def test_a_parcel_brings_all_that_a_stage_needs_to_a_machine_that_has_nothing(tmp_path, host):
    job, parcel, results = parcel_of(tmp_path, host)
    content = (tmp_path / "start.safetensors").read_bytes()
    (tmp_path / "start.safetensors").unlink()
    (tmp_path / "helper_plugin.py").write_text("another version")
    there = tmp_path / "there"
    opened = open_parcel(parcel, results, there)
    store = Store(opened.settings.store)
    assert store.root == there / "store"
    assert store.stored() == sorted(job.needs)
    assert (store.checkpoint(job.key) / "state.json").read_bytes() == b"{}"
    assert Path(opened.stage["members"]["student"]["model"]["weights"]).read_bytes() == content
    (plugin,) = map(Path, opened.settings.plugin_files)
    assert there in plugin.parents
    assert plugin.name == "helper_plugin.py"
    assert (opened.key, opened.needs, opened.code) == (job.key, job.needs, job.code)


def test_a_bit_that_flips_on_the_way_is_noticed(tmp_path, host):
    _, parcel, results = parcel_of(tmp_path, host)
    step, files = parcel["checkpoint"]
    with pytest.raises(StorageError):
        open_parcel(parcel, [results[0].replace(b'"seconds"', b'"secondz"')], tmp_path / "result")
    for name, data in files.items():
        damaged = {**parcel, "checkpoint": (step, {**files, name: data.replace(b"{", b"[", 1)})}
        with pytest.raises(StorageError):
            open_parcel(damaged, results, tmp_path / name)


# ---------------------------------------------------------------- with Ray


LOCAL = """
import os, subprocess, sys
from kdcore_ray.executor import ask_for_token
ask_for_token()
from kdcore_ray.cluster import connect
connect("local")
import ray
address = ray.get_runtime_context().gcs_address
program = f"import ray; ray.init({address!r}, logging_level='ERROR')"
without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
others = ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, dict(os.environ))
print([subprocess.run([sys.executable, "-c", program], env={**without, **other}).returncode for other in others])
"""


@needs_ray
def test_a_local_cluster_takes_orders_of_its_own_run_alone(tmp_path):
    """Of a program that has its token, and of none that has another, or none."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", LOCAL]
    done = subprocess.run(command, env={**clean, "HOME": str(tmp_path)}, stdout=subprocess.PIPE, stderr=-3, text=True)
    assert done.stdout.splitlines()[-1] == "[1, 1, 0]"


@quiet
@needs_ray
def test_a_stage_that_is_larger_than_any_machine_says_so(tmp_path, monkeypatch):
    """It waits for one that may join; nothing joins a cluster of this machine alone."""
    import ray
    from kdcore_ray import worker
    from kdcore_ray.cluster import Cluster
    from kdcore_ray.options import RayOptions

    job = SimpleNamespace(name="big", key="k", settings=Settings("", threads=2))
    told, cluster = [], object.__new__(Cluster)
    cluster.options, cluster.started = RayOptions(gpus=0), True
    slot = worker.RayWorker(cluster, lambda: 0, job, lambda slot, message: told.append(message["text"]))
    machines = [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    with pytest.raises(DeviceError, match=r"stage 'big': this machine is too small for the stage's 2 CPUs and 0 GPUs"):
        cluster.actor(job)
    slot._tell_pending(job)
    machines[1]["Alive"] = True
    slot._tell_pending(job)
    assert told[0] == "no machine of the cluster has 2 CPUs and 0 GPUs; waiting for one that joins it"
    assert told[1] == "the cluster has no room for it yet (2 CPUs and 0 GPUs); waiting"


@needs_ray
@pytest.mark.parametrize("error", [RuntimeError("x"), "RayError", SystemExit(1)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_slot_tells_how_its_stage_ended_whatever_happens(error):
    from kdcore_ray import worker
    from ray.exceptions import RayError

    class Broken:
        @property
        def options(self):
            raise RayError if error == "RayError" else error

    told = []
    slot = worker.RayWorker(Broken(), lambda: 0, None, lambda slot, message: told.append(message))
    slot.begin(None)
    slot.end(time.monotonic() + 5)
    assert [message and message["what"] for message in told] == ["x" if isinstance(error, RuntimeError) else None]
    assert slot.how == ("RayError" if error == "RayError" else "no reason is known")


@quiet
@needs_ray
def test_a_search_on_a_cluster_equals_one_with_worker_processes(tmp_path, machines):
    """With more stages at once than the cluster has room for."""
    local = make_run(tmp_path / "local", recipe=SEARCH, jobs=2)
    there = make_run(tmp_path / "ray", recipe=SEARCH, sets=at(machines), jobs=3)
    wanted, found = local.execute(), there.execute()
    assert weights(tmp_path / "ray") == weights(tmp_path / "local")
    assert len(weights(tmp_path / "ray")) > 1
    assert file_hash(tmp_path / "ray/run/student.safetensors") == file_hash(tmp_path / "local/run/student.safetensors")
    assert {stage["key"] for stage in found["stages"]} == {stage["key"] for stage in wanted["stages"]}
    ticks = [{(event["key"], event["tick"]) for event in run.console.kinds("tick")} for run in (local, there)]
    assert ticks[0] == ticks[1]
    holders = {path.read_text() for path in (tmp_path / "ray/store/leases").iterdir() if len(path.name) == 64}
    assert holders == {f"process {os.getpid()}"}  # no other process touches the store


class Killer(Quiet):
    """Kills as soon as both stages have a checkpoint, then lets those that are held go on."""

    def __init__(self, hold: Path, kill) -> None:
        super().__init__()
        self.hold, self.kill = hold, kill

    def handle(self, event) -> None:
        super().handle(event)
        if self.hold.exists() and len({event["name"] for event in self.kinds("checkpoint")}) == 2:
            self.kill()
            self.hold.unlink()


@quiet
@needs_ray
@pytest.mark.parametrize("victim", ["process", "actor", "machine"])
def test_what_dies_in_the_middle_goes_on_from_its_checkpoint_to_the_same_weights(
    tmp_path, machines, hold, host, alone, victim
):
    def kill():
        if victim == "machine":
            machines.remove_node(machines.worker_nodes.copy().pop(), allow_graceful=False)
            machines.add_node(num_cpus=1)
            return
        for process in trainers(os.getpid()):
            os.kill(process if victim == "process" else parent(process), signal.SIGKILL)

    made = make_run(tmp_path, host=host, sets=(*PAIR, *at(machines)), jobs=2)
    made.console = Killer(hold, kill)
    made.execute()
    assert weights(tmp_path) == weights(alone)
    steps = {}
    for record in made.journal.of("start"):
        steps.setdefault(record["key"], []).append(record["step"])
    again = [found for found in steps.values() if len(found) == 2]
    assert len(again) == (1 if victim == "machine" else 2)
    assert all(first == 0 < second for first, second in again)
    texts = [event["text"] for event in made.console.kinds("warning") if "worker died" in event["text"]]
    assert len(texts) == len(again)
    how = r"exit code -9" if victim == "process" else r"The actor .+"
    assert all(re.fullmatch(rf"the worker died \({how}\); .* goes on from its last checkpoint", text) for text in texts)
    assert not list((tmp_path / "store/unfinished").iterdir())


@quiet
@needs_ray
def test_a_stage_whose_workers_always_die_is_a_device_error_after_so_many_tries(tmp_path, machines, host):
    def kill():
        for process in trainers(os.getpid()):
            os.kill(process, signal.SIGKILL)

    class Always(Quiet):
        def handle(self, event) -> None:
            super().handle(event)
            if event["kind"] == "checkpoint":
                kill()

    made = make_run(
        tmp_path, host=host, sets=(*PAIR, *at(machines), "execute.tries=2", "strategy.seconds=0.02"), jobs=2
    )
    made.console = Always()
    # Ray's own word where a busy machine made it lose the actor too
    with pytest.raises(DeviceError, match=r"its worker died 2 times \((exit code -9|The actor died)"):
        made.execute()
    assert wait_for(lambda: not trainers(os.getpid()), 5)


@quiet
@needs_ray
def test_an_error_comes_back_as_it_is_with_worker_processes(tmp_path, machines, host):
    found = []
    for name, sets in (("local", ()), ("ray", at(machines))):
        made = make_run(tmp_path / name, host=host, sets=(*PAIR, *sets, "strategy.fail='boom'"), jobs=2)
        with pytest.raises(RuntimeError) as error:
            made.execute()
        found.append((type(error.value), str(error.value).splitlines()[0], error.value.__notes__))
    assert found[0] == found[1]
    assert any("pair_plugin.py line" in note for note in found[1][2])
    given = {**RECIPE, "train": {"epochs": 2, "lr": 1e30}}
    texts = []
    for name, sets in (("local", ()), ("ray", at(machines))):
        with pytest.raises(Exception) as error:  # noqa: PT011 - what it is with worker processes
            make_run(tmp_path / f"{name}-nan", recipe=given, sets=sets, jobs=2).execute()
        texts.append((type(error.value), str(error.value)))
    assert texts[0] == texts[1]


@quiet
@needs_ray
def test_a_shared_store_is_used_where_it_is(tmp_path, machines, host, alone):
    made = make_run(tmp_path, host=host, sets=(*PAIR, *at(machines), "execute.shared=true"), jobs=2)
    made.execute()
    assert weights(tmp_path) == weights(alone)
    holders = {path.read_text() for path in (tmp_path / "store/leases").iterdir() if len(path.name) == 64}
    assert f"process {os.getpid()}" not in holders


@quiet
@needs_ray
def test_the_address_of_a_ray_client_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is for Ray clients"):
        make_run(tmp_path, sets=(RAY, "execute.address='ray://127.0.0.1:1'")).execute()


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_cluster_after_checkpoints_and_the_run_goes_on_without_it(tmp_path, number):
    """Ctrl-C in a terminal reaches every process of the group, those of Ray too."""
    (tmp_path / "r.toml").write_text(SLOW)
    command = [sys.executable, "-m", "kdcore", "run", "r.toml", "--plugin-file", str(PLUGIN)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-3, stderr=-3, start_new_session=True) as driver:
        assert wait_for(lambda: len({p.parent for p in tmp_path.glob("runs/store/unfinished/*/ckpt-*")}) == 2, 90)
        there = descendants(driver.pid)
        before = {path.parent.name: path.name for path in sorted(tmp_path.glob("runs/store/unfinished/*/ckpt-*"))}
        (os.killpg if number == signal.SIGINT else os.kill)(driver.pid, number)
        assert driver.wait(60) == 128 + number
    after = {path.parent.name: path.name for path in sorted(tmp_path.glob("runs/store/unfinished/*/ckpt-*"))}
    assert after.keys() == before.keys()
    assert all(after[key] >= before[key] for key in before)
    assert wait_for(lambda: not any(map(alive, there)), 15)
    local = ["--set", "execute.name='local'", "--allow-plugin-change"]
    assert subprocess.run([*command, *local], cwd=tmp_path, stdout=-3, stderr=-3).returncode == 0
    (journal,) = tmp_path.glob("runs/r-*/journal.jsonl")
    starts = re.findall(r'"kind": ?"start".*?"step": ?(\d+)', journal.read_text())
    assert len(starts) == 4
    assert all(int(step) > 0 for step in starts[2:])


@quiet
@needs_ray
@pytest.mark.parametrize("place", ["joined", "started"])
def test_the_stages_of_a_killed_driver_end_within_seconds(tmp_path, machines, place):
    address = machines.address if place == "joined" else "local"
    (tmp_path / "r.toml").write_text(SLOW)
    command = [sys.executable, "-m", "kdcore", "run", "r.toml", "--plugin-file", str(PLUGIN)]
    command += ["--set", f"execute.address={address!r}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-3, stderr=-3, start_new_session=True) as driver:
        assert wait_for(lambda: len({p.parent for p in tmp_path.glob("runs/store/unfinished/*/ckpt-*")}) == 2, 90)
        processes = trainers(os.getpid())
        assert len(processes) == 2
        there = [*processes, *map(parent, processes)]
        driver.kill()
    assert wait_for(lambda: not any(map(alive, there)), 20)
