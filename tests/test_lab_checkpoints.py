"""`attnlab.lab.checkpoints`: round trip, every way in which one can be wrong, and all shipped."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attnlab.attention import VisionTransformer
from attnlab.lab import checkpoints, files

ARGUMENTS = {
    "img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 3,
}  # fmt: skip
SHIPPED = sorted(path.stem for path in (files.data_dir() / "checkpoints").glob("*.json"))


def save(path, model=None, **changes):
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = VisionTransformer(**ARGUMENTS)
    options = {
        "factory": "attnlab.attention.VisionTransformer",
        "arguments": ARGUMENTS,
        "command": "python train_tiny.py",
        "seed": 0,
        "device": "cpu",
        "seconds": 12.34,
        "metrics": {"accuracy": torch.tensor(0.5)},
        "data": {"name": "parts", "split": "train"},
        "probe_image": {"shape": [1, 3, 16, 16], "seed": 0},
    }
    checkpoints.save(path, model, **options | changes)
    return model


def edit(path, **changes):
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, **changes}))


def test_a_checkpoint_comes_back_as_it_was(tmp_path, device):
    path = tmp_path / "tiny"
    model = save(path).eval()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.json", "tiny.safetensors"]
    for name in (path, str(path), path.with_suffix(".safetensors"), path.with_suffix(".json")):
        loaded = checkpoints.load(name, device=device)
        assert not loaded.training
        for key, value in loaded.state_dict().items():
            assert value.device.type == device.type
            assert torch.equal(value.cpu(), model.state_dict()[key])
    card = checkpoints.info(path)
    assert card["metrics"] == {"accuracy": 0.5}
    assert card["data"] == {"name": "parts", "split": "train", "generator": 1}
    assert card["sha256"] == files.sha256(path.with_suffix(".safetensors"))
    assert card["seconds"] == 12.3
    assert card["golden"]["shape"] == [1, 3]
    with torch.no_grad():
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(torch.tensor([card["golden"]["values"]]), model(image))


def test_half_precision_takes_half_the_space_and_comes_back_rounded(tmp_path):
    model = save(tmp_path / "full")
    save(tmp_path / "half", model, half=True)
    stored = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = checkpoints.load(tmp_path / "half")
    rounded = checkpoints.round_to_half(copy.deepcopy(model)).state_dict()
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[key].half().float())
        assert torch.equal(value, rounded[key])
    assert any(not torch.equal(rounded[key], value) for key, value in model.state_dict().items())


def test_a_number_beyond_half_precision_is_refused(tmp_path):
    model = save(tmp_path / "full")
    nn.init.constant_(model.head.bias, 1e6)
    with pytest.raises(ValueError, match="finite outputs"):
        save(tmp_path / "half", model, half=True)
    assert not (tmp_path / "half.json").exists()


def test_a_bare_name_is_a_bundled_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    save(tmp_path / "checkpoints" / "tiny")
    assert isinstance(checkpoints.load("tiny"), VisionTransformer)
    assert checkpoints.verify() == []
    with pytest.raises(ValueError, match=r"checkpoint 'tinny': .* there are \['tiny'\]"):
        checkpoints.load("tinny")


def test_timm_models_photographs_and_names_with_dots(tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    arguments = {"num_classes": 2, "img_size": 32}
    path = tmp_path / "test_vit.v1"
    save(path, model, factory="test_vit", arguments=arguments, probe_image="chelsea")
    assert checkpoints.info(path)["probe_image"] == {"photo": "chelsea", "size": 32}
    assert type(checkpoints.load(path)) is type(model)


def test_a_large_output_is_sampled(tmp_path):
    arguments = {**ARGUMENTS, "num_classes": 1000}
    save(tmp_path / "wide", VisionTransformer(**arguments), arguments=arguments)
    golden = checkpoints.info(tmp_path / "wide")["golden"]
    assert golden["shape"] == [1, 1000]
    assert len(golden["values"]) == 64


def test_each_mismatch_is_named_with_the_command_that_retrains(tmp_path):
    path = tmp_path / "tiny"
    model = save(path)
    weights = path.with_suffix(".safetensors")

    def refused(words):
        with pytest.raises(ValueError, match=words) as caught:
            checkpoints.load(path)
        assert "checkpoint tiny: " in str(caught.value)
        assert str(caught.value).endswith("To retrain: python train_tiny.py")

    def restore():
        save(path, model)

    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    refused("its sha256 differs")
    restore()
    edit(path, signature="0" * 64)
    refused("the signature in its sidecar is another")
    restore()
    edit(path, arguments={**ARGUMENTS, "num_classes": 4})
    refused(r"head.bias is \(3,\) torch.float32 in the checkpoint and \(4,\) torch.float32 in the")
    edit(path, arguments={"colour": "red"})
    refused(r"arguments=\{'colour': 'red'\}: attnlab.attention.VisionTransformer takes others")
    restore()
    state = load_file(weights)
    state["head.bias"] += 1e-3
    save_file(state, weights)
    edit(path, sha256=files.sha256(weights))
    refused("answers otherwise than when it was saved: golden values off by 0.001, on")
    checkpoints.load(path, golden=False)
    restore()
    weights.unlink()
    refused("tiny.safetensors is missing")


def test_golden_values_tolerate_rounding(tmp_path):
    path = tmp_path / "tiny"
    save(path)
    golden = checkpoints.info(path)["golden"]
    edit(path, golden={**golden, "values": [value + 5e-5 for value in golden["values"]]})
    checkpoints.load(path)


def test_a_damaged_sidecar_is_named(tmp_path):
    path = tmp_path / "tiny"
    save(path)
    edit(path)
    card = json.loads(path.with_suffix(".json").read_text())
    del card["golden"], card["seed"]
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"tiny.json'?: expected it to have \['golden', 'seed'\]"):
        checkpoints.load(path)
    for text in ("{", "[]"):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=r"tiny.json is damaged .* git checkout"):
            checkpoints.load(path)


def test_verify_lists_every_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_DATA", str(tmp_path))
    assert checkpoints.verify() == []
    folder = tmp_path / "checkpoints"
    for name in ("good", "bad", "lonely"):
        save(folder / name)
    (folder / "bad.safetensors").write_bytes(b"")
    (folder / "lonely.json").unlink()
    bad, lonely = checkpoints.verify()
    assert "checkpoint bad: " in bad
    assert "sha256 differs" in bad
    assert lonely == "checkpoint lonely: lonely.json is missing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factory": "os.system"}, "factory='os.system': expected attnlab's own"),
        ({"factory": "attnlab.lab.files.os"}, "factory='attnlab.lab.files.os'"),
        ({"factory": "attnlab.lab.files.platformdirs.user_cache_dir"}, "factory='attnlab.lab.fil"),
        ({"factory": "attnlab.attention.nothing"}, "factory='attnlab.attention.nothing'"),
        ({"factory": "resnet_of_mine"}, "factory='resnet_of_mine': expected a timm model"),
        ({"arguments": {**ARGUMENTS, "depth": 2}}, "one that builds this model; blocks.1"),
        ({"command": " "}, "command=' ': expected the command that retrains"),
        ({"seed": -1}, "seed=-1"),
        ({"seconds": -1}, "seconds=-1"),
        ({"data": {}}, r"data=\{\}: expected at least the data's name"),
        ({"probe_image": {"shape": [1]}}, r"probe_image=\{'shape': \[1\]\}: expected"),
        ({"probe_image": "no such photograph"}, "no such photograph"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        save(tmp_path / "tiny", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_answers_nan_is_not_saved(tmp_path):
    model = VisionTransformer(**ARGUMENTS)
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"model=.*expected finite outputs"):
        save(tmp_path / "tiny", model)
    assert list(tmp_path.iterdir()) == []


def test_signature_is_of_names_shapes_and_types():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    same = {"b": torch.ones(1), "a": torch.ones(2, 3)}
    assert checkpoints.signature(state) == checkpoints.signature(same)
    for other in ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).half()}, {"c": torch.zeros(1)}):
        assert checkpoints.signature(state) != checkpoints.signature({**state, **other})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_checkpoint_loads_and_answers_as_it_did(name, device):
    model = checkpoints.load(name, device)
    card = checkpoints.info(name)
    assert card["metrics"]
    assert sum(p.numel() for p in model.parameters()) > 0


def test_no_shipped_checkpoint_lacks_its_sidecar():
    assert checkpoints.verify() == []


def test_the_shipped_checkpoints_take_12_mib_at_most():
    folder = files.data_dir() / "checkpoints"
    assert SHIPPED
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 2**20
