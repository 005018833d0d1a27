"""`attnlab train MODEL --data ...`: one command for all bundled data and for ImageNet.

Its options are the arguments of the functions that train, and what is not given has their defaults:
`attnlab.lab.imagenet.train` for ImageNet, `bundled` here for the bundled ones. Under `torchrun`
(`torchrun --nproc-per-node 8 -m attnlab.cli train ...`) each batch is split over the processes.
"""

import argparse
import ast
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnlab.lab import checkpoints, data, imagenet
from attnlab.lab import pixel_classifier as pixels
from attnlab.lab.arguments import require, whole
from attnlab.lab.run_log import TrainingDiverged
from attnlab.lab.train import History, accuracy, fit, flip_and_shift, seed_everything

# Data → what can be learned: the class of an image, or that of every pixel; the default first.
DATA = {
    "imagenet": ("classes",), "parts": ("classes", "masks"), "scenes": ("classes", "masks"),
    "clips": ("masks",),
}  # fmt: skip
SHARED = {
    "epochs": (int, "how often each image is seen"),
    "batch-size": (int, "images a step, of all processes together"),
    "img-size": (int, "px of a side of an image"),
    "lr": (float, "the highest learning rate"),
    "weight-decay": (float, "of weights with two axes or more"),
    "warmup-epochs": (int, "in which the learning rate rises"),
    "optimizer": (str, "a name that timm knows"),
    "clip": (float, "largest norm of the gradient"),
    "ema": (float, "decay of an average of the weights"),
    "seed": (int, "of all that is random"),
    "device": (str, "cpu, cuda, ..."),
}
IMAGENET = {
    "root": (Path, "the folder with train/ and val/"),
    "accumulate": (int, "parts of a batch that is too large for the memory"),
    "loss": (str, "bce or ce"),
    "mixup": (float, "0 is off"),
    "cutmix": (float, "0 is off"),
    "auto-augment": (str, "timm's words, like 3a"),
    "color-jitter": (float, "0 is off"),
    "erasing": (float, "share of the images of which a part is erased"),
    "workers": (int, "processes that read images"),
}


def main(arguments: Sequence[str]) -> int:
    """Train as the words after `attnlab train` say; the exit code is 2 when they make no sense."""
    parser = _parser()
    chosen = vars(parser.parse_args(arguments))
    model, name = chosen.pop("model"), chosen.pop("data")
    chosen["options"] = dict(chosen.get("options", ()))
    chosen["command"] = shlex.join(["attnlab", "train", *arguments])
    task = chosen.pop("task", DATA[name][0])
    own = f"{model}-{name}" if task == DATA[name][0] else f"{model}-{name}-{task}"
    run_dir = chosen.pop("run_dir", Path("runs") / own)
    given = {option.replace("-", "_") for option in IMAGENET} & set(chosen)
    try:
        require(task in DATA[name], "--task", task, f"one of {DATA[name]} with --data {name}")
        if name == "imagenet":
            require("root" in given, "--root", None, "the folder with train/ and val/")
            history = imagenet.train(model, chosen.pop("root"), run_dir, **chosen)
        else:
            require(not given, "--data", name, f"imagenet, with {sorted(given)}")
            history = bundled(model, name, run_dir, task, **chosen)
    except (ValueError, OSError, TrainingDiverged) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")  # without thirty lines of options
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: stopped; the same command goes on with {run_dir}\n")
    print(f"{run_dir}: {history.metrics[-1]}")
    return 0


def bundled(
    model: str,
    name: str,
    run_dir: Path,
    task: str = "classes",
    *,
    options: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    img_size: int = 64,
    warmup_epochs: int = 1,
    seed: int = 0,
    command: str = "attnlab train",
    **fitting: Any,
) -> History:
    """Train `model` on bundled data; `fitting` are `fit`'s arguments.

    task: "classes", to name the largest thing in an image; "masks", to tell the class of every
        pixel, by a `PixelClassifier` on the model's last map.

    After every epoch it is tested on the split "val". The end writes `run_dir`/model.safetensors
    and .json, which `attnlab.lab.checkpoints.load` opens.
    """
    whole(1, epochs=epochs, batch_size=batch_size, img_size=img_size)
    whole(0, warmup_epochs=warmup_epochs, seed=seed)
    expected = f"less than {epochs=}; 0 is none"
    require(warmup_epochs < epochs, "warmup_epochs", warmup_epochs, expected)
    seed_everything(seed)
    if task == "classes":
        samples, unseen = (data.load(name, split, size=img_size) for split in ("train", "val"))
        factory, arguments = model, {"num_classes": samples.num_classes, **(options or {})}
        network = imagenet.create(model, arguments)
        learning = {
            "augment": flip_and_shift, "evaluate": lambda net: {"top-1": accuracy(net, unseen)}
        }  # fmt: skip
    else:
        (samples, count), (unseen, _) = (
            pixels.samples(name, split, size=img_size) for split in ("train", "val")
        )
        backbone = imagenet.create(model, options or {})
        network = pixels.PixelClassifier(backbone, count)
        factory = f"{pixels.__name__}.{pixels.pixel_classifier.__name__}"
        arguments = {"model": model, "num_classes": count, **(options or {})}
        learning = {
            "loss": pixels.loss, "evaluate": lambda net: {"mIoU": pixels.mean_iou(net, unseen)}
        }  # fmt: skip
    _try(network, model, torch.zeros(2, 3, img_size, img_size))
    history = fit(
        network, samples, epochs=epochs, batch_size=batch_size, warmup=warmup_epochs / epochs,
        seed=seed, run_dir=run_dir, evaluate_every=max(1, len(samples) // batch_size),
        **learning, **fitting,
    )  # fmt: skip
    if not dist.is_initialized() or dist.get_rank() == 0:
        checkpoints.save(
            run_dir / "model", network, factory=factory, arguments=arguments, command=command,
            seed=seed, device=next(network.parameters()).device, seconds=history.seconds,
            metrics=history.metrics[-1], data={"name": name, "split": "train"},
            probe_image={"shape": [1, 3, img_size, img_size], "seed": 0},
        )  # fmt: skip
    return history


@torch.no_grad()
def _try(network: nn.Module, model: str, images: Tensor) -> None:
    """Raise ValueError, before anything is written, where the network cannot read the images."""
    try:
        network.eval()(images)
    except (ValueError, AssertionError, RuntimeError) as error:
        side = images.shape[-1]
        raise ValueError(
            f"img_size={side}: {model} cannot read such images ({error}). Try another --img-size, "
            f"or --option img_size={side}"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnlab train",
        description="Train a model. A run that was stopped goes on.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("model", help="a name that timm knows, like vit_mini or patchconvnet_s60")
    parser.add_argument("--data", required=True, choices=DATA)
    parser.add_argument(
        "--task", choices=("classes", "masks"),
        help="name the image, which is the default, or its pixels, which is that of clips",
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, help="default: runs/MODEL-DATA")
    parser.add_argument(
        "--option", dest="options", action="append", type=_option, metavar="NAME=VALUE",
        help="an argument of the model, like drop_path_rate=0.1; may be repeated",
    )  # fmt: skip
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, help="default: yes")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16")
    for title, group in (("all data", SHARED), ("ImageNet", IMAGENET)):
        options = parser.add_argument_group(title)
        for name, (kind, meaning) in group.items():
            options.add_argument(f"--{name}", type=kind, help=meaning)
    return parser


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where VALUE is a Python literal or else the text as it stands."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
