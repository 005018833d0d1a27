"""Train the checkpoints that are shipped in data/checkpoints: `train_checkpoints.py NAME …`.

Each function below is one checkpoint, with the recipe of the chapter that uses it. A run that was
stopped goes on where it was (`runs/NAME`).
"""

import argparse

import torch

from attnlab import lab
from attnlab.attention import vit_mini
from attnlab.lab import checkpoints, data, train
from attnlab.lab.experiments import ch01
from attnlab.lab.files import data_dir, repo_root


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


CHECKPOINTS = {"vit_mini_parts": vit_mini_parts}


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
