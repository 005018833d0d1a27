"""Training a classifier at the papers' scale, with timm's pieces.

Data, augmentation, optimizer, schedule and weight average are timm's; several GPUs are PyTorch's
DistributedDataParallel under `torchrun`. The defaults are what the first author of PatchConvNet
states (LAMB, a rate of 3e-3 for batches of 2,048: facebookresearch/deit, issue 185) and for the
rest the defaults of that repository's script, which are DeiT's. The paper's drop path and number of
epochs are not known to us.

    torchrun --nproc-per-node 8 -m attnlab.cli train patchconvnet_s60 --data imagenet --root ...
"""

import math
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from attnlab.lab import checkpoints
from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.batches import mix, seed_everything
from attnlab.lab.data.adapters import SETS
from attnlab.lab.data.adapters.reading import Place
from attnlab.lab.run_folder import RunFolder
from attnlab.lab.run_log import History, RunLog
from attnlab.lab.train import READ_EVERY, join, make_optimizer

LOSSES = {  # and how the labels are smoothed; any smoothing would make every class right in "bce"
    "bce": (BinaryCrossEntropy(smoothing=0, target_threshold=0), 0.0),
    "ce": (SoftTargetCrossEntropy(), 0.1),
}


def train(
    model: str,
    root: str | os.PathLike,
    run_dir: str | os.PathLike,
    *,
    options: dict[str, Any] | None = None,
    epochs: int = 300,
    batch_size: int = 2048,
    accumulate: int = 1,
    img_size: int = 224,
    lr: float = 3e-3,
    optimizer: str = "lamb",
    weight_decay: float = 0.05,
    warmup_epochs: int = 5,
    clip: float | None = None,
    loss: str = "bce",
    mixup: float = 0.8,
    cutmix: float = 1.0,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.3,
    erasing: float = 0.25,
    ema: float = 0.99996,
    autocast: bool | None = None,
    workers: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    resume: bool = True,
    progress: bool = True,
    command: str = "attnlab train",
) -> History:
    """Train `model` on the images in `root`/train, and test it on those in `root`/val.

    Both have a folder for each class, as ImageNet's do. Every epoch ends with a line of accuracies
    and a checkpoint, from which the same call goes on; the last one also with
    `run_dir`/model.safetensors and .json, which `attnlab.lab.checkpoints.load` opens.

    model, options: a name that timm knows, ours included, and its arguments besides num_classes.
    batch_size: of all processes together; accumulate: how many parts each of them divides its
        share into, one after the other, where it does not fit (BatchNorm sees a part at a time).
    lr, weight_decay: as in `lab.train.fit`; lr rises for `warmup_epochs`, then falls as a cosine.
    clip: largest norm of the gradient; LAMB has its own, 1.
    loss: "bce": binary cross entropy, in which all classes of a mixed image are right; "ce": cross
        entropy with the shares that they have in it, smoothed.
    mixup, cutmix: parameters of their Beta distributions; 0 is off.
    auto_augment, color_jitter, erasing: in timm's words: "3a" is DeiT III's, "" is off.
    ema: decay of the average of the weights, which is what is tested, and kept in the end.
    autocast: bfloat16 where that is safe; default: on CUDA only.
    workers: processes that read images, for each one that trains.
    command: noted in the last checkpoint as what makes it again.

    Raises ValueError on bad arguments and on a `run_dir` of a run with other ones,
    FileNotFoundError where there are no such folders, TrainingDiverged as `fit` does.
    """
    whole(1, epochs=epochs, batch_size=batch_size, accumulate=accumulate, img_size=img_size)
    whole(0, warmup_epochs=warmup_epochs, workers=workers, seed=seed)
    inside("(0, inf)", lr=lr, clip=1.0 if clip is None else clip)
    inside("[0, inf)", weight_decay=weight_decay, mixup=mixup, cutmix=cutmix)
    inside("[0, 1)", erasing=erasing)
    inside("(0, 1)", ema=ema)
    require(warmup_epochs < epochs, "warmup_epochs", warmup_epochs, f"less than {epochs=}")
    require(loss in LOSSES, "loss", loss, f"one of {sorted(LOSSES)}")
    device, rank, processes = join(device)
    pairs = 2 * processes * accumulate  # timm mixes the images of a part in pairs
    require(batch_size % pairs == 0, "batch_size", batch_size, f"a multiple of {pairs}")
    autocast = device.type == "cuda" if autocast is None else autocast

    place = Place("imagenet", Path(root), SETS["imagenet"].page)
    images = create_dataset("", place.find("train"), search_split=False)
    classes = images.reader.class_to_idx
    unseen = create_dataset("", place.find("val"), search_split=False, class_map=classes)
    require(len(images) >= batch_size, "batch_size", batch_size, f"at most {len(images)} images")
    reading = {
        "input_size": (3, img_size, img_size), "batch_size": 2 * batch_size // pairs,
        "num_workers": workers, "distributed": processes > 1, "device": device,
        "interpolation": "bicubic", "pin_memory": device.type == "cuda",
        "persistent_workers": False,  # new ones each epoch, or a resumed run would differ
    }  # fmt: skip
    loader = create_loader(
        images, is_training=True, auto_augment=auto_augment or None, color_jitter=color_jitter,
        re_prob=erasing, re_mode="pixel", **reading,
    )  # fmt: skip
    test_loader = create_loader(unseen, **reading)
    criterion, smoothing = LOSSES[loss]
    mixing = Mixup(
        mixup, cutmix, prob=float(mixup + cutmix > 0), label_smoothing=smoothing,
        num_classes=len(classes),
    )  # fmt: skip
    steps_per_epoch = len(loader) // accumulate

    seed_everything(seed)
    arguments = {"num_classes": len(classes), **(options or {})}
    plain = create(model, arguments).to(device)
    if device.type == "cuda":
        plain.to(memory_format=torch.channels_last)
    config = {
        "model": model, "arguments": arguments, "images": len(images), "epochs": epochs,
        "batch_size": batch_size, "accumulate": accumulate, "img_size": img_size, "lr": lr,
        "optimizer": optimizer, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs,
        "clip": clip, "loss": loss, "mixup": mixup, "cutmix": cutmix, "auto_augment": auto_augment,
        "color_jitter": color_jitter, "erasing": erasing, "ema": ema, "autocast": autocast,
        "seed": seed, "processes": processes,
    }  # fmt: skip
    optimizer = make_optimizer(plain, optimizer, lr, weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs - warmup_epochs, warmup_epochs=warmup_epochs,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=steps_per_epoch,
    )  # fmt: skip
    average = ModelEmaV3(plain, decay=ema, use_warmup=True)
    modules = {"model": plain, "average": average.module}
    folder = RunFolder(run_dir, config, writes=rank == 0)
    log = RunLog(folder, processes)
    first = log.open(resume, modules, optimizer)
    network: nn.Module = plain
    if processes > 1:
        ids = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(plain, device_ids=ids)

    steps = epochs * steps_per_epoch
    started = time.perf_counter() - log.history.seconds
    bar = tqdm(total=steps, initial=first, desc=model, disable=not progress or rank > 0)
    for epoch in range(first // steps_per_epoch, epochs):
        seed_everything(mix("imagenet", seed, epoch, rank) % 2**32)
        if processes > 1:
            loader.sampler.set_epoch(mix("order", seed, epoch))
        plain.train()
        parts = (mixing(*part) for part in loader)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            scheduler.step_update(step)
            optimizer.zero_grad()
            value = _backward(network, criterion, islice(parts, accumulate), accumulate, autocast)
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
            optimizer.step()
            average.update(plain, step)
            done = step + 1
            log.add(done, optimizer.param_groups[0]["lr"], value, norm)
            if done % READ_EVERY == 0 or done % steps_per_epoch == 0:
                bar.set_postfix_str(f"loss {log.read():.3f}", refresh=False)
                bar.update(done - bar.n)
        metrics = accuracies(average.module, test_loader, device, autocast)
        log.write({"step": done, "metrics": {"epoch": epoch + 1, **metrics}})
        log.history.seconds = time.perf_counter() - started
        folder.save(modules, optimizer, done, log.history.seconds)
    bar.close()
    if rank == 0:
        checkpoints.save(
            folder.path / "model", average.module, factory=model, arguments=arguments,
            command=command, seed=seed, device=device, seconds=log.history.seconds,
            metrics=log.history.metrics[-1], data={"name": "imagenet", "images": len(images)},
            probe_image={"shape": [1, 3, img_size, img_size], "seed": 0},
        )  # fmt: skip
    log.close()
    return log.history


def _backward(
    network: nn.Module,
    criterion: nn.Module,
    parts: Iterable[tuple[Tensor, Tensor]],
    count: int,
    autocast: bool,
) -> Tensor:
    """Add up the gradients of `count` parts of a batch, and return the mean of their losses."""
    total = 0
    for number, (images, target) in enumerate(parts, 1):
        waits = number < count and isinstance(network, DistributedDataParallel)
        with network.no_sync() if waits else nullcontext():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
                loss = criterion(network(images), target) / count
            loss.backward()
        total = total + loss.detach()
    return total


@torch.no_grad()
def accuracies(
    model: nn.Module, loader: Any, device: torch.device, autocast: bool = False
) -> dict[str, float]:
    """Share of images whose class is the first, or among the first five, of all processes.

    Where they do not divide evenly, timm's sampler gives a few images twice.
    """
    model.eval()
    counts = torch.zeros(3, device=device)
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scores = model(images)
        right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        counts += torch.stack([right[:, 0].sum(), right.sum(), torch.ones_like(labels).sum()])
    if dist.is_initialized():
        dist.all_reduce(counts)
    top1, top5, total = counts.tolist()
    return {"top-1": top1 / total, "top-5": top5 / total}


def create(model: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's `create_model`. Raises ValueError for an unknown name, and for unknown arguments."""
    require(timm.is_model(model), "model", model, "a name that timm knows, such as vit_mini")
    try:
        return timm.create_model(model, **arguments)
    except TypeError as error:
        raise ValueError(f"options={arguments!r}: {model} takes others ({error})") from error
