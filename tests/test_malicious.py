"""Files made to do harm end in the right error within seconds and bounded memory, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, Done
from safetensors.torch import load_file

from kdcore.alarm import limited
from kdcore.archive import INDEX
from kdcore.cli import main
from kdcore.folders import FORMAT, MANIFEST, commit

SECONDS = 20
MEGABYTES = 400
DEEP = b"[" * 100_000
SETS = ("--set", "execute.checkpoint_seconds=0")


class Evil:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def torch_file(canary: Path, zipped: bool) -> bytes:
    data = io.BytesIO()
    torch.save({"weight": Evil(canary)}, data, _use_new_zipfile_serialization=zipped)
    return data.getvalue()


def header(content: bytes | dict, tensors: bytes = b"", size: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + tensors


def tensor(start: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


PICKLES: dict[str, Callable[[Path], bytes]] = {
    **{f"pickle {p}": lambda canary, p=p: pickle.dumps(Evil(canary), protocol=p) for p in range(6)},
    "torch zip": lambda canary: torch_file(canary, True),
    "torch legacy": lambda canary: torch_file(canary, False),
}
HEADERS = {
    "oversize": header(b"{}", size=2**63),
    "longer than the file": header(b"{}", size=100),
    "of no byte": header(b""),
    "deep": header(DEEP),
    "deep in a table": header(b'{"a":' * 100_000),
    "a list": header(b"[]" + b" " * 20),
    "overlapping": header({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4)),
    "out of range": header({"a": tensor(0, 1 << 40, [1 << 38])}, bytes(4)),
    "beyond 64 bits": header({"a": tensor(0, 4, [1 << 62, 1 << 62])}, bytes(4)),
    "backwards": header({"a": tensor(4, 0, [1])}, bytes(4)),
    "negative": header({"a": tensor(0, 4, [-1])}, bytes(4)),
    "duplicate": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2 + b'"b":1}', bytes(4)),
    "nan": header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "a number of a million digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b"]}}"),
    "wide": header(b'{"a":[' + b"[]," * 1_200_000 + b"[]]}"),
    "foreign": header({"../../canary": tensor(0, 4, [1])}, bytes(4)),
}


# ---------------------------------------------------------------- the ground


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its store."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.toml").write_text(TINY)
    with pytest.raises(SystemExit) as end:
        main(["run", str(root / "tiny.toml"), "--root", str(root / "runs"), *SETS])
    assert not end.value.code
    return root


@pytest.fixture
def ground(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("runs/tiny-*/run.json"):
        saved = json.loads(path.read_bytes())
        path.write_text(json.dumps({**saved, "store": str(tmp_path / "runs/store"), "cwd": str(tmp_path)}))
    return tmp_path


@pytest.fixture
def attack(ground: Path, cli: Callable[..., Done]) -> Callable[..., Done]:
    """Runs kdcore on what a test put there, under limits."""

    def run(*arguments: object) -> Done:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = memory("VmRSS")
        with limited(SECONDS):
            done = cli(*arguments)
        assert memory("VmHWM") - before < MEGABYTES, "too much memory"
        assert not list(ground.rglob("*canary*")), "it was executed"
        assert "bug in kdcore" not in done.err, done.err
        assert "Traceback" not in done.err
        return done

    return run


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024


def put(path: Path, what: bytes | str) -> Path:
    """Bytes, or a kind of thing that is no ordinary file, in the place of what is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 42)
    else:
        path.symlink_to(what)
    return path


def few(cases, count: int = 3) -> list[object]:
    """All cases, those after the first few for `make test-long`."""
    return [pytest.param(case, marks=[pytest.mark.long] * (number >= count)) for number, case in enumerate(cases)]


ODD = ("fifo", "folder", "/dev/zero", "huge")


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", few(PICKLES, 8))
@pytest.mark.parametrize("name", few(["weights.safetensors", "weights.pth"], 1))
def test_pickles_are_no_weights(attack, ground, kind, name):
    put(ground / name, PICKLES[kind](ground / "canary"))
    done = attack("run", "tiny.toml", "--set", f"teacher.weights={name}")
    assert done.code == 2
    assert f"teacher.weights: '{name}' is no safetensors file" in done.err


