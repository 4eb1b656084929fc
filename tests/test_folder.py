"""Sets that do not fit into memory: images are read when they are wanted, and nothing else is otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import die_at_step_30, make_run, weights
from test_readme import blocks
from torchvision.models import resnet34
from torchvision.transforms import v2

from kdcore.cli import main
from kdcore.data import Dataset, Random, Split, listing, load_splits
from kdcore.data.augment import Flip
from kdcore.data.folder import Crops, View, decode, imagefolder
from kdcore.data.options import ImageFolderOptions
from kdcore.data.source import EpochSource, SourceContext, eval_batches
from kdcore.data.types import Splits
from kdcore.errors import DataError, DeviceError, PluginError, RecipeError
from kdcore.keys import names
from kdcore.options import Options
from kdcore.plugins import load_plugins
from kdcore.recipe import compile_recipe, load

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "owl")
SMALL = {"name": "imagefolder", "size": 12, "resize": 14, "batch_size": 16}
KINDS = {"a.jpg": "RGB", "b.png": "RGB", "c.PNG": "L", "d.jpeg": "CMYK", "e.png": "RGBA", "f.png": "P"}


def draw(path: Path, mode: str, number: int) -> None:
    """An image of a size of its own, brighter in a class than in the one before."""
    generator = torch.Generator().manual_seed(number)
    height, width = 14 + number % 9, 12 + number % 7
    level = 50 + 60 * CLASSES.index(path.parent.name)
    pixels = (level + 20 * torch.randn(height, width, 3, generator=generator)).clamp(0, 255).byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)


def make_folder(root: Path, of_train: int = 18, of_val: int = 6) -> Path:
    for split, count in (("train", of_train), ("val", of_val)):
        for number in range(count * len(CLASSES)):
            name, mode = list(KINDS.items())[number // len(CLASSES) % len(KINDS)]
            draw(root / split / CLASSES[number % len(CLASSES)] / f"{number:03}{name}", mode, number)
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder that a test may change."""
    return make_folder(tmp_path / "images", 4, 2)


def splits_of(root: Path, **options) -> Splits:
    checked = ImageFolderOptions(root=str(root), size=12, resize=14, **options)
    return load_splits(imagefolder, checked, monitor=0.25, split_seed=0, name="imagefolder")


def source_of(splits: Splits, workers: int, transforms=()) -> EpochSource:
    return EpochSource(Options(), SourceContext(splits.for_training, 5, 16, False, transforms, CPU, workers))


# ---------------------------------------------------------------- batches


def test_batches_are_the_same_bits_for_any_number_of_workers_and_from_any_step(root):
    splits = splits_of(root)
    flip = Flip(Options())
    found = {}
    for workers in (0, 1, 3):
        source = source_of(splits, workers, (flip,))
        found[workers] = [source.batch(step) for step in [*range(7), 2, 3, 11]]
        source.close()
    for one in (found[1], found[3]):
        for batch, other in zip(found[0], one, strict=True):
            assert torch.equal(batch.inputs, other.inputs)
            assert torch.equal(batch.target, other.target)
            assert torch.equal(batch.index, other.index)
            assert batch.epoch == other.epoch
    assert torch.equal(found[0][2].inputs, found[0][7].inputs)
    assert source.steps_per_epoch == 3
    assert not torch.equal(found[0][0].inputs, found[0][3].inputs)


def test_an_epoch_has_every_image_once_and_an_image_another_crop_in_the_next(root):
    splits = splits_of(root)
    source = source_of(splits, 0)
    epochs = [[source.batch(epoch * 3 + step) for step in range(3)] for epoch in range(2)]
    seen = [torch.cat([batch.index for batch in batches]) for batches in epochs]
    assert [sorted(index.tolist()) for index in seen] == [list(range(len(splits.train)))] * 2
    first, second = (
        torch.cat([batch.inputs for batch in batches])[index.argsort()]
        for batches, index in zip(epochs, seen, strict=True)
    )
    assert (first != second).flatten(1).any(1).float().mean() > 0.9


