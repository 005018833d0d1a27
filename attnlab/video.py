"""Features that travel from frame to frame, and what is gained: time, or accuracy (chapter 07).

Papers: Zhu et al. 2017, "Deep Feature Flow for Video Recognition" (DFF); Zhu et al. 2017,
"Flow-Guided Feature Aggregation for Video Object Detection" (FGFA); Zhu et al. 2018, "Towards High
Performance Video Object Detection"; Jiang et al. 2019, "Video Object Detection with
Locally-Weighted Deformable Neighbors". The idea: a deep network answers almost the same to
neighboring frames. Compute its features now and then, and move them (DFF, local attention); or
compute them always, and average along the motion (FGFA); or both, and repair what cannot be moved.

A backbone is any module frame → map `(B, C, h, w)`, a head any module map → answer. A propagation
is a module `(current, key, features) → features`, the first two being what `embed` makes of the two
frames: the frames themselves for a flow, cheap features for attention.

What differs from the papers: gradients reach whatever is not frozen by hand, batches of frame pairs
are the rule, and each choice of the published codes that is no equation is an option.
"""

from collections import deque

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from attnlab.flow import FlowNet as FlowNet
from attnlab.flow import FlowNetS as FlowNetS
from attnlab.flow import compose_flows as compose_flows
from attnlab.flow import resize_flow as resize_flow
from attnlab.flow import visibility as visibility
from attnlab.flow import warp
from attnlab.local_attention import AttentionWarp as AttentionWarp
from attnlab.local_attention import Embedding as Embedding
from attnlab.local_attention import attention_to_flow as attention_to_flow
from attnlab.local_attention import flow_to_attention as flow_to_attention
from attnlab.local_attention import local_attend as local_attend
from attnlab.local_attention import local_attention_warp as local_attention_warp
from attnlab.local_attention import local_correlation as local_correlation
from attnlab.local_attention import local_offsets as local_offsets
from attnlab.local_attention import progressive_offsets as progressive_offsets
from attnlab.propagation import FlowWarp, FrameAggregator
from attnlab.propagation import KeyFrameMemory as KeyFrameMemory
from attnlab.propagation import StaleCopy as StaleCopy
from attnlab.propagation import aggregate as aggregate
from attnlab.propagation import cosine_weights as cosine_weights
from attnlab.sparse_recursive import SparseRecursiveAggregation as SparseRecursiveAggregation
from attnlab.streaming import VideoModel, check_frames, check_interval
from attnlab.weighted_neighbors import LocallyWeightedNeighbors as LocallyWeightedNeighbors
from attnlab.weighted_neighbors import locally_weighted_neighbors as locally_weighted_neighbors


def dff_speedup(interval: int, ratio: float) -> float:
    """How many times faster than every frame: s(l) = l / (1 + (l − 1) r), at most 1 / r (DFF).

    Args:
        interval: l, a key frame every l frames.
        ratio: r, the cost of flow, warp and head over that of backbone and head.
    """
    if interval < 1 or ratio <= 0:
        raise ValueError(f"interval={interval}, ratio={ratio}: expected at least 1, and above 0")
    return interval / (1 + (interval - 1) * ratio)


