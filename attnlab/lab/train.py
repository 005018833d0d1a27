"""One training loop, in which all randomness is a function of (seed, epoch, step, rank).

Nothing random is carried from step to step, so a run that was killed goes on exactly where its
last checkpoint stands. Optimizer, schedule and weight average are timm's; the defaults of the
recipe (AdamW, warm-up and cosine, label smoothing) follow DeiT, arXiv:2012.12877, Table 9.
"""

import atexit
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from attnlab import lab
from attnlab.lab import batches
from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.batches import flip_and_shift, seed_everything
from attnlab.lab.checkpoints import signature
from attnlab.lab.run_folder import RunFolder
from attnlab.lab.run_log import History, RunLog, TrainingDiverged

__all__ = ["History", "TrainingDiverged", "accuracy", "fit", "flip_and_shift", "seed_everything"]

SCHEDULES = {"cosine": {"sched": "cosine"}, "constant": {"sched": "step", "decay_rate": 1.0}}
READ_EVERY = 20  # steps between two looks at the loss on a GPU, where each look waits for it


def classification_loss(
    model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of `model(batch["image"])` (B, classes) with `batch["label"]` (B,)."""
    for key in ("image", "label"):
        require(key in batch, "data", sorted(batch), f"samples with {key!r}, or your own loss=")
    scores = model(batch["image"])
    return F.cross_entropy(scores, batch["label"], label_smoothing=label_smoothing)


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Any, batch_size: int = 256, device: torch.device | str | None = None
) -> float:
    """Share of `data` whose `label` gets the largest score of `model(image)` (B, classes).

    In eval mode, on `device` (default: where the model is); the model's mode is restored.
    """
    whole(1, batch_size=batch_size)
    size = batches.size(data)
    device = device or next((p.device for p in model.parameters()), "cpu")
    was_training = model.training
    model.eval()
    correct = 0
    for indices in torch.arange(size).split(batch_size):
        batch = batches.fetch(data, indices, device)
        correct += (model(batch["image"]).argmax(1) == batch["label"]).sum()
    model.train(was_training)
    return int(correct) / size


def fit(
    model: nn.Module,
    data: Any,
    *,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 0.05,
    clip: float | None = 1.0,
    label_smoothing: float = 0.1,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: bool | None = None,
    ema: float | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    run_dir: str | os.PathLike | None = None,
    resume: bool = True,
    save_every: int | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place, leave it in eval mode, and return what was logged.

    data: `len()` and `.batch(indices)`, a dict of tensors, or a Dataset of dicts or (image, label).
    loss: `loss(model, batch) -> scalar`; default: label-smoothed cross entropy on `batch["label"]`.
    steps, epochs: one of the two. An epoch is `len(data) // batch_size` steps; which samples are
        left over changes with the epoch.
    batch_size: of all processes together; at most `len(data)`.
    lr, weight_decay: the peak rate; the decay of weights with two axes or more (timm's rule).
    warmup: share of the steps in which lr rises linearly; then `schedule`: "cosine" | "constant".
    clip: largest norm of the gradient, or None. optimizer: any name that timm knows.
    augment: `augment(images, generator)`; images on the device, generator on the CPU.
    seed: of the order, of `augment`, and of dropout and all else that draws from torch.
    autocast: bfloat16 where that is safe; default: on CUDA only.
    ema: decay of an average of the weights, which is evaluated, and which the model ends with.
    evaluate: `evaluate(model) -> {name: number}`, called in eval mode without gradients every
        `evaluate_every` steps and after the last one.
    run_dir: folder for configuration, log and checkpoint (every `save_every` steps; default: ten
        times a run). With `resume`, a run that stopped there goes on, bit for bit on a CPU.

    Under `torchrun` the batch is split over the processes (DistributedDataParallel).
    Raises ValueError on bad arguments and on a `run_dir` of a run with other ones, TrainingDiverged
    when the loss or its gradient is not finite; the last checkpoint stays.
    """
    require(isinstance(model, nn.Module), "model", type(model).__name__, "an nn.Module")
    size = batches.size(data)
    require((steps is None) != (epochs is None), "steps, epochs", (steps, epochs), "one of the two")
    length = {"steps": steps} if epochs is None else {"epochs": epochs}
    whole(1, batch_size=batch_size, **length)
    whole(1, evaluate_every=1 if evaluate_every is None else evaluate_every)
    whole(1, save_every=1 if save_every is None else save_every)
    whole(0, seed=seed)
    inside("(0, inf)", lr=lr, clip=1.0 if clip is None else clip)
    inside("[0, inf)", weight_decay=weight_decay)
    inside("[0, 1)", warmup=warmup, label_smoothing=label_smoothing)
    inside("(0, 1)", ema=0.5 if ema is None else ema)
    require(schedule in SCHEDULES, "schedule", schedule, f"one of {sorted(SCHEDULES)}")

    device, rank, processes = join(device)
    batch_size = min(batch_size, size)
    fits = batch_size % processes == 0
    require(fits, "batch_size", batch_size, f"a multiple of the {processes} processes")
    steps_per_epoch = size // batch_size
    steps = steps or epochs * steps_per_epoch
    save_every = save_every or max(1, steps // 10)
    autocast = device.type == "cuda" if autocast is None else autocast
    loss = loss or partial(classification_loss, label_smoothing=label_smoothing)

    model.to(device)
    plain = getattr(model, "_orig_mod", model)  # torch.compile keeps the module one level down
    config = {
        "model": signature(plain.state_dict()), "data": batches.describe(data), "steps": steps,
        "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "warmup": warmup,
        "clip": clip, "loss": _dotted(loss), "augment": _dotted(augment), "optimizer": optimizer,
        "schedule": schedule, "seed": seed, "autocast": autocast, "ema": ema,
        "processes": processes,
    }  # fmt: skip
    optimizer = make_optimizer(plain, optimizer, lr, weight_decay)
    scheduler = _scheduler(optimizer, schedule, lr, steps, round(warmup * steps))
    average = ModelEmaV3(plain, decay=ema, use_warmup=True) if ema else None
    final = average.module if average else plain
    modules = {"model": plain, "average": final} if average else {"model": plain}

    folder = RunFolder(run_dir, config, writes=rank == 0) if run_dir is not None else None
    log = RunLog(folder, processes)
    first = log.open(resume, modules, optimizer)
    if processes > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)

    bar = tqdm(total=steps, initial=first, desc="training", disable=not progress or rank > 0)
    with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
        started = time.perf_counter() - log.history.seconds
        plain.train()
        for step in range(first, steps):
            epoch, position = divmod(step, steps_per_epoch)
            if position == 0 or step == first:
                order = torch.randperm(size, generator=batches.generator("order", seed, epoch))
            share = order[position * batch_size : (position + 1) * batch_size][rank::processes]
            torch.manual_seed(batches.mix("model", seed, step, rank))
            batch = batches.fetch(data, share, device)
            if augment:
                draws = batches.generator("augment", seed, step, rank)
                batch["image"] = augment(batch["image"], draws)

            scheduler.step(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                value = loss(model, batch)
            is_scalar = isinstance(value, Tensor) and value.ndim == 0
            require(is_scalar, "loss", value, "a function that returns a scalar tensor")
            optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
            optimizer.step()
            if average:
                average.update(plain, step)

            done = step + 1
            saves = folder and (done == steps or done % save_every == 0)
            evaluates = evaluate and (done == steps or done % (evaluate_every or steps) == 0)
            log.add(done, optimizer.param_groups[0]["lr"], value.detach(), norm)
            looks = device.type == "cpu" or done % READ_EVERY == 0 or done == steps
            if looks or saves or evaluates:
                bar.set_postfix_str(f"loss {log.read():.3f}", refresh=False)
                bar.update(done - bar.n)
            if evaluates and rank == 0:
                log.write({"step": done, "metrics": _evaluate(evaluate, final)})
            log.history.seconds = time.perf_counter() - started
            if saves:
                folder.save(modules, optimizer, done, log.history.seconds)
    if average:
        plain.load_state_dict(final.state_dict())
    plain.eval()
    log.close()
    return log.history


def _evaluate(evaluate: Callable, model: nn.Module) -> dict[str, float]:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        metrics = evaluate(model)
    model.train(was_training)
    require(isinstance(metrics, dict), "evaluate", metrics, "a function that returns a dict")
    return {name: float(value) for name, value in metrics.items()}


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """timm's optimizer of that name. Raises ValueError when it knows none."""
    try:
        return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"optimizer={name!r}: expected one that timm knows ({error})") from error


def _scheduler(optimizer: Any, schedule: str, lr: float, steps: int, rising: int) -> Any:
    """timm's schedule, with one of its epochs for one step: `rising` steps up, the others down."""
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=steps - rising, warmup_epochs=rising, warmup_prefix=True,
        warmup_lr=lr / (rising + 1), decay_epochs=steps, **SCHEDULES[schedule],
    )  # fmt: skip
    return scheduler


def join(device: torch.device | str | None) -> tuple[torch.device, int, int]:
    """Device, rank, number of processes. Under torchrun, joins the group until the process ends."""
    try:
        device = torch.device(device or lab.device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r}: expected one that is here ({error})") from error
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return device, dist.get_rank(), dist.get_world_size()


def _dotted(function: Any) -> str | None:
    """A name for a callable that is the same in every process."""
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{_dotted(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return None if function is None else f"{named.__module__}.{named.__qualname__}"
