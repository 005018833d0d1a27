"""`attnlab train`: timm's recipe on ImageNet's layout, on two processes too, and bundled data."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import battery
import pytest
import torch
from safetensors.torch import load_file
from test_lab_adapters import GREEN, RED, save_image
from torch import nn
from torch.nn import functional as F

from attnlab.lab import checkpoints, data, imagenet, train_command
from attnlab.lab.batches import seed_everything

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for child processes on a busy machine
WNIDS = ("n01440764", "n03888257")
SMALL = {
    "epochs": 2, "warmup_epochs": 0, "batch_size": 4, "img_size": 32, "ema": 0.5, "workers": 0,
    "device": "cpu", "progress": False, "options": {"width": 8},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def save_images(root: Path, **counts: int) -> Path:
    """So many red and so many green images in each split, sorted into class folders."""
    for split, count in counts.items():
        for wnid, color in zip(WNIDS, (RED, GREEN), strict=True):
            for i in range(count):
                save_image(root / f"{split}/{wnid}/{wnid}_{i}.JPEG", color, (40, 36))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """Eight images to learn from and four to test on."""
    return save_images(tmp_path / "images", train=4, val=2)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


# `attnlab`, which also keeps the run's folder as it was after each checkpoint: links cost nothing.
KEEPING = """
import os, shutil, sys
from attnlab.cli import main
from attnlab.lab.run_folder import RunFolder

def save_and_keep(folder, modules, optimizer, step, seconds, save=RunFolder.save):
    save(folder, modules, optimizer, step, seconds)
    if folder.writes:
        shutil.copytree(folder.path, f"{folder.path}-{step}", copy_function=os.link)

