"""Checkpoints of others become weights files, and nothing that they hold is run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import nn

import kdcore
from kdcore.card import find_card
from kdcore.convert import Limits, convert
from kdcore.convert_worker import Refused, clean, find, plain_names, read
from kdcore.data import DataInfo
from kdcore.errors import RecipeError, StorageError
from kdcore.plugins import load_plugins
from kdcore.training.member import put_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.half), "n": torch.tensor(3)}
MLP = ["--model", "mlp", "--set", "size=2", "--shape", "1x8x8", "--classes", "10"]


def saved(value, **options) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file, **options)
    file.seek(0)
    return file


def converted(value, key="", **options) -> dict[str, torch.Tensor]:
    """What the reading process makes of a checkpoint, in this process."""
    return clean(find(read(saved(value, **options)), key))


def equal(found, expected) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )


class Evil:
    """Its pickle writes a file when it is loaded in earnest."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A file that must not be there in the end; it would be, did pickles run."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "this canary never sings"
    path.unlink()
    yield path
    assert not path.exists(), "a pickle ran"


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_any_age_are_read(zipped):
    assert equal(converted(STATE, _use_new_zipfile_serialization=zipped), STATE)


def test_safetensors_is_read_too():
    assert equal(clean(find(read(io.BytesIO(save(STATE))), "")), STATE)


@pytest.mark.parametrize("name", ["state_dict", "model", "model_state_dict", "net", "ema", "anything"])
def test_the_only_state_dict_of_a_checkpoint_is_found(name):
    around = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}}
    assert equal(converted({**around, name: {k: nn.Parameter(v, False) for k, v in STATE.items()}}), STATE)


def test_a_key_chooses_among_several():
    two = {"model": STATE, "ema": {"a": torch.zeros(1)}}
    with pytest.raises(Refused, match="it holds 2 state dicts: 'model', 'ema'") as refused:
        converted(two)
    assert refused.value.fix == "Choose one: --key model"
    assert equal(converted(two, "ema"), two["ema"])
    with pytest.raises(Refused, match="no state dict under 'emma'"):
        converted(two, "emma")


@pytest.mark.parametrize("wrapper", ["DataParallel", "compile", "both", "AveragedModel"])
def test_names_lose_what_torchs_wrappers_put_before_them(wrapper):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    wrapped = {
        "DataParallel": lambda: nn.DataParallel(module),
        "compile": lambda: torch.compile(module),
        "both": lambda: nn.DataParallel(torch.compile(module)),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(module),
    }[wrapper]()
    assert equal(converted(wrapped.state_dict()), module.state_dict())


@given(st.lists(st.text("am.", min_size=1, max_size=4), min_size=1, unique=True), st.integers(0, 3))
@settings(max_examples=100)
def test_wrapping_changes_no_name_that_comes_out(names, times):
    assert plain_names(["module." * times + name for name in names]) == plain_names(names)


def test_a_name_that_only_some_share_is_left():
    assert plain_names(["module.a", "b"]) == ["module.a", "b"]


def test_tied_and_strided_tensors_come_out_whole():
    tied = torch.randn(4, 4)
    state = {"a": tied, "b": tied, "c": tied.T, "d": tied[1:3, ::2], "e": torch.ones(1).expand(5), "f": torch.ones(0)}
    assert equal(load(save(converted(state))), state)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=50)
def test_any_state_dict_comes_out_as_it_went_in(shapes):
    state = {name: (torch.rand(shape) * 5).to(dtype) for name, (dtype, shape) in shapes.items()}
    if "n_averaged" not in state and plain_names(list(state)) == list(state):
        assert equal(converted(state), state)


# ---------------------------------------------------------------- what is refused


