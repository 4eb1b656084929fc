"""Times whole training steps, from stored images to updated weights, against other ways. README.md says how to read it.

python benchmarks/bench_training.py --batches 64,256,1024   # resnet32x4 -> resnet8x4; writes results/; 50 minutes
python benchmarks/bench_training.py --batches 64 --ways "published;live" --rounds 3    # a part; prints
python benchmarks/bench_training.py --device cuda --batches 1024,256,4096,64
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from losses_report import ROOT, git, processor
from training_report import EPOCH, Record, page, record
from training_ways import KEPT, NEEDS, WAYS, Setting

import kdcore

SAMPLE_SECONDS = 2.0  # a sample is at least that long, and a step
LEAST_ROUNDS = 3
SAMPLES = {"cpu": 8192, "cuda": EPOCH["images"]}  # images of the data set; few make an epoch of few steps
SHARED = ("teacher", "student", "device", "threads", "workers", "precision")  # by all settings
T = TypeVar("T")


class EndedError(Exception):
    """A way's process is over, and why."""


class Racer:
    """Processes that train in one way, one sample at a time, and are stopped while the others have theirs.

    Stopped, and not only silent: a DataLoader's workers read ahead.
    """

    def __init__(self, setting: Setting) -> None:
        self.name, self.count = setting.name, 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "OMP_WAIT_POLICY": "passive"}
        program = Path(__file__).with_name("training_ways.py")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            process_group=0,
        )  # fmt: skip
        self._tell(json.dumps(asdict(setting) | {"folder": self.folder.name}))

    def __enter__(self) -> Racer:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        with suppress(BrokenPipeError), self.process:
            pass  # its pipes are closed, and it is waited for
        self.folder.cleanup()

    def begin(self) -> None:
        """Compiles and fills caches."""
        self.sample()
        print(f"{self.name} is ready", file=sys.stderr, flush=True)

    def settle(self) -> None:
        """Settles how many steps a sample has."""
        self.count = max(1, round(SAMPLE_SECONDS / self.sample()))

    def sample(self) -> float:
        """Seconds a step."""
        self._signal(signal.SIGCONT)
        self._tell(str(self.count))
        seconds = float(self._answer())
        self._signal(signal.SIGSTOP)
        return seconds / self.count

    def end(self) -> Record:
        """What it cost besides time."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.close()
        found: Record = self._answer()
        return found

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def _tell(self, text: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: _answer says so
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EndedError(f"ended with exit code {self.process.wait()}")
        found = json.loads(line)
        if isinstance(found, dict) and "ended" in found:
            raise EndedError(found["ended"])
        return found


class Field:
    """Those that still race. Whose process ends is out, with a word, and the others go on."""

    def __init__(self, racers: Iterable[Racer]) -> None:
        self.racers, self.out = {racer.name: racer for racer in racers}, dict[str, str]()

    def each(self, act: Callable[[Racer], T], names: Iterable[str] | None = None) -> dict[str, T]:
        """What all give one after the other, in this order."""
        found = {}
        for name in list(self.racers) if names is None else names:
            try:
                found[name] = act(self.racers[name])
            except EndedError as error:
                self.out[name] = str(error)
                del self.racers[name]
                print(f"{name} is out: {error}", file=sys.stderr, flush=True)
        return found


def race(batch: int, args: argparse.Namespace) -> Record:
    """Interleaved samples of every way at one batch size, in another order each round."""
    print(f"batch {batch}", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        field = Field([stack.enter_context(Racer(setting)) for setting in settings(batch, args)])
        field.each(Racer.begin)
        field.each(Racer.settle)  # now that none of them is still beginning
        samples = [field.each(Racer.sample, random.sample([*field.racers], len(field.racers))) for _ in rounds(args)]
        costs = field.each(Racer.end)
        seconds = {name: [found[name] for found in samples] for name in costs}
        return record(batch, seconds, costs, field.out)


def settings(batch: int, args: argparse.Namespace) -> list[Setting]:
    """Those of the ways, and at the goals' batch of several students."""
    shared = {name: getattr(args, name) for name in SHARED}
    shared |= {"batch": batch, "samples": max(args.samples, 2 * batch)}
    several = args.students if batch == goals_at(args.device) else []
    alone = [Setting(way=way, **shared) for way in args.ways]
    return alone + [Setting(way="live", students=count, **shared) for count in several]


