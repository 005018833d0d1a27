"""`attnlab train`, `attnlab evaluate`: every small model on every task; sidecars are confirmed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lab_adapters import GREEN, RED, save_image

from attnlab import cli, models
from attnlab.lab import checkpoints, data, evaluate, imagenet, video_tasks
from attnlab.lab import pixel_classifier as pixels
from attnlab.lab.run_folder import RunFolder
from attnlab.lab.trained import open_trained, where_it_looks

pytestmark = pytest.mark.usefixtures("one_thread")

MINIS = [name for name in models.default_cfgs if name.endswith("_mini")]
MAPS = {
    "vit_mini": ["attention, last block", "attention, rollout"],
    "resnet_mini": ["Grad-CAM"],
    "se_resnet_mini": ["Grad-CAM"],
    "cbam_resnet_mini": ["Grad-CAM", *(f"spatial gate, layer{stage}" for stage in (1, 2, 3, 4))],
    "patchconvnet_mini": ["attention pooling"],
    "dependencyvit_mini": ["messages received", "last gate"],
    "spformer_mini": [],
}
LOAD = data.load


@pytest.fixture
def few(monkeypatch):
    """All bundled data have 16 samples, but for what chapter 09 asks for by number."""

    def load(name, split="train", n=None, *args, **options):
        return LOAD(name, split, n if n in (100, 500) else 16, *args, **options)

    monkeypatch.setattr(data, "load", load)


def train(model: str, name: str, run_dir: Path, *more: str) -> None:
    """Two steps."""
    words = f"train {model} --data {name} --epochs 1 --batch-size 8 --warmup-epochs 0 --device cpu"
    assert cli.main([*words.split(), "--run-dir", str(run_dir), *more]) == 0


@pytest.mark.parametrize("name", ["parts", "scenes"])
@pytest.mark.parametrize("model", MINIS)
def test_a_stopped_training_goes_on_and_is_measured(
    model, name, few, tmp_path, monkeypatch, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(model, name, whole)
    save = RunFolder.save

    def save_once(folder, modules, optimizer, step, seconds):
        save(folder, modules, optimizer, step, seconds)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save_once)
        with pytest.raises(SystemExit) as stop:
            train(model, name, stopped)
    assert stop.value.code == 130
    assert f"stopped; the same command goes on with {stopped}\n" in capsys.readouterr().err
    assert len((stopped / "log.jsonl").read_text().splitlines()) == 1
    train(model, name, stopped)
    expected = load_file(whole / "model.safetensors")
    for key, value in load_file(stopped / "model.safetensors").items():
        assert torch.equal(value, expected[key]), key
    assert {path.name for path in stopped.iterdir()} == {
        "config.json", "log.jsonl", "last.safetensors", "metrics.json", "model.json",
        "model.safetensors",
    }  # fmt: skip
    log = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert json.loads((stopped / "config.json").read_text())["steps"] == 2
    last = json.loads((stopped / "metrics.json").read_text())

    capsys.readouterr()
    words = ["evaluate", str(stopped), "--split", "val", "--device", "cpu"]
    assert cli.main([*words, "--data", name]) == 0
    printed = capsys.readouterr().out
    found = json.loads((stopped / "metrics-val.json").read_text())
    assert (found["data"], found["split"], found["model"]) == (name, "val", str(stopped))
    assert found["metrics"]["val accuracy"] == last["top-1"]
    assert f"{last['top-1']:.4f}" in printed
    for map in MAPS[model]:
        assert 0 <= found["metrics"][f"energy, {map}"] <= 1
        assert 0 <= found["metrics"][f"pointing, {map}"] <= 1
    assert ("energy, uniform map" in found["metrics"]) == bool(MAPS[model])
    assert ("oracle, hard" in found["metrics"]) == (model == "spformer_mini")
    assert ("told apart" in found["metrics"]) == ((model, name) == ("patchconvnet_mini", "scenes"))
    assert ("attachment" in found["metrics"]) == ((model, name) == ("dependencyvit_mini", "parts"))
    assert json.loads((stopped / "metrics.json").read_text()) == last, "what training wrote stays"


@pytest.mark.parametrize(("model", "name"), [
    *((model, "scenes") for model in MINIS), *((model, "clips") for model in MINIS),
    ("vit_mini", "parts"), ("test_resnet", "clips"),
])  # fmt: skip
def test_pixels_are_learned_measured_and_drawn(model, name, few, tmp_path, capsys):
    """Of every small model, and of one of timm's; what training says is what evaluation says."""
    run = tmp_path / "run"
    train(model, name, run, "--task", "masks")
    before = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    train(model, name, run, "--task", "masks")
    after = load_file(run / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    last = json.loads((run / "metrics.json").read_text())
    assert 0 < last["mIoU"] < 1

    words = ["evaluate", str(run), "--device", "cpu"]
    assert cli.main([*words, "--split", "val"]) == 0
    found = json.loads((run / "metrics-val.json").read_text())["metrics"]
    assert found == {"val mIoU": last["mIoU"]}
    assert cli.main(words) == 0
    found = json.loads((run / f"metrics-{name}.json").read_text())["metrics"]
    splits = ("test_scenes", "test_unseen") if name == "scenes" else ("test",)
    assert list(found) == [f"{split} mIoU" for split in splits]

    capsys.readouterr()
    out = tmp_path / "seen.png"
    drawn = ["predict", "dogs", "--model", str(run), "--out", str(out), "--device", "cpu"]
    assert cli.main(drawn) == 0
    assert " of the pixels" in capsys.readouterr().out
    assert out.stat().st_size > 20_000


def test_the_loss_of_clips_is_that_of_a_frame_drawn_for_the_batch():
    batch = video_tasks.load_clips("val", 4).batch(range(4))
    network = pixels.pixel_classifier("resnet_mini", 9, width=4).eval()
    with torch.no_grad():
        torch.manual_seed(3)
        found = pixels.loss(network, batch)
        torch.manual_seed(3)
        frame = video_tasks.frame_at(batch, int(torch.randint(8, ())))
        shares = network(frame["image"]).log_softmax(1)
        expected = -shares.gather(1, frame["classes"][:, None]).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("words", "tolerance"), [
    ("patchconvnet_mini_scenes --split test_scenes -n 1000", 2 / 1_000), ("clip_flow", 0.01),
])  # fmt: skip
def test_a_bundled_sidecar_is_confirmed(words, tolerance, tmp_path, device):
    """Two images of a thousand may fall otherwise, and an error of flow differ by 0.01 px."""
    out = tmp_path / "found.json"
    assert cli.main(["evaluate", *words.split(), "--device", str(device), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["metrics"]
    expected = checkpoints.info(words.split()[0])["metrics"]
    assert expected.keys() <= found.keys()
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=tolerance), metric


@pytest.mark.parametrize(("name", "least"), [
    ("clip_segmenter", 4), ("clip_ways", 10), ("spformer_micro_masks", 3), ("vit_mini_parts", 1),
])  # fmt: skip
def test_every_metric_of_a_sidecar_is_measured(name, least, few):
    found = evaluate.evaluate(open_trained(name), progress=False)
    metrics = checkpoints.info(name)["metrics"]
    assert len(metrics) >= least
    assert metrics.keys() <= found.keys()


def test_the_maps_of_the_right_class_are_scored(few):
    """A map that is the mask has all its energy inside, and points right."""
    trained = open_trained("patchconvnet_mini_classes_scenes")
    batch = data.load("scenes", "val").batch(range(4))
    maps = where_it_looks(trained.model, batch["image"], batch["label"])["attention pooling"]
    every = trained.model.maps(batch["image"], normalize=True)
    for n, label in enumerate(batch["label"]):
        torch.testing.assert_close(maps[n], every[n, label])
    found = evaluate.localization(trained, data.load("scenes", "val"))
    share = data.load("scenes", "val").batch(range(16))["saliency"].mean().item()
    assert found["energy, uniform map"] == pytest.approx(share, abs=1e-5)


@pytest.fixture
def root(tmp_path) -> Path:
    """Four red and four green images to learn from, two and two to test on."""
    for split, count in (("train", 4), ("val", 2)):
        for wnid, color in (("n01440764", RED), ("n03888257", GREEN)):
            for i in range(count):
                save_image(tmp_path / f"images/{split}/{wnid}/{wnid}_{i}.JPEG", color, (40, 36))
    return tmp_path / "images"


def test_a_run_on_imagenets_layout(root, tmp_path, capsys):
    run = tmp_path / "run"
    history = imagenet.train(
        "resnet_mini", root, run, epochs=2, warmup_epochs=0, batch_size=4, img_size=32, ema=0.5,
        workers=0, device="cpu", progress=False, options={"width": 8},
    )  # fmt: skip
    words = ["evaluate", str(run), "--workers", "0", "--device", "cpu"]
    assert cli.main([*words, "--root", str(root)]) == 0
    found = json.loads((run / "metrics-imagenet.json").read_text())["metrics"]
    assert found == {key: history.metrics[-1][key] for key in ("top-1", "top-5")}
    save_image(root / "val/n00000001/n00000001_0.JPEG", RED, (40, 36))
    for more, message in (
        ([], "root=None: expected the folder with train/ and val/"),
        (["--root", str(root)], "expected 2 folders of classes, not 3"),
        (["--root", str(tmp_path / "nowhere")], "imagenet: no val in"),
        (["--root", str(root), "-n", "5"], "n=5: expected none with imagenet"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *more])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    ("vit_mini", "model='vit_mini': expected a bundled checkpoint, the path of one, or the folder"),
    ("vit_mini", "there are ['clip_flow'"),
    ("nowhere/model", "of a run (checkpoint 'nowhere/model': no "),
    ("vit_mini_parts --device gpu", "device='gpu': expected one that is here (Expected one of cpu"),
    ("vit_mini_parts --data scenes", "data='scenes': expected parts, which vit_mini_parts was tr"),
    ("vit_mini_parts --split test_scenes", "split='test_scenes': expected one of ('train', 'val"),
    ("vit_mini_parts --root data", "root='data': expected none with bundled data"),
    ("vit_mini_parts -n 0", "n=0: expected an integer ≥ 1"),
    ("vit_mini_parts --batch-size 0", "batch_size=0: expected an integer ≥ 1"),
    ("vit_mini_parts --workers -1", "workers=-1: expected an integer ≥ 0"),
    ("vit_mini_parts -n many", "argument -n: invalid int value: 'many'"),
    ("", "the following arguments are required: model"),
])  # fmt: skip
def test_what_is_wrong_is_said(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *words.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_models_that_answer_something_else_are_refused(tmp_path):
    model = models.resnet_mini()
    trained = open_trained("resnet_mini_scenes")._replace(model=torch.nn.Sequential(model.conv1))
    with pytest.raises(ValueError, match=r"model's output=.*: expected \(1, classes\)"):
        evaluate.evaluate(trained, progress=False)
    card = {**trained.card, "data": {"name": "clips", "split": "train"}}
    with pytest.raises(ValueError, match="model='Sequential': expected a segmenter of clips"):
        evaluate.evaluate(trained._replace(card=card), progress=False)
    card = {**trained.card, "data": {"name": "cats"}}
    with pytest.raises(ValueError, match="data='cats': expected one of"):
        evaluate.evaluate(trained._replace(card=card), progress=False)
