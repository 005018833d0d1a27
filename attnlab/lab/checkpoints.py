"""Trained weights that prove where they come from.

A checkpoint is `NAME.safetensors` and beside it `NAME.json`: how the model is built, the command,
seed, device and data that made it, its metrics, a hash of the file, a signature of its tensors, and
what the model answered on one fixed input ("golden" values). Loading checks all of it.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.lab.arguments import require, whole
from attnlab.lab.cost import machine
from attnlab.lab.data import BUNDLED, photo
from attnlab.lab.data.samples import as_size
from attnlab.lab.files import atomic_write, data_dir, sha256, write_json

GOLDEN_TOLERANCE = 1e-4  # relative and absolute, float32 on a CPU
GOLDEN_VALUES = 64  # of a larger output, every n-th value is kept

CARD = {
    "factory", "arguments", "command", "seed", "device", "machine", "torch", "seconds", "data",
    "metrics", "sha256", "signature", "probe_image", "golden",
}  # fmt: skip


def signature(state: Mapping[str, Tensor]) -> str:
    """Hash of the names, shapes and dtypes of a state dict (not of its values)."""
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    factory: str,
    arguments: dict[str, Any],
    command: str,
    seed: int,
    device: torch.device | str,
    seconds: float,
    metrics: dict[str, float],
    data: dict[str, Any],
    probe_image: str | dict[str, Any],
    half: bool = False,
) -> Path:
    """Write `path`.safetensors and `path`.json, and return the latter's path.

    factory: "attnlab.….function" or a model that timm knows; `factory(**arguments)` rebuilds the
        model, and is tried before anything is written.
    command: what retrains it. data: what it was trained on, {"name": …, "split": …, …}; the version
        of the generator is added where the name is that of a bundled set.
    probe_image: input for the golden values: the name of a bundled photograph, shrunk to
        `arguments["img_size"]` (default 64), or {"shape": [1, 3, 64, 64], "seed": 0}.
    half: store float32 as float16, in half the space. The golden values are those of the rounded
        weights; measure `metrics` after `round_to_half(model)`, so that they are too.
    Raises ValueError when the factory builds another model or an argument does not fit.
    """
    whole(0, seed=seed)
    require("name" in data, "data", data, "at least the data's name")
    require(seconds >= 0, "seconds", seconds, "a number ≥ 0")
    require(bool(command.strip()), "command", command, "the command that retrains the model")
    if isinstance(probe_image, str):
        probe_image = {"photo": probe_image, "size": arguments.get("img_size", 64)}
    state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}
    rebuilt = _build({"factory": factory, "arguments": arguments})
    difference = _difference(state, rebuilt.state_dict())
    require(not difference, "factory", factory, f"one that builds this model; {difference}")
    rebuilt.load_state_dict(state)
    if half:
        round_to_half(rebuilt)
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    golden = _golden(rebuilt, probe_image)
    finite = all(map(math.isfinite, golden["values"]))
    require(finite, "model", type(model).__name__, "finite outputs on probe_image")
    if data["name"] in BUNDLED:
        generator = import_module(f"attnlab.lab.data.{data['name']}").VERSION
        data = {**data, "generator": generator}
    weights, sidecar = _paths(path)
    with atomic_write(weights) as temporary:
        save_file(state, temporary)
    write_json(
        sidecar,
        {
            "factory": factory,
            "arguments": arguments,
            "command": command,
            "seed": seed,
            "device": str(device),
            "machine": machine(device),
            "torch": torch.__version__,
            "seconds": round(seconds, 1),
            "data": data,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "sha256": sha256(weights),
            "signature": signature(state),
            "probe_image": probe_image,
            "golden": golden,
        },
    )
    return sidecar


@torch.no_grad()
def round_to_half(model: nn.Module) -> nn.Module:
    """Round the float32 numbers of a model, in place, to those that float16 has."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())
    return model