def test_evaluation_reads_what_torchvisions_preset_shows(root):
    splits = splits_of(root)
    preset = v2.Compose([v2.Resize(14), v2.CenterCrop(12), v2.PILToTensor()])
    files = sorted((root / "val").rglob("*.*"))
    expected = torch.stack([preset(decode(str(file))) for file in files]).float() / 255
    mean, std = torch.tensor(splits.mean)[:, None, None], torch.tensor(splits.std)[:, None, None]
    for workers in (0, 2):
        batches = list(eval_batches(splits.test, splits, CPU, 5, workers))
        assert torch.allclose(torch.cat([inputs for inputs, _ in batches]), (expected - mean) / std, atol=1e-5)
        labels = [CLASSES.index(file.parent.name) for file in files]
        assert torch.cat([target for _, target in batches]).tolist() == labels


def test_crops_cover_the_shares_and_proportions_that_are_asked_for():
    view = View(12, 14, (0.2, 0.5), (0.5, 2.0))
    crops = Crops(Random(3, torch.arange(300), 1), view)
    boxes = [crops.box(number, 400, 300) for number in range(300)]
    assert all(0 <= top <= 400 - h and 0 <= left <= 300 - w for top, left, h, w in boxes)
    shares = [h * w / (400 * 300) for _, _, h, w in boxes]
    assert 0.19 < min(shares) < 0.25
    assert 0.45 < max(shares) < 0.51
    ratios = [w / h for _, _, h, w in boxes]
    assert 0.49 < min(ratios) < 0.6
    assert 1.6 < max(ratios) < 2.02
    assert crops.box(0, 100, 3) == (47, 0, 6, 3)  # no crop fits: the middle, as torchvision has it


def test_reading_draws_from_nobodys_generator(root):
    source = source_of(splits_of(root), 2)
    before = torch.get_rng_state()
    source.batch(0)
    source.close()
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- splits and keys


def test_a_carved_monitor_split_is_disjoint_and_nothing_is_lost(root):
    splits = splits_of(root)
    paths = [
        {part.images.images.path(i) for i in part.images.index.tolist()} for part in (splits.train, splits.monitor)
    ]
    assert not paths[0] & paths[1]
    assert paths[0] | paths[1] == {str(path) for path in (root / "train").rglob("*.*")}
    assert splits.monitor.labels.bincount().tolist() == [4, 4, 4]
    for part in (splits.train, splits.monitor):
        for index, label in zip(part.images.index.tolist(), part.labels.tolist(), strict=True):
            assert Path(part.images.images.path(index)).parent.name == CLASSES[label]


@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_has_the_same_fingerprint_and_an_edited_file_another(own, tmp_path, verify):
    before = splits_of(own, verify=verify).fingerprint
    assert splits_of(own, verify=verify).fingerprint == before  # from what was kept
    subprocess.run(["cp", "-r", own, tmp_path / "copy"], check=True)
    assert splits_of(tmp_path / "copy", verify=verify).fingerprint == before
    file = next((own / "val" / "dog").iterdir())
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)
    assert (splits_of(own, verify=verify).fingerprint != before) == verify  # the size is the same
    file.write_bytes(data + b"\0")
    assert splits_of(own, verify=verify).fingerprint != before


@pytest.mark.parametrize("options", [{"scale": (0.1, 1.0)}, {"ratio": (1.0, 1.0)}, {"mean": (0.5, 0.5, 0.5)}])
def test_options_that_change_pixels_change_the_fingerprint(own, options):
    assert splits_of(own).fingerprint != splits_of(own, **options).fingerprint