def zipped_with(names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(f"archive/{name}", b"")
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


NEW, OLD = saved(STATE).getvalue(), saved(STATE, _use_new_zipfile_serialization=False).getvalue()
REFUSALS = {
    "TorchScript": (scripted, "it is a TorchScript archive: a program, not weights"),
    "torch.export": (lambda: zipped_with(["archive_format", "models/model.json"]), "it is a program of torch.export"),
    "a module": (lambda: saved(nn.Linear(2, 2)).getvalue(), "it holds more than tensors: torch.nn.modules."),
    "arguments": (
        lambda: saved({"a": torch.ones(1), "args": argparse.Namespace()}).getvalue(),
        "it holds more than tensors: argparse.Namespace",
    ),
    "a tensor": (lambda: saved(torch.ones(2)).getvalue(), "it holds Tensor, not a state dict"),
    "a list": (lambda: saved([torch.ones(2)]).getvalue(), "it holds list, not a state dict"),
    "a number": (lambda: saved({**STATE, "epoch": 3}).getvalue(), "'epoch' is int, not a tensor"),
    "a number as name": (lambda: saved({3: torch.ones(1)}).getvalue(), "3 is no name of a tensor"),
    "safetensors' own name": (lambda: saved({"__metadata__": torch.ones(1)}).getvalue(), "'__metadata__' is no name"),
    "nothing": (lambda: saved({}).getvalue(), "it holds no tensor"),
    "sparse": (lambda: saved({"a": torch.eye(2).to_sparse()}).getvalue(), "'a' is torch.sparse.FloatTensor, not"),
    "two of one name": (
        lambda: saved({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)}).getvalue(),
        "two of its tensors have one name",
    ),
    "empty": (lambda: b"", "it is damaged, or no checkpoint of torch"),
    "text": (lambda: b"hello, this is text", "it is damaged, or no checkpoint of torch"),
    "half a new file": (lambda: NEW[: len(NEW) // 2], "it is damaged, or no checkpoint of torch"),
    "half an old file": (lambda: OLD[: len(OLD) // 2], "it is damaged, or no checkpoint of torch"),
    "half a safetensors file": (lambda: save(STATE)[:100], "it is damaged, or no checkpoint of torch"),
    "an empty archive": (lambda: zipped_with([]), "it is damaged, or no checkpoint of torch"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_no_state_dict_is_refused_with_a_reason(kind):
    make, says = REFUSALS[kind]
    with pytest.raises(Refused) as refused:
        clean(find(read(io.BytesIO(make())), ""))
    assert refused.value.what.startswith(says)
    assert "\n" not in refused.value.what
    assert len(refused.value.what) < 500


@pytest.mark.parametrize("form", ["new", "old", "bare", "protocol 4", "in the state dict"])
def test_a_malicious_pickle_never_runs(canary, form):
    evil = Evil(canary)
    data = {
        "new": lambda: saved(evil).getvalue(),
        "old": lambda: saved(evil, _use_new_zipfile_serialization=False).getvalue(),
        "bare": lambda: pickle.dumps(evil, 2),
        "protocol 4": lambda: pickle.dumps({"a": evil}, 4),
        "in the state dict": lambda: saved({"state_dict": {**STATE, "b": evil}}).getvalue(),
    }[form]()
    with pytest.raises(Refused):
        clean(find(read(io.BytesIO(data)), ""))


@given(st.integers(0, len(NEW) - 1), st.integers(0, 255), st.booleans(), st.sampled_from([NEW, OLD, save(STATE)]))
@settings(max_examples=150)
def test_a_damaged_file_is_refused_or_read(place, value, cut, data):
    place %= len(data)
    damaged = data[:place] if cut else data[:place] + bytes([value]) + data[place + 1 :]
    try:
        found = clean(find(read(io.BytesIO(damaged)), ""))
    except Refused:
        return
    save(found)


# ---------------------------------------------------------------- the process that reads


def limits(**changes) -> Limits:
    return Limits(**{"seconds": 60, "cpu_seconds": 30, "memory": 2**30, "output": 2**26, **changes})


def test_a_malicious_file_is_refused_by_the_command(canary, tmp_path, cli):
    torch.save({"a": Evil(canary)}, tmp_path / "evil.pth")
    done = cli("convert", "evil.pth", "out.safetensors")
    assert done.code == 4
    assert "evil.pth: it holds more than tensors: posix.system. If you trust the file" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


def bomb(path: Path, body: bytes) -> Path:
    """A small file whose pickle is ``body`` when it is unpacked."""
    data = saved({"a": torch.ones(1)})
    with zipfile.ZipFile(data) as real, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in real.namelist():
            archive.writestr(name, body if name.endswith("data.pkl") else real.read(name))
    return path


def test_a_bomb_of_pixels_is_stopped_by_memory(tmp_path):
    path = tmp_path / "wide.pth"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(StorageError, match=r"wide\.pth: its tensors take more than 256 MiB, many times"):
        convert(path, tmp_path / "out.safetensors", limits=limits(memory=2**28))
    assert not list(tmp_path.glob("*safetensors"))


def test_tensors_that_fit_but_whose_copies_do_not_are_stopped_by_memory(tmp_path):
    path = tmp_path / "large.pth"
    torch.save({"a": torch.zeros(1).expand(400 * 2**18)}, path)  # 400 MiB
    with pytest.raises(StorageError, match=r"large\.pth: its tensors take more than 1,024 MiB, many times"):
        convert(path, tmp_path / "out.safetensors")


def test_a_bomb_of_work_is_stopped_by_processor_time(tmp_path):
    path = bomb(tmp_path / "busy.pth", b"\x80\x02]" + b"q\x00" * 40_000_000 + b".")
    assert path.stat().st_size < 2**20
    with pytest.raises(StorageError, match="reading it took more than 1 seconds of processor time"):
        convert(path, tmp_path / "out.safetensors", limits=limits(cpu_seconds=1))
    assert not list(tmp_path.glob("*safetensors"))


def test_a_process_that_hangs_is_ended(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    with pytest.raises(StorageError, match=r"reading it took more than 0\.05 seconds"):
        convert(tmp_path / "a.pth", tmp_path / "out.safetensors", limits=limits(seconds=0.05))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


@pytest.mark.long
def test_a_file_that_grows_is_stopped_by_what_may_be_written(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**20)}, tmp_path / "a.pth")
    with pytest.raises(StorageError, match="its tensors cannot be written: File too large"):
        convert(tmp_path / "a.pth", tmp_path / "out.safetensors", limits=limits(output=2**16))


def test_the_process_has_no_secrets_and_no_network_if_the_system_lets_it(tmp_path, monkeypatch):
    from kdcore.convert import _environment

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert set(_environment()) <= {"LD_LIBRARY_PATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_ALL"}
    program = (
        "import socket\nfrom kdcore.convert_worker import leave_network\n"
        "server = socket.create_server(('127.0.0.1', 0))\nleft = leave_network()\n"
        "try:\n    socket.create_connection(server.getsockname(), 2)\n    print(left, 'reached')\n"
        "except OSError:\n    print(left, 'no network')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("True no network", "False reached")


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def mlp():
    entry = load_plugins().catalog.find("model", "mlp")
    return entry.load()(entry.options_class()(size=2), DataInfo((1, 8, 8), 10)).eval()


def test_a_checkpoint_with_a_model_is_all_that_a_recipe_and_load_model_need(mlp, tmp_path, cli, tiny):
    torch.save({"state_dict": {f"module.{name}": value for name, value in mlp.state_dict().items()}}, "in.pth")
    done = cli("convert", "in.pth", "out.safetensors", *MLP, "--mean", "0.3", "--std", "0.4")
    assert done.code == 0, done.err
    assert done.out == "out.safetensors: 4 tensors of vision/mlp, 1x8x8 images of 10 classes\n"
    images = torch.rand(3, 1, 8, 8)
    model = kdcore.load_model("out.safetensors")
    torch.testing.assert_close(model(images), mlp((images - 0.3) / 0.4))
    assert cli("run", tiny(), "--set", 'teacher={weights="out.safetensors"}').code == 0


def test_without_a_model_the_tensors_alone_are_converted(tmp_path, cli):
    torch.save(STATE, tmp_path / "in.pt")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    done = cli("convert", "in.pt", "out.safetensors")
    assert (done.code, done.out) == (0, "out.safetensors: 3 tensors, no model named\n")
    assert equal(load_file(tmp_path / "out.safetensors"), STATE)
    assert find_card(tmp_path / "out.safetensors") is None


def test_a_weights_file_gets_a_card(mlp, tmp_path, cli):
    save_file({name: value.half() for name, value in mlp.state_dict().items()}, tmp_path / "in.safetensors")
    images = ["--mean", "0.3", "--std", "0.4", "--scale", "1"]
    assert cli("convert", "in.safetensors", "out.safetensors", *MLP, *images).code == 0
    card = find_card(tmp_path / "out.safetensors")
    assert (card.model, card.mean, card.scale) == ("vision/mlp", (0.3,), 1)
    assert load_file(tmp_path / "out.safetensors")["head.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "classes", "says"),
    [
        (3, 10, "in.pth lacks 'stages.1.0.bias'"),
        (1, 10, "in.pth lacks 'head.bias' and has 'stages.0.0.bias' too"),
        (2, 11, "in.pth: 'head.weight' is (10, 64), the model's is (11, 64)"),
    ],
)
def test_weights_of_another_model_are_told_from_its(mlp, size, classes, says):
    entry = load_plugins().catalog.find("model", "mlp")
    other = entry.load()(entry.options_class()(size=size), DataInfo((1, 8, 8), classes))
    given = {name: value for name, value in mlp.state_dict().items() if size != 1 or name != "head.bias"}
    with pytest.raises(RecipeError) as refused:
        put_weights(other, given, "in.pth", "model")
    assert refused.value.what == says


def test_another_model_than_the_files_leaves_no_file(mlp, tmp_path, cli):
    save_file(mlp.state_dict(), tmp_path / "in.safetensors")
    words = [*MLP[:3], "size=3", *MLP[4:], "--mean", "0", "--std", "1"]
    done = cli("convert", "in.safetensors", "out.safetensors", *words)
    assert (done.code, "model mlp-3: in.safetensors lacks 'stages.1.0.bias'. Give the model" in done.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (MLP, "--mean, --std: missing. Write what mlp was trained on, e.g. --mean 0.5 (0 without one), --std 0.25"),
        ([*MLP, "--mean", "x", "--std", "1"], "--mean: 'x' is not numbers. Write --mean 0.5 or 0.49,0.48,0.45."),
        ([*MLP, "--mean", "0", "--std", "0"], "those of std above 0"),
        ([*MLP[:5], "8x8", *MLP[6:], "--mean", "0", "--std", "1"], "--model.shape[2]: missing"),
        (["--shape", "1x8x8"], "--shape: means nothing without --model"),
        (["--set", "size=1"], "--set: means nothing without --model"),
        (["--model", "mlpp", *MLP[2:], "--mean", "0", "--std", "1"], "--model: unknown model 'mlpp'. Did you"),
        ([], "in.pth: no such file. Give the path of a .pth, .pt or .safetensors file."),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_read(cli, words, says):
    done = cli("convert", "in.pth", "out.safetensors", *words)
    assert done.code in (2, 4)
    assert says in done.err
