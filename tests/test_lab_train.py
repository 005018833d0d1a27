"""`attnlab.lab.train`: the loop, its exact resume (a real SIGKILL), and two real processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from attnlab.lab import batches, train
from attnlab.lab.run_log import RunLog

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for a child process on a busy machine


pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 100) -> dict[str, torch.Tensor]:
    """Four classes of small images: which quarter is bright."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(4, (count,), generator=generator)
    image = torch.rand(count, 3, 4, 4, generator=generator)
    for i, quarter in enumerate(label.tolist()):
        row, column = divmod(quarter, 2)
        image[i, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    return {"image": image, "label": label}


def network(norm: bool = True, dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 4)]
        return nn.Sequential(*layers[:2], *([nn.BatchNorm1d(32)] if norm else []), *layers[2:])


class Items(Dataset):
    """The same images one by one, as torchvision gives them; slowly if the environment says so."""

    def __init__(self, as_dict: bool = False):
        self.data, self.as_dict = images(), as_dict

    def __len__(self) -> int:
        return len(self.data["label"])

    def __getitem__(self, index: int):
        time.sleep(float(os.environ.get("TEST_SLEEP", 0)))
        image, label = self.data["image"][index], int(self.data["label"][index])
        return {"image": image, "label": label} if self.as_dict else (image, label)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def child(*arguments: str, **environment: str) -> dict:
    """How `subprocess` runs Python with `arguments`; this file is a script too (see its end)."""
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {
        "args": [sys.executable, *arguments],
        "env": os.environ | paths | environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def interrupted(run_dir, **options) -> tuple[nn.Module, train.History]:
    """Dropout, batch norm, augmentation, an average of the weights: all that could go astray."""
    model = network()
    history = train.fit(
        model, Items(), steps=40, batch_size=16, ema=0.9, augment=train.flip_and_shift,
        device="cpu", run_dir=run_dir, save_every=4, progress=False, **options,
    )  # fmt: skip
    return model, history


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    target = random.SystemRandom().randrange(5, 35)
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen(**child(__file__, "interrupted", str(tmp_path), TEST_SLEEP="0.001"))
    deadline = time.monotonic() + PATIENCE
    while not log.exists() or len(log.read_text().splitlines()) < target:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the child did not get going"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "metrics.json").exists(), "the child had finished before it was killed"
    seen = []
    resumed, history = interrupted(tmp_path, evaluate=lambda model: seen.append(1) or {"x": 1})
    whole, expected = interrupted(None)
    assert states_equal(resumed, whole), f"killed at step {target}"
    assert history.loss == expected.loss
    assert history.steps == list(range(1, 41))
    assert len(seen) == 1


def test_two_processes_follow_the_curve_of_one(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        **child(*launch, __file__, "distributed", str(tmp_path / "two")), timeout=PATIENCE
    )
    assert process.returncode == 0, process.stdout
    model, history = distributed(tmp_path / "one")
    two = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in two if "loss" in entry]
    torch.testing.assert_close(losses, history.loss, rtol=0, atol=1e-5)
    assert two[-1]["metrics"]["accuracy"] == history.metrics[-1]["accuracy"]
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    weights = load_file(tmp_path / "two" / "last.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[f"model/{name}"], value, rtol=0, atol=1e-4)


def distributed(run_dir) -> tuple[nn.Module, train.History]:
    def loss(model, batch):
        assert len(batch["label"]) == 16 // int(os.environ.get("WORLD_SIZE", "1"))
        return train.classification_loss(model, batch)

    model = network(norm=False, dropout=0.0)
    history = train.fit(
        model, images(), loss=loss, steps=12, batch_size=16, lr=1e-2, device="cpu", run_dir=run_dir,
        save_every=6, evaluate=lambda model: {"accuracy": train.accuracy(model, images())},
        progress=False,
    )  # fmt: skip
    return model, history


class Stop(Exception):
    """Raised by a test in the middle of a run."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
def test_a_stopped_run_resumes_in_mid_epoch(tmp_path, optimizer, device):
    def stop(model):
        raise Stop

    options = {"optimizer": optimizer, "steps": 10, "batch_size": 16, "device": device}
    options |= {"ema": 0.8, "progress": False}
    whole, resumed = network(), network()
    expected = train.fit(whole, images(), **options)
    options |= {"run_dir": tmp_path, "save_every": 4}
    with pytest.raises(Stop):
        train.fit(network(), images(), evaluate=stop, evaluate_every=7, **options)
    log = tmp_path / "log.jsonl"
    assert len(log.read_text().splitlines()) == 7
    log.write_text(log.read_text() + '{"step": 8, "lo')  # torn by the kill
    history = train.fit(resumed, images(), **options)
    assert history.steps == list(range(1, 11))
    if device.type == "cpu":
        assert history.loss == expected.loss
        assert states_equal(whole, resumed)
    else:
        torch.testing.assert_close(history.loss, expected.loss, rtol=1e-3, atol=1e-3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["loss"] for line in lines] == history.loss


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    options = {"steps": 6, "run_dir": tmp_path, "ema": 0.5, "device": "cpu", "progress": False}
    model, again = network(), network()
    first = train.fit(model, images(), evaluate=lambda model: {"answer": 42}, **options)
    assert json.loads((tmp_path / "metrics.json").read_text())["answer"] == 42
    second = train.fit(again, images(), loss=None, evaluate=lambda model: 1 / 0, **options)
    assert states_equal(model, again)
    assert (second.loss, second.metrics) == (first.loss, first.metrics)
    assert second.metrics == [{"step": 6, "answer": 42.0}]
    assert not again.training


def test_another_configuration_is_refused_and_named(tmp_path):
    options = {"steps": 3, "run_dir": tmp_path, "device": "cpu", "progress": False}
    train.fit(network(), images(), **options)
    changes = [
        ({"lr": 0.5}, "lr=0.5 where that run has 0.001"),
        ({"seed": 1}, "seed=1 where that run has 0"),
        ({"steps": 4}, "steps=4 where that run has 3"),
        ({"label_smoothing": 0.2}, "label_smoothing=0.2"),
        ({"augment": train.flip_and_shift}, "flip_and_shift' where that run has None"),
    ]
    for change, words in changes:
        with pytest.raises(ValueError, match="resume=False") as caught:
            train.fit(network(), images(), **options | change)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="model="):
        train.fit(network(norm=False), images(), **options)
    with pytest.raises(ValueError, match="data="):
        train.fit(network(), images(80), **options)
    history = train.fit(network(), images(), **options | {"lr": 0.5, "resume": False})
    assert history.steps == [1, 2, 3]
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5


@pytest.mark.parametrize(("file", "text"), [
    ("last.safetensors", "no tensors"), ("config.json", "{"), ("log.jsonl", "{}\n"),
    ("log.jsonl", "\0\0\n"),
])  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(file, text, tmp_path):
    options = {"steps": 2, "run_dir": tmp_path, "device": "cpu", "progress": False}
    train.fit(network(), images(), **options)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{file} is damaged .* resume=False \(--no-resume\)"):
        train.fit(network(), images(), **options)
    train.fit(network(), images(), **options, resume=False)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, device):
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = F.cross_entropy(model(batch["image"]), batch["label"])
        return value * math.nan if len(calls) == 6 else value

    words = r"loss is nan .* at step 6 \(lr .*lower lr.*step 4 in .*last.safetensors"
    options = {"steps": 40, "run_dir": tmp_path, "device": device, "progress": False}
    with pytest.raises(FloatingPointError, match=words):
        train.fit(network(), images(), loss=loss, save_every=2, **options)
    assert issubclass(train.TrainingDiverged, FloatingPointError)
    weights = load_file(tmp_path / "last.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]
    with pytest.raises(train.TrainingDiverged, match="run_dir was not given"):
        train.fit(network(), {**images(), "image": images()["image"] * math.inf}, steps=1)


def test_losses_that_are_read_late_are_all_logged(device):
    def note(log, step, loss):
        log.add(step, 0.1, torch.tensor(loss, device=device), torch.tensor(1.0, device=device))

    log = RunLog(None, processes=1)
    for step, loss in enumerate([3.0, 2.0, 1.0]):
        note(log, step, loss)
    assert log.read() == 1.0
    assert log.history.loss == [3.0, 2.0, 1.0]
    for step, loss in enumerate([0.5, math.inf, 0.25], start=3):
        note(log, step, loss)
    with pytest.raises(train.TrainingDiverged, match="at step 4"):
        log.read()
    assert log.history.steps == [0, 1, 2, 3]


def test_an_infinite_gradient_of_a_finite_loss_stops_the_run():
    def loss(model, batch):
        return (model(batch["image"]) * 0).sum().abs().sqrt()  # 0, with slope ∞ · 0

    with pytest.raises(train.TrainingDiverged, match=r"loss is 0.0 and the norm .* nan"):
        train.fit(network(), images(), loss=loss, steps=2, progress=False)


def test_a_run_is_a_function_of_its_seed(device):
    def run(seed):
        torch.rand(random.randrange(9) + 1)  # whatever was drawn before
        model = network()
        before = torch.get_rng_state()
        options = {"augment": train.flip_and_shift, "progress": False, "device": device}
        history = train.fit(model, images(), steps=9, batch_size=16, seed=seed, **options)
        assert torch.equal(before, torch.get_rng_state()), "the caller's generator was moved"
        return history.loss

    first = run(0)
    torch.testing.assert_close(run(0), first, rtol=0, atol=0 if device.type == "cpu" else 1e-2)
    assert run(1) != first


def test_every_epoch_sees_each_sample_at_most_once_and_in_another_order():
    seen = []

    def loss(model, batch):
        seen.append(batch["index"].tolist())
        return model(batch["image"]).square().mean()

    data = {**images(50), "index": torch.arange(50)}
    train.fit(network(), data, loss=loss, epochs=2, batch_size=16, progress=False, device="cpu")
    assert [len(batch) for batch in seen] == [16] * 6
    first, second = torch.tensor(seen).reshape(2, 48).tolist()
    assert len(set(first)) == len(set(second)) == 48
    assert first != second


def test_the_data_may_be_tensors_samples_or_items():
    class Batches:
        def __len__(self):
            return 100

        def batch(self, indices):
            assert indices.dtype == torch.long
            return {key: value[indices] for key, value in images().items()}

    losses = [
        train.fit(network(), data, steps=4, device="cpu", progress=False).loss
        for data in (images(), Batches(), Items(), Items(as_dict=True))
    ]
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_one_step_is_the_recipe():
    model, ours = network(norm=False, dropout=0.0), network(norm=False, dropout=0.0)
    data = images(32)
    history = train.fit(
        ours, data, steps=1, batch_size=32, lr=0.1, warmup=0, weight_decay=0.5, progress=False,
        label_smoothing=0.2, clip=0.1, device="cpu",
    )  # fmt: skip
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    loss = F.cross_entropy(model(data["image"]), data["label"], label_smoothing=0.2)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert history.loss == pytest.approx([loss.item()], abs=1e-6)
    for a, b in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_schedule_rises_and_falls():
    options = {"steps": 40, "lr": 0.2, "progress": False, "device": "cpu"}
    cosine = train.fit(network(), images(), warmup=0.1, **options).lr
    expected = [0.04, 0.08, 0.12, 0.16]
    expected += [0.1 * (1 + math.cos(math.pi * step / 36)) for step in range(36)]
    assert cosine == pytest.approx(expected)
    constant = train.fit(network(), images(), warmup=0.1, schedule="constant", **options).lr
    assert constant == pytest.approx([0.04, 0.08, 0.12, 0.16] + [0.2] * 36)


def test_it_learns_and_evaluates_the_average(device):
    seen = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append([value.clone() for value in model.state_dict().values()])
        return {"accuracy": train.accuracy(model, images())}

    model = network()
    history = train.fit(
        model, images(), epochs=60, batch_size=50, lr=1e-2, ema=0.9, progress=False,
        evaluate=evaluate, evaluate_every=50, device=device,
    )  # fmt: skip
    assert [entry["step"] for entry in history.metrics] == [50, 100, 120]
    assert history.metrics[-1]["accuracy"] > 0.9
    assert train.accuracy(model, images()) == history.metrics[-1]["accuracy"]
    assert all(
        torch.equal(*pair) for pair in zip(seen[-1], model.state_dict().values(), strict=True)
    )
    assert not model.training


def test_the_average_lags_behind_the_weights():
    averaged, last = network(), network()
    for model, ema in ((averaged, 0.99), (last, None)):
        train.fit(model, images(), steps=20, lr=1e-2, ema=ema, device="cpu", progress=False)
    start = network()
    moved = [(m[1].weight - start[1].weight).norm().item() for m in (averaged, last)]
    assert 0 < moved[0] < moved[1]


def test_autocast_is_bfloat16_where_asked():
    dtypes = []

    def loss(model, batch):
        dtypes.append(model(batch["image"]).dtype)
        return model(batch["image"]).float().square().mean()

    for autocast in (None, True, False):
        options = {"autocast": autocast, "device": "cpu", "progress": False}
        train.fit(network(), images(), loss=loss, steps=1, **options)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_tied_and_compiled_weights_are_saved_under_their_plain_names(tmp_path):
    def run(model, run_dir):
        options = {"run_dir": run_dir, "device": "cpu", "progress": False}
        return train.fit(model, images(), steps=2, **options)

    tied = nn.Sequential(nn.Flatten(), *[nn.Linear(48, 48, bias=False) for _ in range(2)])
    tied[2].weight = tied[1].weight
    run(tied, tmp_path / "tied")
    assert {"model/1.weight", "model/2.weight"} <= set(
        load_file(tmp_path / "tied" / "last.safetensors")
    )
    compiled = torch.compile(network(), backend="eager")
    run(compiled, tmp_path / "compiled")
    plain = network()
    run(plain, tmp_path / "compiled")  # the same run: read back into a model that is not compiled
    assert states_equal(compiled._orig_mod, plain)


def test_accuracy_is_a_share_and_restores_the_mode(device):
    class Right(nn.Module):
        def forward(self, x):
            assert not self.training
            quarters = F.avg_pool2d(x, 2).mean(1).flatten(1)
            return quarters

    model, data = Right().to(device).train(), images()
    assert train.accuracy(model, data, device=device) == 1.0
    assert model.training
    data["label"][:25] = (data["label"][:25] + 1) % 4
    assert train.accuracy(model.eval(), data, batch_size=7, device=device) == 0.75
    assert not model.training


def test_flip_and_shift_moves_whole_images(device):
    batch = torch.arange(6 * 2 * 5 * 7).reshape(6, 2, 5, 7).float()
    moved = train.flip_and_shift(batch.to(device), torch.Generator().manual_seed(0), pixels=2).cpu()
    generator = torch.Generator().manual_seed(0)
    mirrored = torch.rand(6, 1, generator=generator) < 0.5
    dy, dx = torch.randint(-2, 3, (2, 6, 1), generator=generator)
    assert mirrored.any()
    assert not mirrored.all()
    for i in range(6):
        image = F.pad(batch[i : i + 1], (2, 2, 2, 2), mode="replicate")[0]
        y, x = int(dy[i]) + 2, int(dx[i]) + 2
        window = image[:, y : y + 5, x : x + 7]
        torch.testing.assert_close(moved[i], window.flip(-1) if mirrored[i] else window)


def test_seed_everything_seeds_all_three():
    def draw():
        train.seed_everything(5)
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()
    for seed, words in ((-1, "an integer ≥ 0"), (1.5, "an integer ≥ 0"), (2**32, "below")):
        with pytest.raises(ValueError, match=f"seed={seed}: expected .*{words}"):
            train.seed_everything(seed)


def test_seeds_are_far_apart():
    numbers = {batches.mix("order", seed, step) for seed in range(30) for step in range(30)}
    assert len(numbers) == 900
    assert all(0 <= number < 2**63 for number in numbers)
    assert batches.mix("model", 0, 0, 0) == 1090822053631528742  # the same on every machine


def test_silent_without_progress(capfd):
    train.fit(network(), images(), steps=2, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")
    train.fit(network(), images(), steps=2, device="cpu")
    assert "2/2" in capfd.readouterr().err


WRONG = [
    ({"steps": None}, r"steps, epochs=\(None, None\): expected one of the two"),
    ({"epochs": 1}, r"steps, epochs=\(1, 1\)"),
    ({"steps": 0}, "steps=0: expected an integer ≥ 1"),
    ({"steps": 2.0}, "steps=2.0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": None}, "batch_size=None: expected an integer"),
    ({"save_every": -1}, "save_every=-1"),
    ({"evaluate_every": 0}, "evaluate_every=0"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": None}, "seed=None"),
    ({"lr": 0}, r"lr=0: expected a number in \(0, inf\)"),
    ({"lr": math.nan}, "lr=nan"),
    ({"lr": "fast"}, "lr='fast'"),
    ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ({"warmup": 1}, r"warmup=1: expected a number in \[0, 1\)"),
    ({"clip": 0}, "clip=0"),
    ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
    ({"ema": 1}, "ema=1"),
    ({"optimizer": "adamz"}, "optimizer='adamz': expected one that timm knows"),
    ({"schedule": "linear"}, r"schedule='linear': expected one of \['constant', 'cosine'\]"),
    ({"device": "abacus"}, "device='abacus'"),
    ({"loss": lambda model, batch: 1.0}, "loss=1.0: expected a function that returns a scalar"),
    ({"loss": lambda m, b: m(b["image"])}, "loss=tensor"),
    ({"evaluate": lambda model: 0.5}, "evaluate=0.5: expected a function that returns a dict"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        train.fit(network(), images(), **{"steps": 1, "progress": False, "device": "cpu"} | change)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data='list of length 0'"),
        (7, "data='int': expected a dict of tensors, or len"),
        ({"image": torch.zeros(3), "label": torch.zeros(2)}, "share their first axis"),
        ({"image": torch.zeros(2, 48)}, r"data=\['image'\]: expected samples with 'label'"),
    ],
)
def test_bad_data_is_named(data, words):
    with pytest.raises(ValueError, match=words):
        train.fit(network(), data, steps=1, progress=False, device="cpu")
    with pytest.raises(ValueError, match="model='str'"):
        train.fit("model", images(), steps=1)


if __name__ == "__main__":
    {"interrupted": interrupted, "distributed": distributed}[sys.argv[1]](sys.argv[2])