def goals_at(device: str) -> int:
    """The batch size at which goals are judged."""
    return 1024 if device == "cuda" else 256


def rounds(args: argparse.Namespace) -> Iterator[int]:
    """None begins after the minutes are over, but for the least number."""
    end = time.monotonic() + 60 * args.minutes
    for number in range(args.rounds):
        if number < LEAST_ROUNDS or time.monotonic() < end:
            yield number


# -- the result


def machine(args: argparse.Namespace) -> Record:
    modified = git("status", "--porcelain", "--", "kdcore", "plugins", "csrc", "setup.py", "benchmarks").splitlines()
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name(0) if args.device == "cuda" else None,
        "cores": sorted(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # before it began: work of others
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kdcore": kdcore.__version__,
        "torchdistill": version("torchdistill"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "modified_files": len(modified),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/bench_training.py {shlex.join(args.argv)}".rstrip(),
        "goals_at": goals_at(args.device),
        **{name: getattr(args, name) for name in SHARED},
    }


def missing(ways: Sequence[str], device: str) -> dict[str, str]:
    """Why a way cannot be timed here: it needs a package, or says nothing on a GPU."""
    found = {KEPT: "malloc counts on a CPU alone"} if KEPT in ways and device != "cpu" else {}
    for way in [way for way in ways if way in NEEDS]:
        try:
            importlib.import_module(NEEDS[way])
        except Exception as error:  # an old package may fail in any way beside a new torch
            found[way] = f"cannot be imported: {type(error).__name__}: {error}"
    for way, why in found.items():
        print(f"{way} is left out, {why}", file=sys.stderr)
    return found


def version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def write(folder: Path, about: Record, records: Sequence[Record]) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", (about["gpu"] or about["processor"]).lower()).strip("-")
    stem = f"training-{about['device']}-{slug}" + f"-{about['precision']}" * (about["precision"] != "bfloat16")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(page(about, records))
    (folder / f"{stem}.json").write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n")
    print(f"wrote {stem}.md and .json", file=sys.stderr)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="cifar_resnet32x4")
    parser.add_argument("--student", default="cifar_resnet8x4")
    parser.add_argument("--batches", default="256", type=numbers)
    parser.add_argument("--ways", default=list(WAYS), type=lambda text: [part.strip() for part in text.split(";")])
    parser.add_argument("--students", type=numbers, help="of live, at the goals' batch; of a whole run 2,3,4,8")
    parser.add_argument("--rounds", type=int, default=9, help="at most; those of a batch size take --minutes")
    parser.add_argument("--minutes", type=float, default=6.0, help=f"but {LEAST_ROUNDS} rounds are made")
    parser.add_argument("--samples", type=int, help="images of the made-up data set; default 8192, on a GPU 50000")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="see README.md")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=2, help="of a DataLoader")
    parser.add_argument("--out", type=Path, help="folder of the result; default: benchmarks/results for a whole run")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.whole = args.ways == list(WAYS)
    args.samples = args.samples or SAMPLES[args.device]
    if args.students is None:
        args.students = [2, 3, 4, 8] if args.whole else []
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    unknown = set(args.ways) - set(WAYS)
    if unknown:
        raise SystemExit(f"no such way: {', '.join(sorted(unknown))}; there are {'; '.join(WAYS)}")
    folder = args.out or (ROOT / "benchmarks" / "results" if args.whole else None)
    about, records = {**machine(args), "left_out": missing(args.ways, args.device)}, []
    args.ways = [way for way in args.ways if way not in about["left_out"]]
    for batch in args.batches:
        records.append(race(batch, args))
        if folder is not None:  # after every batch: a run may be ended by a time limit
            write(folder, about, records)
    print("\n" + page(about, records))
    if empty := [str(found["batch"]) for found in records if not found["costs"]]:
        raise SystemExit(f"no way was timed at batch {', '.join(empty)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit ends the ways' processes too
    main()