class KeyFrameModel(VideoModel):
    """The backbone on key frames only; to the frames between, features are propagated.

    Always from the key frame, never from a frame in between, so that errors do not add up.

    Args:
        backbone, head: frame `(B, 3, H, W)` → map `(B, C, h, w)` → answer.
        propagate: a propagation: `StaleCopy`, `FlowWarp`, `AttentionWarp`,
            `LocallyWeightedNeighbors`, or your own.
        embed: what `propagate` compares, of a frame; the frame itself by default.
        memory: `KeyFrameMemory`; without, a key frame forgets the one before.
        interval: l, a key frame every l frames; 1 is the backbone on every frame.

    Raises:
        ValueError: an `interval` below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        propagate: nn.Module,
        *,
        embed: nn.Module | None = None,
        memory: nn.Module | None = None,
        interval: int = 10,
    ):
        check_interval(interval)
        super().__init__(backbone, head)
        self.propagate = propagate
        self.embed = nn.Identity() if embed is None else embed
        self.memory = memory
        self.interval = interval

    def reset(self) -> None:
        super().reset()
        self._key: Tensor | None = None  # its embedding
        self._key_features: Tensor | None = None
        self._since_key = 0

    def forward(self, frame: Tensor, key: Tensor, previous_key: Tensor | None = None):
        """The answer for `frame`, from the features of `key`: what is trained, on pairs of frames.

        Args:
            frame, key: `(B, 3, H, W)`. Where both are the same image, features are not propagated.
            previous_key: `(B, 3, H, W)`, what `memory` remembers at `key`.

        Raises:
            ValueError: frames of different shapes; `previous_key` without a `memory`.
        """
        return self.head(self.features(frame, key, previous_key))

    def features(self, frame: Tensor, key: Tensor, previous_key: Tensor | None = None) -> Tensor:
        """What the head sees: `(B, C, h, w)`; arguments as in `forward`."""
        check_frames(frame=frame, key=key)
        at_key, key_features = self.embed(key), self.backbone(key)
        if previous_key is not None:
            if self.memory is None:
                raise ValueError("previous_key: expected None, for this model has no memory")
            check_frames(frame=frame, previous_key=previous_key)
            before = self.embed(previous_key), self.backbone(previous_key)
            key_features = self.memory(at_key, *before, key_features)
        moved = self.propagate(self.embed(frame), at_key, key_features)
        same = rearrange((frame == key).flatten(1).all(dim=1), "b -> b 1 1 1")
        return torch.where(same, key_features, moved)

    @torch.no_grad()
    def step(self, frame: Tensor, is_key: bool | None = None):
        """The answer for the next frame of a video, `(B, 3, H, W)`, without gradients.

        Args:
            is_key: True forces a key frame (at a cut, say), False forbids it; by default every
                `interval`-th is one. The first frame always is.

        Raises:
            ValueError: a frame of another shape than the one before.
        """
        self._check_frame(frame)
        first = self._key is None
        due = self._since_key >= self.interval if is_key is None else is_key
        current = self.embed(frame)
        if not (first or due):
            features = self.propagate(current, self._key, self._key_features)
            self.n_propagate += 1
            self._since_key += 1
            return self._answer(features, was_key=False)
        features = self.backbone(frame)
        self.n_backbone += 1
        if self.memory is not None and not first:
            features = self.memory(current, self._key, self._key_features, features)
            self.n_propagate += 1
        self._key, self._key_features, self._since_key = current, features, 1
        return self._answer(features, was_key=True)


class DeepFeatureFlow(KeyFrameModel):
    """Key features warped along a predicted flow and scaled, y = head(W(F_k, M) ⊙ S) (DFF, Eq. 3).

    Args:
        backbone, head, interval: as in `KeyFrameModel`.
        flow_net: frame and key → flow; `FlowNet`, `FlowNetS` or alike.
        channels: C of the backbone's maps.
        scale_field: whether there is S, which is 1 at first.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        flow_net: nn.Module,
        channels: int,
        interval: int = 10,
        scale_field: bool = True,
    ):
        propagate = FlowWarp(flow_net, channels if scale_field else None)
        super().__init__(backbone, head, propagate, interval=interval)