def test_contents_are_read_once_and_again_if_a_cache_is_damaged(own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = splits_of(own).fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(listing, "_content", lambda *_: pytest.fail("read again"))
        assert splits_of(own).fingerprint == before
    for file in (tmp_path / "cache" / "kdcore" / "folders").iterdir():
        file.write_bytes(b'{"a')
    assert splits_of(own).fingerprint == before
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert splits_of(own).fingerprint == before


def test_links_count_and_hidden_and_other_files_do_not(own, tmp_path):
    before = splits_of(own)
    (own / "train" / "cat" / ".hidden.jpg").write_bytes(b"no image")
    (own / "train" / "cat" / "notes.txt").write_text("no image")
    (own / "train" / ".git").mkdir()
    assert splits_of(own).fingerprint == before.fingerprint
    draw(tmp_path / "elsewhere" / "cat" / "new.png", "RGB", 1)
    (own / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "elsewhere" / "cat" / "back").symlink_to(own / "train" / "cat" / "more")
    after = splits_of(own)
    assert len(after.train) + len(after.monitor) == len(before.train) + len(before.monitor) + 1


WRONG = {
    "no root": (lambda root: root.rename(root.with_name("gone")), "No such file or directory. Correct data.root"),
    "no classes": (lambda root: [path.rename(root / path.name) for path in (root / "train").iterdir()],
                   "no class folders. Give a folder with a folder for each class"),
    "an empty class": (lambda root: (root / "train" / "ape").mkdir(), "train/ape: no images. Remove the class"),
    "a strange class": (lambda root: (root / "val" / "owl").rename(root / "val" / "emu"),
                        "class 'emu' is none of train's"),
    "a link to nowhere": (lambda root: (root / "train" / "cat" / "x.jpg").symlink_to("nowhere"), "x.jpg: No such file"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_not_one_is_said(own, spoil, says):
    spoil(own)
    with pytest.raises(DataError, match=says):
        splits_of(own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 15}, "resize = 14 is below size = 15"),
        ({"scale": [0.5, 0.1]}, "two shares in ascending order"),
        ({"ratio": [0.0, 1.0]}, "two numbers above 0"),
        ({"crop": 3}, "data.crop: unknown key"),
    ],
)
def test_impossible_options_are_refused_before_torch_is_imported(host, options, says):
    recipe = {"data": {**SMALL, "root": "nowhere", **options}, "teacher": "resnet34", "student": "resnet18"}
    with pytest.raises(RecipeError, match=says):
        compile_recipe(load(recipe), host.catalog)


# ---------------------------------------------------------------- third parties


class Made:
    """Images that are made when they are wanted; ``broken`` is what read() gives instead."""

    shape, dtype, fingerprint = (40, 1, 6, 5), torch.uint8, "ab" * 32

    def __init__(self, **changed):
        self.broken = changed.pop("broken", None)
        vars(self).update(changed)

    def read(self, index, random):
        if callable(self.broken):
            return self.broken(index)
        shade = index if random is None else random.integers("shade", 0, 256)
        return shade.to(torch.uint8)[:, None, None, None].expand(-1, *self.shape[1:])


LABELS = torch.arange(40) % 4


def load_made(images, **options) -> Splits:
    given = {"mean": (0.5,), "std": (0.5,), **options}
    dataset = Dataset(Split(images, LABELS), Split(Made(), LABELS), 4, **given)
    return load_splits(lambda _: dataset, None, monitor=0.25, split_seed=0, name="made")


def test_ones_own_images_are_read_in_both_views():
    splits = load_made(Made())
    inputs, _ = next(iter(eval_batches(splits.monitor, splits, CPU, 4, 1)))
    assert torch.allclose(inputs[:, 0, 0, 0], (splits.monitor.images.index[:4] / 255 - 0.5) / 0.5)
    source = source_of(splits, 1)
    batch = source.batch(0)
    source.close()
    shade = Random(source._augment_seed, batch.index, 0).integers("shade", 0, 256)
    assert torch.allclose(batch.inputs[:, 0, 0, 0], (shade / 255 - 0.5) / 0.5)


