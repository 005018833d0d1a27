"""Sparsely recursive aggregation, partial updates, adaptive key frames (chapter 07).

Paper: Zhu et al. 2018, "Towards High Performance Video Object Detection". The idea: Deep Feature
Flow is fast and hands errors on, aggregation is accurate and slow. Aggregate at key frames only,
each with all before it; let the flow network say where what it moved does not fit, and compute that
again; and make a key frame where that is much.

What differs from the paper: a partial update saves no time here. There it does so within the
backbone, each of whose layers is computed only where U is 1, from the partly updated layer below;
that is inexact near the border of U. Here the backbone is any module, and runs as a whole where any
cell needs it; the share of cells is counted instead.
"""

import torch
from torch import Tensor, nn

from attnlab.flow import warp
from attnlab.propagation import FrameAggregator
from attnlab.streaming import VideoModel, check_frames, check_interval


class SparseRecursiveAggregation(VideoModel):
    """Aggregate at key frames, move the result to the others, and compute again where that is bad.

    Sparsely recursive aggregation, partial updating and adaptive key frames. Beside the flow, a
    field Q says how well features fit after the warp: they are computed again in
    U = [Q ≤ τ], and a frame where that is more than a share γ becomes a key frame.

    Args:
        backbone, head: as in `KeyFrameModel`.
        flow_net: as in `FlowWarp`.
        aggregator: `FrameAggregator`, over two frames.
        threshold: τ. −∞ never computes again, ∞ always.
        key_area: γ.
        interval: a key frame every so many frames instead; None: adaptive.
        partial_updates: False leaves U empty between key frames.

    Attributes:
        last_consistency, last_update: Q and U of the last `step`, `(B, 1, h, w)`; None at the
            first frame.
        updated_area: the means of U, summed over the frames that are no key frames: the share of a
            backbone that a layer-by-layer update would cost. This code runs the whole backbone
            where U is not empty, and neither backbone nor aggregator where it is.

    Raises:
        ValueError: an `interval` below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        flow_net: nn.Module,
        aggregator: FrameAggregator,
        *,
        threshold: float = 0.0,
        key_area: float = 0.2,
        interval: int | None = None,
        partial_updates: bool = True,
    ):
        check_interval(interval)
        super().__init__(backbone, head)
        self.flow_net, self.aggregator = flow_net, aggregator
        self.threshold, self.key_area, self.interval = threshold, key_area, interval
        self.partial_updates = partial_updates
        self.consistency = nn.Conv2d(flow_net.num_features, 1, 1)
        nn.init.normal_(self.consistency.weight, std=1e-3)
        nn.init.constant_(self.consistency.bias, 0.5)

    def reset(self) -> None:
        super().reset()
        self.last_consistency: Tensor | None = None
        self.last_update: Tensor | None = None
        self.updated_area = 0.0
        self._key: Tensor | None = None
        self._key_features: Tensor | None = None
        self._since_key = 0

    def forward(self, frame: Tensor, key: Tensor):
        """The answer for `frame`, and how much of it was computed again.

        In training, U is all 0, all 1, or the predicted one, each for a third of the samples, so
        that propagated and computed features both stay good. The loss is that of the task plus λ
        times the area; the paper's λ is unconfirmed, 2 in our source.

        Args:
            frame, key: `(B, 3, H, W)`.

        Returns:
            the head's answer, and the mean of the predicted U, a scalar. Through it, and through
            the features, Q learns by a surrogate: dU/dQ = −1 where |Q − τ| ≤ 1, else 0.
        """
        check_frames(frame=frame, key=key)
        moved, consistency = self.propagate(frame, key, self.backbone(key))
        predicted = update_mask(consistency, self.threshold)
        update = predicted if self.partial_updates else torch.zeros_like(predicted)
        if self.training and self.partial_updates:
            kind = torch.randint(3, (len(frame), 1, 1, 1), device=frame.device)
            update = torch.where(kind == 2, predicted, kind.to(predicted))
        return self.head(self._merge(moved, self.backbone(frame), update)), predicted.mean()

    def propagate(self, frame: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The key's features moved to `frame`, `(B, C, h, w)`, and Q, `(B, 1, h, w)`."""
        fields = self.flow_net.forward_features(frame, key, features.shape[2:])
        flow = self.flow_net.flow(fields, frame.shape[2:])
        return warp(features, flow), self.consistency(fields)

    def _merge(self, moved: Tensor, fresh: Tensor, update: Tensor) -> Tensor:
        """F̂ = U ⊙ fresh + (1 − U) ⊙ moved, aggregated with what was moved."""
        repaired = update * fresh + (1 - update) * moved
        return self.aggregator(torch.stack([moved, repaired], dim=1), repaired)

    @torch.no_grad()
    def step(self, frame: Tensor, is_key: bool | None = None):
        """The answer for the next frame of a video, `(B, 3, H, W)`, without gradients.

        Args:
            is_key: True forces a key frame, False forbids it; None leaves it to the schedule.

        Raises:
            ValueError: a frame of another shape than the one before; more than one video at once
                where key frames are adaptive.
        """
        if self.interval is None and is_key is None and len(frame) != 1:
            raise ValueError(f"frame {tuple(frame.shape)}: expected one video with interval=None")
        self._check_frame(frame)
        if self._key is None:
            return self._keep(frame, self._compute(frame))
        moved, self.last_consistency = self.propagate(frame, self._key, self._key_features)
        self.n_propagate += 1
        update = update_mask(self.last_consistency, self.threshold)
        if is_key is None and self.interval is None:
            is_key = update.mean().item() > self.key_area
        elif is_key is None:
            is_key = self._since_key >= self.interval
        if is_key or not self.partial_updates:
            update = torch.full_like(update, float(is_key))
        self.last_update = update
        if is_key:
            return self._keep(frame, self._merge(moved, self._compute(frame), update))
        self._since_key += 1
        self.updated_area += update.mean().item()
        if not update.any():  # then `_merge` is the mean of two equal maps
            return self._answer(moved, was_key=False)
        return self._answer(self._merge(moved, self.backbone(frame), update), was_key=False)

    def _compute(self, frame: Tensor) -> Tensor:
        self.n_backbone += 1
        return self.backbone(frame)

    def _keep(self, frame: Tensor, features: Tensor):
        self._key, self._key_features, self._since_key = frame, features, 1
        return self._answer(features, was_key=True)


def update_mask(consistency: Tensor, threshold: float) -> Tensor:
    """U = 1 where Q ≤ τ, else 0, of any shape; its gradient is −1 where |Q − τ| ≤ 1, else 0."""
    slope = -(consistency - threshold).clamp(-1, 1)
    return (consistency <= threshold).to(slope) + (slope - slope.detach())
