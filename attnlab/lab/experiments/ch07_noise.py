"""Experiment of chapter 07: frames under noise, averaged along the flow (FGFA)."""

import torch
from torch import Tensor, nn

from attnlab.lab import batches, train, video_tasks
from attnlab.lab.data import Samples
from attnlab.lab.data.clips import flow_between
from attnlab.lab.experiments.ch07 import CHAPTER as CHAPTER
from attnlab.lab.experiments.ch07 import FRAMES, ClipModel, clips, fit_frames, miou
from attnlab.lab.video_tasks import Answer
from attnlab.video import aggregate, cosine_weights, resize_flow, warp


def noisy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss on single frames with Gaussian noise, of a strength up to 0.3, one for each clip."""
    images = batch["image"]
    strength = 0.3 * torch.rand(len(images), 1, 1, 1, 1, device=images.device)
    noisy = {**batch, "image": images + strength * torch.randn_like(images)}
    return video_tasks.pair_loss(model, noisy, reach=0)


# Row: are features warped by the exact flow, and the temperature of the weights (None: all equal).
MERGES = {
    "mean, no flow": (False, None),
    "mean, exact flow": (True, None),
    "cosine, T = 1": (True, 1.0),
    "cosine, T = 0.1": (True, 0.1),
}


def noise(seed: int, device) -> dict:
    """FGFA under noise of strength 0.3: mIoU of the middle frame from 1 to 9 frames around it."""
    train.seed_everything(seed)
    model = ClipModel().to(device)
    fit_frames(model, seed, device, loss=noisy_loss)
    test = clips("test", 128)
    generator = torch.Generator().manual_seed(seed)
    images = test.tensors["image"].float() / 255
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    noisy = Samples({**test.tensors, "image": images}, classes=test.classes)
    seen = [seen_by(model.eval(), batches.fetch(noisy, n, device))
            for n in torch.arange(128).split(64)]  # fmt: skip
    return {
        row: {f"{2 * k + 1} frames": merged_miou(model, seen, k, *how) for k in (0, 1, 2, 4)}
        for row, how in MERGES.items()
    }


@torch.no_grad()
def seen_by(model: ClipModel, batch: dict[str, Tensor]) -> tuple[dict, dict[bool, Tensor]]:
    """A batch, and its features as they are and warped onto the middle frame: `(B, T, C, h, w)`."""
    plain = [model.backbone(image) for image in batch["image"].unbind(2)]
    flows = (flow_between(batch, FRAMES // 2, j)[0] for j in range(FRAMES))
    warped = [warp(x, resize_flow(flow, x.shape[2:])) for x, flow in zip(plain, flows, strict=True)]
    return batch, {False: torch.stack(plain, dim=1), True: torch.stack(warped, dim=1)}


@torch.no_grad()
def merged_miou(
    model: ClipModel, seen: list, around: int, flow: bool, temperature: float | None
) -> float:
    """mIoU of the middle frame, its features averaged with those of `around` frames each side."""
    answers = []
    for batch, features in seen:
        middle = FRAMES // 2
        maps = features[flow][:, middle - around : middle + around + 1]
        weights = torch.full_like(maps[:, :, 0], 1 / maps.shape[1])
        if temperature is not None:
            weights = cosine_weights(maps, maps[:, around], temperature)
        answers.append(Answer(model.head(aggregate(maps, weights)), batch, middle))
    return miou(answers)