REFUSED = {
    "no mean": (Made(), {"mean": None, "std": None}, "no mean and no std"),
    "float": (Made(dtype=torch.float32), {}, "images that are read are torch.float32"),
    "no hash": (Made(fingerprint="v1"), {}, "the fingerprint is 'v1'"),
    "count": (Made(shape=(39, 1, 6, 5)), {}, "39 images but 40 labels"),
    "shape": (Made(shape=(40, 6, 5)), {}, r"images have shape \(40, 6, 5\)"),
}


@pytest.mark.parametrize(("images", "options", "says"), REFUSED.values(), ids=REFUSED)
def test_images_that_break_their_contract_are_refused(images, options, says):
    with pytest.raises(DataError, match=says):
        load_made(images, **options)


class OwnError(DataError):
    """A plugin's own, with another signature."""

    def __init__(self, number):
        super().__init__(f"number {number}", where="shard 3", fix="Fetch it again.")


def refuse(index):
    raise OwnError(int(index[0]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("broken", "kind", "says"),
    [
        (lambda index: torch.zeros(len(index), 1, 6, 6, dtype=torch.uint8), PluginError, r"read\(\) gave \(.*, 6, 6\)"),
        (lambda index: None, PluginError, r"images Taken: read\(\) gave NoneType"),
        (refuse, DataError, "shard 3: number .* Fetch it again"),
    ],
)
def test_an_error_of_reading_is_the_same_from_a_worker(workers, broken, kind, says):
    with pytest.raises(kind, match=says):
        source_of(load_made(Made(broken=broken)), workers).batch(0)


# ---------------------------------------------------------------- runs


def recipe_of(root: Path, workers: int = 1, **extra) -> dict:
    return {
        "threads": 1, "device": "cpu", "data": {**SMALL, "root": str(root), "flip": True, "workers": workers},
        "teacher": {"model": "cnn", "size": 1}, "student": {"model": "mlp", "size": 1},
        "train": {"epochs": 2, "lr": 0.02}, "execute": {"log_every": 50}, **extra,
    }  # fmt: skip


def children() -> set[str]:
    """Processes that this one started and that still run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {child for task in tasks for child in task.read_text().split()}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> tuple[Path, dict]:
    """A run that reads in its own process, with steps enough to die at one, and its result."""
    place = tmp_path_factory.mktemp("whole")
    return place, make_run(place, recipe=longer(root, 0)).execute()


def longer(root: Path, workers: int) -> dict:
    recipe = recipe_of(root, workers, execute={"log_every": 5, "checkpoint_seconds": 1e-6})
    recipe["data"]["batch_size"] = 4  # 12 steps an epoch
    return recipe | {"train": {"epochs": 3, "lr": 0.02, "teacher": {"epochs": 2}}}


def test_a_run_from_a_folder_learns(whole):
    members = whole[1]["stages"][0]["members"]
    assert members["teacher"]["test_accuracy"] > 0.5
    assert members["teacher"]["monitor_images"] == 6


def test_a_run_that_died_in_the_middle_of_an_epoch_ends_with_the_same_bits_from_other_workers(root, tmp_path, whole):
    before = children()
    died = make_run(tmp_path, recipe=longer(root, 1))
    die_at_step_30(died)
    assert any(int(path.name.rpartition("-")[2]) % 12 for path in tmp_path.rglob("ckpt-*"))
    make_run(tmp_path, recipe=longer(root, 3)).execute()
    assert weights(tmp_path) == weights(whole[0])
    assert weights(tmp_path, "teacher") == weights(whole[0], "teacher")
    assert children() == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_file_ends_a_run_with_its_name(own, tmp_path, workers, split):
    before = children()
    file = next((own / split / "dog").glob("*.png"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{file}: cannot be read as an image: .* Replace the file"):
        make_run(tmp_path, recipe=recipe_of(own, workers)).execute()
    assert children() == before


def test_an_image_of_16_bits_is_refused(tmp_path):
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep.png: its pixels have more than 8 bits"):
        decode(str(tmp_path / "deep.png"))


def test_a_worker_that_is_killed_ends_the_run_with_a_fix(tmp_path, plugin_file):
    file = plugin_file("dying", DYING)
    recipe = recipe_of(tmp_path) | {"data": {"name": "dying", "batch_size": 8, "workers": 1}}
    with pytest.raises(DeviceError, match=r"data.workers: a process that read images died.*--shm-size"):
        make_run(tmp_path, recipe=recipe, host=load_plugins(files=[file])).execute()


DYING = """
import os, signal, torch, kdcore

class Dying:
    shape, dtype, fingerprint = (40, 3, 8, 8), torch.uint8, "cd" * 32
    def read(self, index, random):
        if random is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(index), 3, 8, 8, dtype=torch.uint8)