RunFolder.save = save_and_keep
sys.exit(main())
"""
S60 = "train patchconvnet_s60 --data imagenet --epochs 3 --warmup-epochs 0 --batch-size 4 "
S60 += "--img-size 32 --autocast --workers 0 --device cpu --option drop_path_rate=0.1"


def train_s60(program: list[str], folder: Path, run: str) -> str:
    """Run `program` under torchrun on two processes, each with half of a batch: what it printed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = ["--root", str(folder / "images"), "--run-dir", str(folder / run)]
    process = subprocess.run(
        [sys.executable, *launch, *program, *S60.split(), *where],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def s60():
    """A folder with `run`, three steps each of which is an epoch, and `run-1`, `run-2`: so far.

    It goes after the tests: pytest would keep gigabytes of three sessions.
    """
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        save_images(folder / "images", train=2, val=2)
        (folder / "keeping.py").write_text(KEEPING)
        assert "| 0/3 [" in train_s60([str(folder / "keeping.py")], folder, "run")
        yield folder


def weights(run_dir: Path, which: str = "model") -> dict[str, torch.Tensor]:
    state = load_file(run_dir / "last.safetensors")
    return {k.removeprefix(f"{which}/"): v for k, v in state.items() if k.startswith(f"{which}/")}


def test_two_processes_log_what_patchconvnet_s60_did(s60):
    entries = lines(s60 / "run")
    steps, tested = entries[::2], entries[1::2]
    assert [entry["step"] for entry in steps] == [entry["step"] for entry in tested] == [1, 2, 3]
    assert [entry["lr"] for entry in steps] == pytest.approx([3e-3, 2.25e-3, 0.75e-3]), "a cosine"
    assert all(0 < entry["loss"] < 10 and entry["grad_norm"] > 0 for entry in steps)
    assert [entry["metrics"]["epoch"] for entry in tested] == [1, 2, 3]
    assert tested[-1]["metrics"]["top-1"] in (0, 0.25, 0.5, 0.75, 1), "of four images"
    assert tested[-1]["metrics"]["top-5"] == 1, "there are two classes"
    config = json.loads((s60 / "run/config.json").read_text())
    stated = {"optimizer": "lamb", "loss": "bce", "weight_decay": 0.05, "ema": 0.99996}
    assert config.items() >= {**stated, "autocast": True, "processes": 2, "images": 4}.items()


def test_lamb_moves_a_matrix_of_s60_by_its_norm_and_the_average_follows(s60):
    seed_everything(0)
    start = imagenet.create("patchconvnet_s60", {"num_classes": 2}).state_dict()
    first, second, third = (weights(s60 / f"run-{step}") for step in (1, 2, 3))
    matrices = [name for name, w in start.items() if w.ndim > 1 and name != "pool.cls_token"]
    assert len(matrices) > 300
    for before, after, lr in ((start, first, 3e-3), (second, third, 0.75e-3)):
        moved = [((after[k] - before[k]).norm() / before[k].norm()).item() for k in matrices]
        assert moved == pytest.approx([lr] * len(moved), rel=1e-3), "‖Δw‖ = lr · ‖w‖"
    average = weights(s60 / "run", "average")
    for name, value in average.items():
        share = 2 ** (-2 / 3)  # of new weights, while timm's average warms up
        torch.testing.assert_close(value, second[name].lerp(third[name], share))
    model = checkpoints.load(s60 / "run/model")
    assert sum(p.numel() for p in model.parameters()) == 25_231_096 - 998 * 385, "two classes"
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    card = checkpoints.info(s60 / "run/model")
    assert card["arguments"] == {"num_classes": 2, "drop_path_rate": 0.1}
    assert card["command"].startswith("attnlab train patchconvnet_s60 --data imagenet --epochs 3")


def test_new_processes_go_on_with_s60_bit_for_bit(s60):
    assert not (s60 / "run-1/metrics.json").exists(), "it was stopped"
    printed = train_s60(["-m", "attnlab.cli"], s60, "run-1")
    assert "| 1/3 [" in printed
    assert "| 0/3 [" not in printed, "it began again"
    assert lines(s60 / "run-1") == lines(s60 / "run")
    for file in ("last.safetensors", "model.safetensors"):
        whole, resumed = (load_file(s60 / run / file) for run in ("run", "run-1"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def test_a_stopped_run_goes_on_as_if_it_had_not(root, tmp_path, monkeypatch):
    whole = imagenet.train("resnet_mini", root, tmp_path / "whole", **SMALL)
    test = imagenet.accuracies

    def stop(*arguments):
        if len(lines(tmp_path / "stopped")) > 3:
            raise Stop
        return test(*arguments)

    monkeypatch.setattr(imagenet, "accuracies", stop)
    with pytest.raises(Stop):
        imagenet.train("resnet_mini", root, tmp_path / "stopped", **SMALL)
    monkeypatch.undo()
    resumed = imagenet.train("resnet_mini", root, tmp_path / "stopped", **SMALL)
    assert resumed.steps == [1, 2, 3, 4]
    assert resumed.loss == whole.loss
    assert resumed.metrics == whole.metrics
    for name in ("whole", "stopped"):
        assert sorted(os.listdir(tmp_path / name)) == [
            "config.json", "last.safetensors", "log.jsonl", "metrics.json", "model.json",
            "model.safetensors",
        ]  # fmt: skip
    a, b = (checkpoints.load(tmp_path / name / "model") for name in ("whole", "stopped"))
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
    with pytest.raises(ValueError, match=r"holds a run with other arguments: lr=0\.1 where"):
        imagenet.train("resnet_mini", root, tmp_path / "whole", **SMALL | {"lr": 0.1})


def test_it_learns_red_from_green(root, tmp_path):
    history = imagenet.train(
        "resnet_mini", root, tmp_path / "run", loss="ce", optimizer="adamw", lr=1e-2, mixup=0.0,
        cutmix=0.0, auto_augment="", erasing=0.0, color_jitter=0.0, **SMALL | {"epochs": 8},
    )  # fmt: skip
    assert history.metrics[-1]["top-1"] == 1
    assert history.loss[-1] < history.loss[0]


def test_in_the_binary_loss_every_class_of_a_mixed_image_is_right():
    criterion, smoothing = imagenet.LOSSES["bce"]
    assert smoothing == 0
    scores = torch.randn(2, 3)
    mixed = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0]])
    expected = F.binary_cross_entropy_with_logits(scores, (mixed > 0).float())
    torch.testing.assert_close(criterion(scores, mixed), expected)


def test_parts_of_a_batch_add_up_to_its_gradient():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images, target = torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.rand(6, 3).double()
    criterion = imagenet.LOSSES["bce"][0]
    gradients, losses = [], []
    for count in (1, 3):
        network.zero_grad()
        parts = zip(images.chunk(count), target.chunk(count), strict=True)
        losses.append(imagenet._backward(network, criterion, parts, count, autocast=False))
        gradients.append(network[1].weight.grad.clone())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_autocast_computes_in_bfloat16_and_updates_in_float32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    seen = []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    parts = [(torch.rand(2, 3, 2, 2), torch.rand(2, 3))]
    for autocast in (False, True):
        loss = imagenet._backward(network, imagenet.LOSSES["bce"][0], parts, 1, autocast)
        assert loss.dtype == network[1].weight.grad.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def test_accumulated_batches_make_as_many_steps(root, tmp_path):
    history = imagenet.train("resnet_mini", root, tmp_path, **SMALL | {"accumulate": 2})
    assert history.steps == [1, 2, 3, 4]