class FlowGuidedAggregation(VideoModel):
    """Every frame's features, averaged with its neighbors' along the motion (FGFA, Algorithm 1).

    Args:
        backbone, head: as in `KeyFrameModel`.
        flow_net: current and neighboring frame → flow.
        aggregator: `FrameAggregator`.
        radius: K. A stream has 2K + 1 frames a window, from i − K to i + K.
        causal: a stream's window is i − 2K to i instead, and no answer is late.
        include_current: False keeps the current frame's own features out of the mean in training,
            as the public codes do; in evaluation they are always in.
        train_neighbors: how many of the other frames count in training, drawn anew each time
            (temporal dropout).
        embed_first: embed features before they are warped, once a frame, as the public code does
            in evaluation: cheaper, and not the same.

    Raises:
        ValueError: a negative `radius`, `train_neighbors` below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        flow_net: nn.Module,
        aggregator: FrameAggregator,
        radius: int = 10,
        *,
        causal: bool = False,
        include_current: bool = True,
        train_neighbors: int = 2,
        embed_first: bool = False,
    ):
        if radius < 0:
            raise ValueError(f"radius={radius}: expected at least 0")
        if train_neighbors < 1:
            raise ValueError(f"train_neighbors={train_neighbors}: expected at least 1")
        super().__init__(backbone, head)
        self.radius, self.causal = radius, causal
        self.flow_net, self.aggregator = flow_net, aggregator
        self.include_current, self.train_neighbors = include_current, train_neighbors
        self.embed_first = embed_first

    def reset(self) -> None:
        super().reset()
        self._window: deque[tuple[Tensor, Tensor]] = deque()

    def forward(self, clip: Tensor, index: int | None = None):
        """The answer for frame `index` of clips `(B, 3, T, H, W)`, the middle one by default.

        All other frames are its neighbors; in training, `train_neighbors` of them.

        Raises:
            ValueError: not such clips, or no such frame.
        """
        return self.head(self.features(clip, index))

    def features(self, clip: Tensor, index: int | None = None) -> Tensor:
        """What the head sees: `(B, C, h, w)`; arguments as in `forward`."""
        if clip.ndim != 5:
            raise ValueError(f"clip {tuple(clip.shape)}: expected (B, 3, T, H, W)")
        length = clip.shape[2]
        index = length // 2 if index is None else index
        if not 0 <= index < length:
            raise ValueError(f"index={index}: expected 0 to {length - 1}")
        others = [t for t in range(length) if t != index]
        if self.training:
            drawn = torch.randperm(len(others))[: self.train_neighbors]
            others = [others[t] for t in sorted(drawn.tolist())]
        frames = rearrange(clip[:, :, [index, *others]], "b c t h w -> b t c h w")
        maps = self._encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self._merge(frames, maps, self.include_current or not self.training or not others)

    @torch.no_grad()
    def step(self, frame: Tensor):
        """Take the next frame `(B, 3, H, W)`; the answer for the frame K before it, or None.

        None for the first K frames (never where `causal`); `flush` has the last K answers. Before
        the first frame of a video it is repeated, after the last one that.

        Raises:
            ValueError: a frame of another shape than the one before.
        """
        self._check_frame(frame)
        entry = frame, self._encode(frame)
        self.n_backbone += 1
        if not self._window:
            self._window.extend([entry] * self._place)
        return self._slide(entry)

    @torch.no_grad()
    def flush(self) -> list:
        """The answers that `step` still owes at the end of a video, in order."""
        owed = 0 if self.causal or not self._window else self.radius
        answers = [self._slide(self._window[-1]) for _ in range(owed)]
        self._window.clear()
        return [answer for answer in answers if answer is not None]

    @property
    def _place(self) -> int:
        """Where the current frame is in the window."""
        return 2 * self.radius if self.causal else self.radius

    def _slide(self, entry: tuple[Tensor, Tensor]):
        self._window.append(entry)
        if len(self._window) <= 2 * self.radius:
            return None
        if len(self._window) > 2 * self.radius + 1:
            self._window.popleft()
        frames, maps = zip(*self._window, strict=True)
        others = [t for t in range(len(frames)) if t != self._place]
        self.n_propagate += len(others)
        frames, maps = (
            torch.stack([x[t] for t in (self._place, *others)], dim=1) for x in (frames, maps)
        )
        return self._answer(self._merge(frames, maps), was_key=True)

    def _encode(self, frames: Tensor) -> Tensor:
        """Frames `(B, 3, H, W)` → what travels: features, and their embeddings if `embed_first`."""
        features = self.backbone(frames)
        if not self.embed_first:
            return features
        return torch.cat([features, self.aggregator.embed(features)], dim=1)

    def _merge(self, frames: Tensor, maps: Tensor, with_current: bool = True) -> Tensor:
        """Frames `(B, N, 3, H, W)` and what travels `(B, N, C, h, w)`, the current one first."""
        current, count = maps[:, 0], maps.shape[1] - 1
        moved = [current[:, None]] if with_current else []
        if count:
            others = rearrange(frames[:, 1:], "b n c h w -> (b n) c h w")
            frame = repeat(frames[:, 0], "b c h w -> (b n) c h w", n=count)
            flow = self.flow_net(frame, others, current.shape[2:])
            warped = warp(rearrange(maps[:, 1:], "b n c h w -> (b n) c h w"), flow)
            moved.append(rearrange(warped, "(b n) c h w -> b n c h w", n=count))
        moved = torch.cat(moved, dim=1)
        if not self.embed_first:
            return self.aggregator(moved, current)
        channels = self.aggregator.channels
        return self.aggregator.merge(
            moved[:, :, :channels], moved[:, :, channels:], current[:, channels:]
        )