def build(options):
    split = kdcore.Split(Dying(), torch.arange(40) % 4)
    return kdcore.Dataset(split, split, 4, mean=(0.5,) * 3, std=(0.5,) * 3)

@kdcore.hookimpl
def kdcore_register(registry):
    registry.dataset("dying", build)
"""


def test_a_folder_that_changes_before_a_stage_begins_is_refused(root, tmp_path):
    made = make_run(tmp_path, recipe=recipe_of(root))
    made.keys.fingerprint = lambda spec: "before"
    with pytest.raises(DataError, match=r"its data changed while the run went on\. Run the same command again"):
        made.execute()


def test_the_code_of_a_data_set_counts_in_a_key(root, tmp_path):
    made = make_run(tmp_path, recipe=recipe_of(root))
    stage = made.view.label_only("teacher", made.view.teacher)
    assert ("dataset", "core/imagefolder") in names(stage, made.host.catalog)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_a_run_that_is_ended(root, tmp_path, number):
    recipe = recipe_of(root, 2) | {"train": {"epochs": 500}}
    program = f"import json, kdcore; kdcore.run(json.loads({json.dumps(recipe)!r}), root={str(tmp_path)!r})"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(tasks.read_text().split()) >= 2)
    workers = tasks.read_text().split()
    if number != signal.SIGKILL:
        os.killpg(process.pid, number)  # as a terminal or a scheduler does
    else:
        process.send_signal(number)
    assert process.wait() != 0
    wait_until(lambda: not any(map(runs, workers)))
    assert "a process that read images died" not in (tmp_path / "said").read_text()


def runs(process: str) -> bool:
    """False if it ended, be it that nobody has asked how."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def wait_until(true, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---------------------------------------------------------------- what is printed


IMAGENET = Path(__file__).parents[1] / "examples" / "imagenet" / "resnet34-resnet18.toml"


def plan(*sets: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["plan", str(IMAGENET), *(word for text in sets for word in ("--set", text))])
    return done.value.code


def test_imagenets_recipe_is_planned(root, capsys):
    assert plan(f"data.root={root}", 'teacher={ model = "resnet34" }') == 0
    assert "resnet34" in capsys.readouterr().out


@pytest.mark.long
def test_imagenets_recipe_is_planned_with_torchvisions_weights(root, tmp_path):
    torch.save(resnet34(num_classes=3).state_dict(), tmp_path / "published.pth")
    teacher = tmp_path / "resnet34.safetensors"
    about = ["--shape", "3x224x224", "--classes", "3", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    with pytest.raises(SystemExit) as done:
        main(["convert", str(tmp_path / "published.pth"), str(teacher), "--model", "resnet34", *about])
    assert done.value.code == 0
    assert plan(f"data.root={root}", f"teacher.weights={teacher}") == 0


def test_the_printed_images_are_read(tmp_path):
    np.save(tmp_path / "images.npy", np.arange(40 * 30, dtype=np.uint8).reshape(40, 1, 6, 5))
    (block,) = blocks("python", (Path(__file__).parents[1] / "docs" / "data.md").read_text())
    scope: dict = {}
    exec(block, scope)
    splits = load_made(scope["Mapped"](tmp_path / "images.npy"))
    source = source_of(splits, 1)
    assert source.batch(0).inputs.shape == (16, 1, 6, 5)
    source.close()