def test_bad_input(root, tmp_path):
    def start(model="resnet_mini", root=root, **wrong):
        imagenet.train(model, root, tmp_path / "run", **SMALL | wrong)

    battery.check_errors([
        (lambda: start(epochs=0), "epochs=0: expected an integer ≥ 1"),
        (lambda: start(accumulate=0), "accumulate=0: expected an integer ≥ 1"),
        (lambda: start(lr=0.0), "lr=0.0: expected a number in (0, inf)"),
        (lambda: start(mixup=-1.0), "mixup=-1.0: expected a number in [0, inf)"),
        (lambda: start(erasing=1.0), "erasing=1.0: expected a number in [0, 1)"),
        (lambda: start(ema=1.0), "ema=1.0: expected a number in (0, 1)"),
        (lambda: start(warmup_epochs=2), "warmup_epochs=2: expected less than epochs=2"),
        (lambda: start(loss="mse"), "loss='mse': expected one of ['bce', 'ce']"),
        (lambda: start(batch_size=3), "batch_size=3: expected a multiple of 2"),
        (lambda: start(batch_size=10), "batch_size=10: expected at most 8 images"),
        (lambda: start(optimizer="lam"), "optimizer='lam': expected one that timm knows"),
        (lambda: start(options={"depth": 3}), "options={'num_classes': 2, 'depth': 3}: resnet_m"),
        (lambda: start("resnet51"), "model='resnet51': expected a name that timm knows"),
    ])  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"imagenet: no train in .*/nowhere: unpack"):
        start(root=tmp_path / "nowhere")


def test_the_command_trains_on_bundled_data(tmp_path, monkeypatch, capsys):
    few = partial(data.load, n=32)
    monkeypatch.setattr(train_command.data, "load", few)
    words = "vit_mini --data parts --epochs 2 --batch-size 16 --img-size 32 --lr 0.002 --seed 3 "
    words += f"--option depth=1 --option img_size=32 --device cpu --run-dir {tmp_path}"
    assert train_command.main(words.split()) == 0
    assert "'step': 4, 'top-1': 0." in capsys.readouterr().out
    card = checkpoints.info(tmp_path / "model")
    assert card["data"]["name"] == "parts"
    assert card["seed"] == 3
    model = checkpoints.load(tmp_path / "model")
    assert len(model.blocks) == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["steps"], config["warmup"], config["lr"]) == (4, 0.5, 0.002)


@pytest.mark.parametrize(("words", "message"), [
    ("vit_mini", "required: --data"),
    ("vit_mini --data cats", "invalid choice: 'cats'"),
    ("vit_mini --data imagenet", "--root=None: expected the folder with train/ and val/"),
    ("vit_mini --data imagenet --root nowhere --batch-size 2", "imagenet: no train in nowhere"),
    ("vit_mini --data parts --mixup 1", "--data='parts': expected imagenet, with ['mixup']"),
    ("vit_mini --data clips --task classes", "--task='classes': expected one of ('masks',) with"),
    ("vit_mini --data imagenet --task masks", "--task='masks': expected one of ('classes',) with"),
    ("vit_mini --data parts --img-size 0", "img_size=0: expected an integer ≥ 1"),
    ("vit_mini --data parts --option depth", "expected NAME=VALUE, got 'depth'"),
    ("vit_mini --data parts --epochs 0", "epochs=0: expected an integer ≥ 1"),
    ("vit_minimal --data parts", "model='vit_minimal': expected a name that timm knows, such as"),
    ("vit_minni --data parts", "a name that timm knows, such as vit_mini"),
    ("vit_mini --data parts --img-size 60", "img_size=60: vit_mini cannot read such images (image"),
    ("vit_tiny_patch16_224 --data parts --option depth=1", "--option img_size=64"),
    ("vit_mini --data parts --run-dir file", "Not a directory: 'file/"),
    ("vit_mini --data parts --epochs 2 --warmup-epochs 2", "warmup_epochs=2: expected less than"),
])  # fmt: skip
def test_the_command_says_what_is_wrong(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train_command.data, "load", partial(data.load, n=4))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train_command.main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists(), "nothing is written"


def test_option_values_are_literals_or_text():
    options = [train_command._option(text) for text in ("a=1", "b=0.5", "c=(1, 2)", "d=bn", "e=")]
    assert dict(options) == {"a": 1, "b": 0.5, "c": (1, 2), "d": "bn", "e": ""}
