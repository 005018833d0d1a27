"""Train the checkpoints that are shipped in data/checkpoints: `train_checkpoints.py NAME …`.

Each function below is one checkpoint, with the recipe of the chapter that uses it. A run that was
stopped goes on where it was (`runs/NAME`).
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

from attnlab import lab
from attnlab.attention import vit_mini
from attnlab.cbam import cbam_resnet_mini
from attnlab.channel import se_resnet_mini
from attnlab.dependencyvit import dependencyvit_mini
from attnlab.lab import checkpoints, data, train
from attnlab.lab.experiments import ch01, ch03, ch10
from attnlab.lab.files import data_dir, repo_root
from attnlab.resnet import resnet_mini


def vit_mini_parts(name: str, seed: int, device: torch.device) -> None:
    """Chapters 00 and 01: `vit_mini` on the default parts task."""
    train.seed_everything(seed)
    model = vit_mini(num_classes=8)
    run_dir = repo_root() / "runs" / name
    history = ch01.fit_vit_mini(model, seed, device, steps=2_500, run_dir=run_dir)
    test = data.load("parts", "test", n=2_000)
    checkpoints.save(
        data_dir() / "checkpoints" / name,
        model,
        factory="attnlab.attention.vit_mini",
        arguments={"num_classes": 8},
        command=f"python scripts/train_checkpoints.py {name} --seed {seed}",
        seed=seed,
        device=device,
        seconds=history.seconds,
        metrics={"test accuracy": train.accuracy(model, test, device=device)},
        data={"name": "parts", "split": "train", "n": 20_000, "size": 64},
        probe_image="chelsea",
    )


def dependencyvit_mini_parts(name: str, seed: int, device: torch.device) -> None:
    """Chapter 09: a narrow `dependencyvit_mini` on the task of `vit_mini_parts`."""
    train.seed_everything(seed)
    arguments = {"embed_dim": 64, "num_heads": 4}
    model = dependencyvit_mini(**arguments)
    ch01.fold_normalization(model, mean=0.41, std=0.21)
    run_dir = repo_root() / "runs" / name
    history = ch01.fit_vit_mini(model, seed, device, steps=1_200, run_dir=run_dir)
    test = data.load("parts", "test", n=2_000)
    checkpoints.save(
        data_dir() / "checkpoints" / name,
        model,
        factory="attnlab.dependencyvit.dependencyvit_mini",
        arguments=arguments,
        command=f"python scripts/train_checkpoints.py {name} --seed {seed}",
        seed=seed,
        device=device,
        seconds=history.seconds,
        metrics={"test accuracy": train.accuracy(model, test, device=device)},
        data={"name": "parts", "split": "train", "n": 20_000, "size": 64},
        probe_image="chelsea",
    )


def scenes_recipe(
    name: str, factory: Callable[..., nn.Module], seed: int, device: torch.device
) -> None:
    """Train a factory of small ResNets on the default scenes, the same for every one of them."""
    train.seed_everything(seed)
    model = factory(num_classes=8)
    run_dir = repo_root() / "runs" / name
    history = ch03.fit_scenes(model, seed, device, steps=2_500, run_dir=run_dir)
    checkpoints.save(
        data_dir() / "checkpoints" / name,
        model,
        factory=f"{factory.__module__}.{factory.__name__}",
        arguments={"num_classes": 8},
        command=f"python scripts/train_checkpoints.py {name} --seed {seed}",
        seed=seed,
        device=device,
        seconds=history.seconds,
        metrics=ch03.scenes_accuracy(model, device),
        data={"name": "scenes", "split": "train", "n": 8_192, "size": 64},
        probe_image="chelsea",
    )


def resnet_mini_se_scenes(name: str, seed: int, device: torch.device) -> None:
    """Chapter 03: `resnet_mini` with squeeze-and-excitation."""
    scenes_recipe(name, se_resnet_mini, seed, device)


def resnet_mini_scenes(name: str, seed: int, device: torch.device) -> None:
    """Chapter 04: `resnet_mini` without any block, to compare with."""
    scenes_recipe(name, resnet_mini, seed, device)


def resnet_mini_cbam_scenes(name: str, seed: int, device: torch.device) -> None:
    """Chapter 04: `resnet_mini` with CBAM."""
    scenes_recipe(name, cbam_resnet_mini, seed, device)


def spformer_micro_masks(name: str, seed: int, device: torch.device) -> None:
    """Chapter 10: superpixels that learned from the masks of scenes."""
    train.seed_everything(seed)
    model = ch10.segmenter()
    run_dir = repo_root() / "runs" / name
    history = ch10.fit_masks(model, seed, device, steps=800, run_dir=run_dir)
    test = ch10.scenes("test_scenes", 512)
    checkpoints.save(
        data_dir() / "checkpoints" / name,
        model,
        factory="attnlab.lab.experiments.ch10.segmenter",
        arguments={},
        command=f"python scripts/train_checkpoints.py {name} --seed {seed}",
        seed=seed,
        device=device,
        seconds=history.seconds,
        metrics={
            "mIoU": ch10.mean_iou(model, test, device),
            **ch10.oracle(lambda x: ch10.association(model.backbone, x), test, device),
        },
        data={"name": "scenes", "split": "train", "n": 4_096, "size": 64},
        probe_image="chelsea",
    )


CHECKPOINTS = {
    "vit_mini_parts": vit_mini_parts,
    "dependencyvit_mini_parts": dependencyvit_mini_parts,
    "resnet_mini_se_scenes": resnet_mini_se_scenes,
    "resnet_mini_scenes": resnet_mini_scenes,
    "resnet_mini_cbam_scenes": resnet_mini_cbam_scenes,
    "spformer_micro_masks": spformer_micro_masks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CHECKPOINTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(CHECKPOINTS)):
        parser.error(f"unknown {', '.join(unknown)}: expected some of {', '.join(CHECKPOINTS)}")
    for name in chosen.names:
        CHECKPOINTS[name](name, chosen.seed, lab.device())
        print(f"{name}: {checkpoints.info(name)['metrics']}")


if __name__ == "__main__":
    main()