def info(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """What the sidecar says. Raises ValueError when it is damaged or missing, naming the others."""
    _, sidecar = _paths(name_or_path)
    if not sidecar.exists():
        there = [file.stem for file in sorted(sidecar.parent.glob("*.json"))]
        raise ValueError(f"checkpoint {str(name_or_path)!r}: no {sidecar}; there are {there}")
    try:
        card = json.loads(sidecar.read_text(encoding="utf-8"))
        missing = sorted(CARD - card.keys())
    except (json.JSONDecodeError, AttributeError) as error:
        mend = "restore it with git checkout, or give the command again that trained the model"
        raise ValueError(f"{sidecar} is damaged ({error}); {mend}") from error
    require(not missing, "sidecar", str(sidecar), f"it to have {missing}")
    return card


def load(
    name_or_path: str | os.PathLike, device: torch.device | str = "cpu", golden: bool = True
) -> nn.Module:
    """The model of a checkpoint, in eval mode, on `device`.

    name_or_path: a bundled checkpoint's name, or a path with or without its suffix.
    Checks the hash of the file, the signature of its tensors and, with `golden`, the answer to the
    probe input; raises ValueError that says what differs and which command retrains the model.
    """
    card = info(name_or_path)
    weights, _ = _paths(name_or_path)

    def check(true: bool, problem: str) -> None:
        if not true:
            raise ValueError(f"checkpoint {weights.stem}: {problem}. To retrain: {card['command']}")

    check(weights.exists(), f"{weights} is missing")
    check(sha256(weights) == card["sha256"], f"{weights} has changed: its sha256 differs")
    state = load_file(weights)
    check(signature(state) == card["signature"], "the signature in its sidecar is another")
    state = {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}
    try:
        model = _build(card)
    except ValueError as error:
        check(False, str(error))
    difference = _difference(state, model.state_dict())
    check(not difference, f"{card['factory']} builds another model now: {difference}")
    model.load_state_dict(state)
    if golden:
        now, then = _golden(model, card["probe_image"]), card["golden"]
        check(now["shape"] == then["shape"], f"its output has shape {now['shape']}")
        a, b = torch.tensor(now["values"]), torch.tensor(then["values"])
        close = torch.allclose(a, b, rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE)
        gap = f"{(a - b).abs().max():.2g}, on {card['probe_image']}"
        check(
            close, f"the model answers otherwise than when it was saved: golden values off by {gap}"
        )
    return model.to(device)


def verify() -> list[str]:
    """What is wrong with the bundled checkpoints, in words; [] when all load and answer right."""
    folder = data_dir() / "checkpoints"
    problems = []
    for sidecar in sorted(folder.glob("*.json")):
        try:
            load(sidecar)
        except ValueError as error:
            problems.append(str(error))
    lonely = {f.stem for f in folder.glob("*.safetensors")} - {
        f.stem for f in folder.glob("*.json")
    }
    return problems + [f"checkpoint {name}: {name}.json is missing" for name in sorted(lonely)]


def _paths(name_or_path: str | os.PathLike) -> tuple[Path, Path]:
    """Weights and sidecar of a path, or of a bundled checkpoint when it is a bare name."""
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:
        path = data_dir() / "checkpoints" / path
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


def _build(card: dict[str, Any]) -> nn.Module:
    """The untrained model, in eval mode. A sidecar can call attnlab and timm, and nothing else."""
    factory, arguments = card["factory"], card["arguments"]
    if "." in factory:
        module, _, name = factory.rpartition(".")
        try:
            ours = module.split(".")[0] == "attnlab"
            build = getattr(import_module(module), name) if ours else None
        except (ImportError, AttributeError):
            build = None
        ours = callable(build) and build.__module__.split(".")[0] == "attnlab"
        require(ours, "factory", factory, "attnlab's own function or class, or a timm model's name")
    else:
        require(timm.is_model(factory), "factory", factory, "a timm model, or attnlab.….function")
        build = partial(timm.create_model, factory)
    try:
        return build(**arguments).eval()
    except TypeError as error:
        raise ValueError(f"arguments={arguments!r}: {factory} takes others ({error})") from error


def _difference(saved: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> str:
    """The first tensor in which two state dicts differ, in words; "" when none does."""
    for name in sorted({*saved, *built}):
        ours, theirs = (
            f"{tuple(state[name].shape)} {state[name].dtype}" if name in state else "missing"
            for state in (saved, built)
        )
        if ours != theirs:
            return f"{name} is {ours} in the checkpoint and {theirs} in the model"
    return ""


@torch.no_grad()
def _golden(model: nn.Module, probe_image: dict[str, Any]) -> dict[str, Any]:
    """Shape of the model's output on the probe input, and up to 64 values of it (CPU, float32)."""
    output = model(_probe(probe_image))
    output = output if isinstance(output, Tensor) else output[0]
    values = output.flatten()[:: max(1, output.numel() // GOLDEN_VALUES)][:GOLDEN_VALUES]
    return {"shape": list(output.shape), "values": [round(v, 6) for v in values.tolist()]}


def _probe(probe_image: dict[str, Any]) -> Tensor:
    if set(probe_image) == {"photo", "size"}:
        size = as_size(probe_image["size"])
        image = photo(probe_image["photo"])[None]
        return F.interpolate(image, size, mode="bilinear", antialias=True)
    fits = set(probe_image) == {"shape", "seed"}
    expected = """a photograph's name, {"photo", "size"} or {"shape", "seed"}"""
    require(fits, "probe_image", probe_image, expected)
    generator = torch.Generator().manual_seed(probe_image["seed"])
    return torch.rand(probe_image["shape"], generator=generator)
