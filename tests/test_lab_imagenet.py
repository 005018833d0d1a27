"""`attnlab train`: timm's recipe on ImageNet's layout, on two processes too, and bundled data."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import battery
import pytest
import torch
from test_lab_adapters import GREEN, RED, save_image
from torch import nn
from torch.nn import functional as F

from attnlab.lab import checkpoints, data, imagenet, train_command

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for child processes on a busy machine
WNIDS = ("n01440764", "n03888257")
SMALL = {
    "epochs": 2, "warmup_epochs": 0, "batch_size": 4, "img_size": 32, "ema": 0.5, "workers": 0,
    "device": "cpu", "progress": False, "options": {"width": 8},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path) -> Path:
    """Eight images to learn from and four to test on, red and green, sorted into class folders."""
    for split, count in (("train", 4), ("val", 2)):
        for wnid, color in zip(WNIDS, (RED, GREEN), strict=True):
            for i in range(count):
                save_image(tmp_path / f"images/{split}/{wnid}/{wnid}_{i}.JPEG", color, (40, 36))
    return tmp_path / "images"


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_two_steps_on_two_processes(root, tmp_path):
    run_dir = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = "train resnet_mini --data imagenet --epochs 1 --warmup-epochs 0 --batch-size 4 "
    words += "--img-size 32 --ema 0.5 --workers 0 --device cpu --option width=8"
    where = ["--root", str(root), "--run-dir", str(run_dir)]
    process = subprocess.run(
        [sys.executable, *launch, "-m", "attnlab.cli", *words.split(), *where],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    first, second, tested = lines(run_dir)
    assert [first["step"], second["step"], tested["step"]] == [1, 2, 2]
    assert first["lr"] == pytest.approx(3e-3)
    assert second["lr"] == pytest.approx(1.5e-3), "half of a cosine"
    assert tested["metrics"]["epoch"] == 1
    assert tested["metrics"]["top-5"] == 1, "there are two classes"
    card = checkpoints.info(run_dir / "model")
    assert card["arguments"] == {"num_classes": 2, "width": 8}
    assert card["command"].startswith("attnlab train resnet_mini --data imagenet --epochs 1")
    model = checkpoints.load(run_dir / "model")
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    assert json.loads((run_dir / "config.json").read_text())["processes"] == 2


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
    ("vit_mini --data parts --option depth", "expected NAME=VALUE, got 'depth'"),
    ("vit_mini --data parts --epochs 0", "epochs=0: expected an integer ≥ 1"),
    ("vit_minimal --data parts", "model='vit_minimal': expected a name that timm knows"),
    ("vit_mini --data parts --epochs 2 --warmup-epochs 2", "warmup=1.0: expected a number in"),
])  # fmt: skip
def test_the_command_says_what_is_wrong(words, message, capsys, monkeypatch):
    monkeypatch.setattr(train_command.data, "load", partial(data.load, n=4))
    with pytest.raises(SystemExit) as stop:
        train_command.main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_option_values_are_literals_or_text():
    options = [train_command._option(text) for text in ("a=1", "b=0.5", "c=(1, 2)", "d=bn", "e=")]
    assert dict(options) == {"a": 1, "b": 0.5, "c": (1, 2), "d": "bn", "e": ""}