@pytest.mark.parametrize("kind", few(HEADERS, 8))
def test_a_header_that_lies_is_refused(attack, ground, kind):
    put(ground / "w.safetensors", HEADERS[kind])
    for member in ("teacher", "student"):
        done = attack("run", "tiny.toml", "--set", f"{member}.weights=w.safetensors")
        assert done.code in (2, 4), done.err
        assert "w.safetensors" in done.err


@pytest.mark.parametrize("kind", few(ODD, 4))
def test_weights_that_are_no_ordinary_file_are_refused(attack, ground, kind):
    put(ground / "w.safetensors", kind)
    done = attack("run", "tiny.toml", "--set", "teacher.weights=w.safetensors")
    assert done.code == 2
    assert "is no safetensors file" in done.err


# ---------------------------------------------------------------- results and checkpoints


def result_of(root: Path, member: str) -> Path:
    return next(path.parent for path in root.glob(f"runs/store/results/*/{member}.safetensors"))


def reseal(folder: Path, **changes: bytes) -> None:
    """The same folder with other files under a manifest that fits."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    shutil.rmtree(folder)
    commit(folder.parent, folder.name, {**content, **{name.replace("__", "."): data for name, data in changes.items()}})


@pytest.mark.parametrize("kind", few(["torch zip", "pickle 0", "pickle 2", "pickle 5", "torch legacy"], 1))
@pytest.mark.parametrize("member", ["teacher", "student"])
def test_a_sealed_result_with_a_pickle_for_weights_is_refused(attack, ground, kind, member):
    folder = result_of(ground, member)
    reseal(folder, **{f"{member}__safetensors": PICKLES[kind](ground / "canary")})
    if member == "teacher":  # who would read it
        shutil.rmtree(result_of(ground, "student"))
    done = attack("run", "tiny.toml", *SETS)
    assert done.code == 4
    assert str(folder) in done.err


def broken_result(ground: Path, folder: Path, kind: str) -> bytes:
    sound = json.loads((folder / "result.json").read_bytes())
    return {
        "pickle": pickle.dumps(Evil(ground / "canary")),
        "deep": DEEP,
        "nan": json.dumps({**sound, "seconds": float("nan")}).encode(),
        "infinite": json.dumps(sound).replace('"seconds": ', '"seconds": 1e999, "s": ').encode(),
        "list": b"[]",
        "empty": b"{}",
        "wrong types": json.dumps({**sound, "members": "all"}).encode(),
        "other key": json.dumps({**sound, "key": "0" * 64}).encode(),
        "not text": b"\xff\xfe\x00",
    }[kind]


@pytest.mark.parametrize(
    "kind", few(["pickle", "deep", "nan", "infinite", "list", "empty", "wrong types", "other key", "not text"])
)
def test_a_sealed_result_that_is_none_is_refused(attack, ground, kind):
    folder = result_of(ground, "teacher")
    reseal(folder, result__json=broken_result(ground, folder, kind))
    for arguments in (("run", "tiny.toml", *SETS), ("store", "ls")):
        done = attack(*arguments)
        assert done.code == 4, done
        assert folder.name in done.err


@pytest.mark.parametrize("name", [MANIFEST, "result.json", "student.safetensors"])
@pytest.mark.parametrize("kind", few(["/dev/zero", "path", "pickle", "deep", "fifo", "folder", "huge"], 2))
def test_a_result_without_its_seal_is_made_again(attack, ground, kind, name):
    folder = result_of(ground, "student")
    before = load_file(folder / "student.safetensors")
    entry = {"size": 1, "sha256": "0" * 64}
    path = json.dumps({"format": FORMAT, "kdcore": "0", "files": {"../../canary": entry}, "sha256": "0"}).encode()
    odd = {"pickle": pickle.dumps(Evil(ground / "canary")), "deep": DEEP, "path": path}
    put(folder / name, odd.get(kind, kind))
    done = attack("run", "tiny.toml", *SETS)
    assert done.code == 0, done.err
    assert "set aside" in done.out + done.err
    after = load_file(folder / "student.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", few(["torch zip", "deep", "pickle 2", "list", "empty", "other"], 2))
@pytest.mark.parametrize("name", ["state__json", "tensors__safetensors"])
def test_a_sealed_checkpoint_that_is_none_is_refused(attack, ground, kind, name):
    finished = result_of(ground, "student")
    content = {"state.json": b"{}", "tensors.safetensors": header({"other": tensor(0, 4, [1])}, bytes(4))}
    odd = {"deep": DEEP, "list": b"[]", "empty": b"{}", "other": b'{"step": "x"}'}
    bad = odd[kind] if kind in odd else PICKLES[kind](ground / "canary")
    commit(ground / "runs/store/unfinished" / finished.name, "ckpt-00000007", {**content, name.replace("__", "."): bad})
    shutil.rmtree(finished)
    done = attack("run", "tiny.toml", *SETS)
    assert done.code == 4
    assert "no checkpoint of this stage" in done.err
    assert "ckpt-00000007" in done.err


# ---------------------------------------------------------------- a run's folder


@pytest.mark.parametrize(
    "what",
    few([
        *ODD, b"", DEEP, b"[]", b"{}", b'{"a":' * 10**5, pickle.dumps(1), b"1" * 10**5, b'{"jobs": NaN}',
        b'{"recipe": 1, "store": 2, "plugin_files": 3, "blocked": 4, "threads": 5, "jobs": 6, "cwd": 7}',
        b'{"recipe": {}, "store": "x", "plugin_files": [], "blocked": [], "threads": 1, "jobs": 1, "cwd": "a\\u0000b"}',
    ], 6),
    ids=lambda what: what if isinstance(what, str) else what[:8],
)  # fmt: skip
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_run_folder_that_is_none_is_refused(attack, ground, name, what):
    folder = next(ground.glob("runs/tiny-*"))
    put(folder / name, what)
    done = attack("resume" if name == "run.json" else "report", folder)
    assert done.code in (2, 4), done
    assert folder.name in done.err or "recipe" in done.err or "data: missing" in done.err


def record(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


@pytest.mark.parametrize(
    "what",
    few([
        *ODD, record(DEEP), record(b"[]"), record(b"{}"), record(b'{"kind":1}'), record(b'{"kind":"ask","keys":[[1]]}'),
        record(b'{"kind":"ask"}'), record(b'{"kind":"result","key":"a"}'), record(b'{"kind":"run"}'), b"\x80\x04.\n",
        record(b'{"kind":"run","key":NaN}'), record(b'{"kind":"ask","keys":7}'),
    ], 6),
    ids=lambda what: what if isinstance(what, str) else what[9:40],
)  # fmt: skip
def test_a_journal_that_is_none_is_refused(attack, ground, what):
    journal = put(next(ground.glob("runs/tiny-*")) / "journal.jsonl", what)
    done = attack("run", "tiny.toml", *SETS)
    assert done.code == 4, done
    assert str(journal.relative_to(ground)) in done.err
    assert "Move the run's folder away" in done.err or "ordinary" in done.err or what in ODD


@pytest.mark.parametrize("what", few([*ODD, b"\xff\xfe", b"a\0b", b"../../canary"]), ids=lambda what: what[:9])
def test_a_note_of_a_run_that_is_none_keeps_gc_from_nothing_else(attack, ground, what):
    put(next(ground.glob("runs/store/runs/*")), what)
    done = attack("store", "gc")
    assert done.code in (0, 4), done
    assert len(list(ground.glob("runs/store/results/*"))) == 2


# ---------------------------------------------------------------- packs


def pack(path: Path, index: bytes, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in ((tarfile.TarInfo(INDEX), index), *members):
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


KEY = "a" * 64
SOUND_INDEX = json.dumps({"format": FORMAT, "keys": [KEY]}).encode()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", pax: dict[str, str] = {}) -> tarfile.TarInfo:  # noqa: B006
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.pax_headers = kind, link, pax
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        member("/canary"), member("../canary"), member(f"{KEY}/../../canary"), member(f"{KEY}/./canary"),
        member(f"{KEY}/link", tarfile.SYMTYPE, "../../canary"), member(f"{KEY}/link", tarfile.LNKTYPE, "/etc/passwd"),
        member(f"{KEY}/null", tarfile.CHRTYPE), member(f"{KEY}/pipe", tarfile.FIFOTYPE), member("b" * 64 + "/x"),
        member(f"{KEY}/x", pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": f"{KEY}/y",
                              "GNU.sparse.realsize": str(1 << 50)}),
        member(f"{KEY}/x", pax={"GNU.sparse.size": str(1 << 50), "GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"}),
        member(f"{KEY}/x", pax={"size": str(1 << 50)}),
        member(f"{KEY}/\0canary"),
    ],
    ids=lambda entry: f"{entry.name[-12:]} {entry.type} {list(entry.pax_headers)[:1]}",
)  # fmt: skip
def test_a_pack_with_tricks_is_refused_before_a_byte_is_written(attack, ground, entry):
    before = set(ground.rglob("*"))
    folder = member(KEY, tarfile.DIRTYPE)
    source = pack(ground / "evil.tar", SOUND_INDEX, (folder, b""), (entry, b"1\n0\n1\n" if entry.isreg() else b""))
    done = attack("store", "unpack", source)
    assert done.code == 4
    assert "not a whole pack" in done.err
    made = set(ground.rglob("*")) - before
    assert {path for path in made if "leases" not in path.parts} == {source}


def negative(entry: tarfile.TarInfo, size: int) -> bytes:
    """Its header, which says that it has ``size`` bytes: tarfile itself writes none below 0."""
    data = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


ENDLESS = {
    "a file that leads back to its own header": negative(member(KEY), -512),
    "a file of an unknown kind that leads back to the index": negative(member(f"{KEY}/x", b"Z"), -1024),
    "a chain of long names": member("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) * 3000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_pack_without_an_end_is_refused(attack, ground, kind):
    source = pack(ground / "evil.tar", SOUND_INDEX)
    index = source.read_bytes()[:1024]  # a header and a block
    source.write_bytes(index + ENDLESS[kind] + bytes(10240))
    done = attack("store", "unpack", source)
    assert done.code == 4
    assert "not a whole pack" in done.err


@pytest.mark.parametrize(
    "index", [b"", DEEP, b"[]", b"{}", b"null", pickle.dumps(1), b'{"format": %d, "keys": [[1]]}' % FORMAT,
              b'{"format": NaN}'],
    ids=lambda text: text[:9],
)  # fmt: skip
def test_a_pack_with_an_odd_index_is_refused(attack, ground, index):
    assert attack("store", "unpack", pack(ground / "evil.tar", index)).code == 4


@pytest.mark.parametrize("what", few([*ODD, *PICKLES], 1))
def test_what_is_no_pack_is_refused(attack, ground, what):
    put(ground / "evil.tar", PICKLES[what](ground / "canary") if what in PICKLES else what)
    done = attack("store", "unpack", "evil.tar")
    assert done.code == 4
    assert "evil.tar" in done.err


def test_results_of_a_pack_are_no_more_trusted_than_others(attack, ground):
    folder = result_of(ground, "student")
    reseal(folder, student__safetensors=PICKLES["torch zip"](ground / "canary"))
    assert attack("store", "pack", "evil.tar").code == 0
    shutil.rmtree(ground / "runs")
    assert attack("store", "unpack", "evil.tar").code == 0
    assert attack("run", "tiny.toml", *SETS).code == 4


# ---------------------------------------------------------------- recipes and plugin files


@pytest.mark.parametrize("what", few([*ODD, DEEP, b"a = " + DEEP, pickle.dumps(1)]), ids=lambda what: what[:9])
def test_a_recipe_that_is_none_is_refused(attack, ground, what):
    put(ground / "evil.toml", what)
    done = attack("run", "evil.toml")
    assert done.code == 2
    assert "evil.toml" in done.err


@pytest.mark.parametrize("key", ["strategy", "data.name", "teacher.model", "objective.0.loss", "execute.name"])
@pytest.mark.parametrize("name", few(["../../canary", "/canary", "os:system", "..", "a b"], 1))
def test_names_in_a_recipe_are_no_paths(attack, ground, key, name):
    done = attack("run", "tiny.toml", "--set", 'objective=[{ loss = "kd" }]', "--set", f"{key}={json.dumps(name)}")
    assert done.code == 2
    assert "unknown" in done.err


def test_a_term_is_not_named_like_a_path(attack, ground):
    objective = 'objective=[{ loss = "kd", name = "../../canary" }]'
    assert attack("run", "tiny.toml", "--set", objective).code == 2


@pytest.mark.parametrize("what", few([*ODD, *PICKLES], 1))
@pytest.mark.parametrize("name", few(["evil.py", "evil", "a.b.py"], 1))
def test_a_plugin_file_that_is_none_is_refused(attack, ground, what, name):
    put(ground / name, PICKLES[what](ground / "canary") if what in PICKLES else what)
    done = attack("run", "tiny.toml", "--plugin-file", ground / name)
    assert done.code == 3
    assert "--plugin-file" in done.err
