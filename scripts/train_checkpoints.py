"""Train the checkpoints that are shipped in data/checkpoints: `train_checkpoints.py NAME …`.

Each function below is one checkpoint, with the recipe of the chapter that uses it. A run that was
stopped goes on where it was (`runs/NAME`); only `clip_ways`, several short ones, begins again.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import nn

from attnlab import lab
from attnlab.attention import vit_mini
from attnlab.cbam import cbam_resnet_mini
from attnlab.channel import se_resnet_mini
from attnlab.dependencyvit import dependencyvit_mini
from attnlab.lab import checkpoints, data, train, video_tasks
from attnlab.lab.experiments import ch01, ch03, ch07, ch08, ch09, ch10
from attnlab.lab.files import data_dir, repo_root
from attnlab.lab.video_models import ClipSegmenter
from attnlab.patchconvnet import PatchConvNet, patchconvnet_mini
from attnlab.resnet import resnet_mini


def ship(name: str, model: nn.Module, seed: int, device: torch.device, **provenance) -> None:
    """Save a trained model with the command that made it; `provenance` as in `checkpoints.save`."""
    checkpoints.save(
        data_dir() / "checkpoints" / name,
        model,
        command=f"python scripts/train_checkpoints.py {name} --seed {seed}",
        seed=seed,
        device=device,
        probe_image="chelsea",
        **provenance,
    )


def parts_recipe(
    name: str, model: nn.Module, steps: int, factory: str, arguments: dict, seed: int,
    device: torch.device, scores: Callable[[nn.Module], dict[str, float]] = lambda model: {},
) -> None:  # fmt: skip
    """Train a network on the default parts task, and round it to half precision.

    `scores(model)` are metrics beside accuracy; all are of the rounded network.
    """
    run_dir = repo_root() / "runs" / name
    history = ch01.fit_vit_mini(model, seed, device, steps=steps, run_dir=run_dir)
    checkpoints.round_to_half(model)
    test = data.load("parts", "test", n=2_000)
    ship(
        name,
        model,
        seed,
        device,
        factory=factory,
        arguments=arguments,
        seconds=history.seconds,
        metrics={"test accuracy": train.accuracy(model, test, device=device), **scores(model)},
        data={"name": "parts", "split": "train", "n": 20_000, "size": 64},
        half=True,
    )


def vit_mini_parts(name: str, seed: int, device: torch.device) -> None:
    """Chapters 00, 01, 08, 09 and 11: `vit_mini` on the default parts task."""
    train.seed_everything(seed)
    arguments = {"num_classes": 8}
    factory = "attnlab.attention.vit_mini"
    parts_recipe(name, vit_mini(**arguments), 2_500, factory, arguments, seed, device)


def dependencyvit_recipe(name: str, steps: int, seed: int, device: torch.device, **options) -> None:
    """Train a narrow `dependencyvit_mini` on the task of `vit_mini_parts`."""
    train.seed_everything(seed)
    arguments = {"embed_dim": 64, "num_heads": 4}
    model = dependencyvit_mini(**arguments)
    ch01.fold_normalization(model, mean=0.41, std=0.21)
    factory = "attnlab.dependencyvit.dependencyvit_mini"
    parts_recipe(name, model, steps, factory, arguments, seed, device, **options)


def dependencyvit_mini_parts(name: str, seed: int, device: torch.device) -> None:
    """Chapter 09: `dependencyvit_mini`, narrow."""
    dependencyvit_recipe(name, 1_200, seed, device)


def dependencyvit_mini_parts_long(name: str, seed: int, device: torch.device) -> None:
    """Chapter 09: the same, trained four times as long."""
    scores = partial(ch09.gates_and_trees, device=device)
    dependencyvit_recipe(name, 5_000, seed, device, scores=scores)


def scenes_recipe(
    name: str, factory: Callable[..., nn.Module], seed: int, device: torch.device
) -> None:
    """Train a factory of small ResNets on the default scenes, the same for every one of them."""
    train.seed_everything(seed)
    model = factory(num_classes=8)
    run_dir = repo_root() / "runs" / name
    history = ch03.fit_scenes(model, seed, device, steps=2_500, run_dir=run_dir)
    ship(
        name,
        model,
        seed,
        device,
        factory=f"{factory.__module__}.{factory.__name__}",
        arguments={"num_classes": 8},
        seconds=history.seconds,
        metrics=ch03.scenes_accuracy(model, device),
        data={"name": "scenes", "split": "train", "n": 8_192, "size": 64},
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
    ship(
        name,
        model,
        seed,
        device,
        factory="attnlab.lab.experiments.ch10.segmenter",
        arguments={},
        seconds=history.seconds,
        metrics={
            "mIoU": ch10.mean_iou(model, test, device),
            **ch10.oracle(lambda x: ch10.association(model.backbone, x), test, device),
        },
        data={"name": "scenes", "split": "train", "n": 4_096, "size": 64},
    )


def patchconvnet_recipe(
    name: str, model: PatchConvNet, seed: int, device: torch.device, **options
) -> None:
    """Name all objects of scenes with one or two, small to large ones."""
    samples = ch08.scenes("train", 8_192)
    history = ch08.fit_sets(
        model, samples, seed, device, augment=train.flip_and_shift,
        run_dir=repo_root() / "runs" / name, **options,
    )  # fmt: skip
    ship(
        name,
        model,
        seed,
        device,
        factory="attnlab.patchconvnet.patchconvnet_mini",
        arguments={"num_classes": 8, "multiclass": model.multiclass},
        seconds=history.seconds,
        metrics={
            "one object": train.accuracy(model, ch08.scenes("test_scenes", 1_000, 1)),
            **ch08.set_scores(model, ch08.two_classes(), device),
        },
        data={"name": "scenes", "split": "train", "n": 8_192, "size": 64},
    )


def patchconvnet_mini_scenes(name: str, seed: int, device: torch.device) -> None:
    """Chapter 08: `patchconvnet_mini`, with one map."""
    train.seed_everything(seed)
    patchconvnet_recipe(name, patchconvnet_mini(), seed, device, steps=3_000, lr=3e-3)


def patchconvnet_mini_classes_scenes(name: str, seed: int, device: torch.device) -> None:
    """Chapter 08: a map for each class, fine-tuned from `patchconvnet_mini_scenes`."""
    train.seed_everything(seed)
    model = checkpoints.load("patchconvnet_mini_scenes", device=device).to_multiclass()
    patchconvnet_recipe(name, model, seed, device, steps=1_000, lr=1e-3)


def clip_flow(name: str, seed: int, device: torch.device) -> None:
    """Chapter 07: a flow network, by the exact flow of clips."""
    train.seed_everything(seed)
    model = ch07.FlowBetween()
    history = ch07.fit_flow(model.flow_net, seed, device, run_dir=repo_root() / "runs" / name)
    test = ch07.clips("test", 128)
    errors = {offset: video_tasks.flow_scores(model.flow_net, test, offset) for offset in (1, 4, 8)}
    ship(
        name,
        model,
        seed,
        device,
        factory="attnlab.lab.experiments.ch07.FlowBetween",
        arguments={},
        seconds=history.seconds,
        metrics={
            f"error on things, px, {offset} frames apart": error["objects"]
            for offset, error in errors.items()
        },
        data={"name": "clips", "split": "train", "n": 1_024, "size": 64},
    )


def clip_ways(name: str, seed: int, device: torch.device) -> None:
    """Chapter 07: a segmenter of clips, and six ways to carry its features to other frames."""
    started = perf_counter()
    model = ch07.all_ways(seed, device)
    test = ch07.clips("test", 128).to(device)
    answers = ch07.carried_by(model)
    ship(
        name,
        model,
        seed,
        device,
        factory="attnlab.lab.experiments.ch07.ClipModel",
        arguments={},
        seconds=perf_counter() - started,
        metrics={f"mIoU, {way}, 8 frames on": ch07.miou(answers[way](test, 8)) for way in answers},
        data={"name": "clips", "split": "train", "n": 512, "size": 64},
    )


def clip_segmenter(name: str, seed: int, device: torch.device) -> None:
    """`attnlab video`: classes of pixels, carried between key frames by local attention."""
    train.seed_everything(seed)
    model = ClipSegmenter()
    options = {"objects": (1, 2)}
    history = train.fit(
        model, video_tasks.load_clips("train", 1_024, **options),
        loss=partial(video_tasks.pair_loss, reach=5), steps=1_500, batch_size=16, lr=2e-3,
        seed=seed, device=device, run_dir=repo_root() / "runs" / name,
    )  # fmt: skip
    metrics = {}
    for split in ("val", "test"):  # cut-outs of their own, all three of the splits
        clips = video_tasks.load_clips(split, 128, **options)
        for offset in (0, 4):
            scores = video_tasks.segmentation_scores(video_tasks.answers_at(model, clips, offset))
            metrics[f"{split} mIoU, {offset} frames from the key frame"] = scores["all"]
    ship(
        name,
        model,
        seed,
        device,
        factory="attnlab.lab.video_models.ClipSegmenter",
        arguments={},
        seconds=history.seconds,
        metrics=metrics,
        data={"name": "clips", "split": "train", "n": 1_024, "size": 64, **options},
    )


CHECKPOINTS = {
    recipe.__name__: recipe
    for recipe in (
        vit_mini_parts,
        dependencyvit_mini_parts,
        dependencyvit_mini_parts_long,
        resnet_mini_se_scenes,
        resnet_mini_scenes,
        resnet_mini_cbam_scenes,
        spformer_micro_masks,
        clip_segmenter,
        clip_flow,
        clip_ways,
        patchconvnet_mini_scenes,
        patchconvnet_mini_classes_scenes,
    )
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
