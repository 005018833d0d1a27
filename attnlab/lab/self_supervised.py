"""Pretraining without labels: self-distillation with a running-average teacher and multi-crop.

Papers: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO);
Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer". The idea: the student sees
one crop of an image and has to say what the teacher says of another, as a soft choice among learned
prototypes; and it has to say of patches that were hidden from it what the teacher, who sees them,
says of them. The teacher is the running average of the student.

What differs from the papers: `SelfDistillation` is a module whose output is the loss, teacher and
centers included, so that `attnlab.lab.fit` trains it, and resumes it exactly. Crops are jittered
but not blurred or solarised; hidden patches are drawn one by one, not in blocks; weight decay is
constant, and the prototypes learn from the first step on.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.batches import mix
from attnlab.lab.multi_crop import multi_crop
from attnlab.lab.run_log import History
from attnlab.lab.train import fit
from attnlab.layers import Mlp


class ProjectionHead(nn.Module):
    """Cosine of a projection with each prototype: `(..., dim)` → `(..., prototypes)`."""

    def __init__(self, dim: int, prototypes: int, hidden: int, bottleneck: int):
        super().__init__()
        self.mlp = Mlp(dim, hidden, bottleneck)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class SelfDistillation(nn.Module):
    """A list of views (two large ones first) → DINO's loss plus iBOT's, a scalar.

    In training, each call first moves the teacher towards the student, and then moves the centers.

    Args:
        model: `VisionTransformer` or `DependencyViT`; it is the student, and loses its classifier.
        steps: length of the training, for the schedules.
        prototypes, hidden, bottleneck: sizes of the projection.
        masked: share of the patches that are hidden from the student in its large views; 0 is DINO.
        patch_weight: weight of iBOT's loss.
        student_temp, teacher_temp: temperatures; the lower, the sharper. The teacher's rises from
            the first to the second number in the first tenth of the steps.
        momentum: of the teacher at the start; rises to 1 along a cosine.
        center_momentum: of what is subtracted from the teacher's scores against collapse.

    Raises:
        ValueError: a number out of range; fewer than two views.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        prototypes: int = 1024,
        hidden: int = 512,
        bottleneck: int = 128,
        masked: float = 0.3,
        patch_weight: float = 1.0,
        student_temp: float = 0.1,
        teacher_temp: tuple[float, float] = (0.04, 0.07),
        momentum: float = 0.996,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        whole(1, steps=steps, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck)
        inside("[0, 1)", masked=masked, momentum=momentum, center_momentum=center_momentum)
        inside("[0, inf)", patch_weight=patch_weight)
        inside("(0, inf)", student_temp=student_temp, first=teacher_temp[0], last=teacher_temp[1])
        self.steps, self.masked, self.patch_weight = steps, masked, patch_weight
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.momentum, self.center_momentum = momentum, center_momentum
        model.reset_classifier(0)
        self.student = model
        self.student_head = ProjectionHead(model.num_features, prototypes, hidden, bottleneck)
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(model.num_features), requires_grad=masked > 0)
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("patch_center", torch.zeros(prototypes))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> "SelfDistillation":
        """Only the student trains: the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """The student's, by their names here, and the mask token."""
        return {f"student.{name}" for name in self.student.no_weight_decay()} | {"mask_token"}

    def forward(self, views: list[Tensor]) -> Tensor:
        require(len(views) >= 2, "views", f"{len(views)} of them", "two large ones at least")
        if self.training:
            self._follow()
        large = torch.cat(views[:2])
        with torch.no_grad():
            pooled, patches = features(self.teacher, large)
            scores, patch_scores = self.teacher_head(pooled), self.teacher_head(patches)
            targets = self._sharpened(scores, self.center).chunk(2)
            patch_targets = self._sharpened(patch_scores, self.patch_center)
            if self.training:
                self.center.lerp_(scores.float().mean(0), 1 - self.center_momentum)
                patch_mean = patch_scores.float().mean((0, 1))
                self.patch_center.lerp_(patch_mean, 1 - self.center_momentum)

        hidden = self._hidden(*patches.shape[:2], large.device)
        with self._hide(hidden):
            pooled, patches = features(self.student, large)
        answers = list(self.student_head(pooled).chunk(2))
        if len(views) > 2:
            small, _ = features(self.student, torch.cat(views[2:]))
            answers += self.student_head(small).chunk(len(views) - 2)
        pairs = [
            self._cross_entropy(answer, target).mean()
            for i, target in enumerate(targets)
            for j, answer in enumerate(answers)
            if i != j
        ]
        loss = torch.stack(pairs).mean()
        if hidden.any():
            of_hidden = self.student_head(patches[hidden])
            guesses = self._cross_entropy(of_hidden, patch_targets[hidden])
            loss = loss + self.patch_weight * guesses.mean()
        return loss

    @torch.no_grad()
    def _follow(self) -> None:
        """The teacher moves by 1 − m towards the student; m goes from `momentum` to 1."""
        progress = min(1.0, self.step.item() / self.steps)
        move = (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for ours, theirs in ((self.teacher, self.student), (self.teacher_head, self.student_head)):
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.lerp_(b, move)
        self.step += 1

    def _sharpened(self, scores: Tensor, center: Tensor) -> Tensor:
        first, last = self.teacher_temp
        progress = min(1.0, 10 * self.step.item() / self.steps)
        return ((scores.float() - center) / (first + (last - first) * progress)).softmax(-1)

    def _cross_entropy(self, answer: Tensor, target: Tensor) -> Tensor:
        return -(target * (answer.float() / self.student_temp).log_softmax(-1)).sum(-1)

    def _hidden(self, batch: int, patches: int, device: torch.device) -> Tensor:
        """Which patches the student does not see: the same number in each view, `(batch, N)`."""
        draws = torch.rand(batch, patches, device=device)
        return draws.argsort(1) < round(self.masked * patches)

    @contextmanager
    def _hide(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the student's hidden patches are the mask token."""

        def hide(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            return torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)

        handle = self.student.patch_embed.register_forward_hook(hide)
        try:
            yield
        finally:
            handle.remove()


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a transformer of ours says of each image, `(B, D)`, and of each patch, `(B, N, D)`."""
    encoded = model.forward_features(images)
    pooled = model.forward_head(encoded, pre_logits=True)
    if hasattr(model, "restore"):  # DependencyViT: pruned patches come back from their parents
        return pooled, model.restore(encoded)
    return pooled, encoded[:, model.num_prefix_tokens :]


def distillation_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The `loss` of `fit` for a `SelfDistillation` and views as `batch["image"]`."""
    return model(batch["image"])


def pretrain(
    model: nn.Module,
    data: Any,
    steps: int,
    *,
    crops: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
    seed: int = 0,
    **options,
) -> History:
    """Train `model` without labels, and leave the teacher's weights in it, in eval mode.

    The model loses its classifier: `reset_classifier` gives it a new one.

    Args:
        data: as for `fit`; labels are not looked at.
        crops, distillation: arguments of `multi_crop` and of `SelfDistillation`.
        options: further arguments of `fit` (batch_size, lr, run_dir, …).

    Returns:
        What `fit` logged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix("projection heads", seed))
        learner = SelfDistillation(model, steps, **distillation or {})
    augment = partial(multi_crop, **crops or {})
    history = fit(
        learner, data, loss=distillation_loss, augment=augment, steps=steps, seed=seed, **options
    )
    model.load_state_dict(learner.teacher.state_dict())
    return history
