"""Our models as the backbones that others want: dense heads, detectors, timm.

`Segmenter` (attnlab.heads) asks a backbone for its stages; the detectors of torchvision, such as
Mask R-CNN (He et al. 2017), call it and look at `out_channels`. A plain transformer has one map of
one resolution, and so has PatchConvNet; Lite models bring their pruned patches back for it.

timm asks for `feature_info`, `forward_intermediates` and the like, which `attnlab.models` gives to
the model classes from here: blocks are listened to while the model runs, so that no model is
written twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import wraps
from inspect import signature

from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnlab import attention, spformer
from attnlab.attention_pooling import AttentionPool
from attnlab.dependency_pruning import restore
from attnlab.dependencyvit import DependencyBlock, DependencyViT
from attnlab.layers import check_map
from attnlab.patchconvnet import ConvBlock, PatchConvNet
from attnlab.resnet import STAGES, GlobalAveragePool, ResNet

BLOCKS = (attention.Block, spformer.Block, DependencyBlock, ConvBlock)


class MapBackbone(nn.Module):
    """One map of one resolution, `(B, D, rows, columns)`, under the names that dense heads expect.

    Args:
        model: has `num_features` and `forward_map(images, **options)`, such as `DependencyViT`; or,
            such as `ResNet` and timm's convolutional networks, a `forward_features` that gives a
            map.
        options: passed along, for example `fill="hard"`.

    Attributes:
        out_channels: D, for torchvision.

    Raises `ValueError` for a model that has neither, and when what it gives is no such map.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__()
        if not (hasattr(model, "forward_map") or hasattr(model, "forward_features")):
            raise ValueError(f"model={type(model).__name__}: expected one with forward_map(images)")
        self.model, self.options = model, options
        self.out_channels = model.num_features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What torchvision's detectors ask for: `{"0": map}`."""
        return {"0": self._map(x)}

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """What `Segmenter` asks for: `{"layer4": map}`."""
        return {"layer4": self._map(x)}

    def _map(self, x: Tensor) -> Tensor:
        forward = getattr(self.model, "forward_map", None) or self.model.forward_features
        map = forward(x, **self.options)
        check_map(map, self.out_channels, "map")
        return map


def feature_info(model: nn.Module) -> list[dict]:
    """What timm asks of each map of a model of ours: `num_chs`, `reduction` (stride), `module`.

    A ResNet has five, of the stem and the stages, as timm's have; the others one a block.
    """
    if isinstance(model, ResNet):
        return _stages_info(model)
    if isinstance(model, PatchConvNet):
        stride = model.stride
    elif isinstance(model, spformer.SPFormer):
        stride = model.patch_size
    else:
        stride = max(model.patch_embed.patch_size)
    names = [name for name, module in model.named_modules() if isinstance(module, BLOCKS)]
    return [{"num_chs": model.num_features, "reduction": stride, "module": name} for name in names]


def _stages_info(model: ResNet) -> list[dict]:
    channels, stride = model.layer1[0].conv1.in_channels, 2
    info = [{"num_chs": channels, "reduction": stride, "module": "relu"}]
    stride *= 2 if isinstance(model.maxpool, nn.MaxPool2d) else 1
    for index, name in enumerate(STAGES):
        shortcut = getattr(model, name)[0].downsample
        stride *= 1 if shortcut is None else shortcut[0].stride[0]
        channels = model.num_features // 2 ** (len(STAGES) - 1 - index)
        info.append({"num_chs": channels, "reduction": stride, "module": name})
    return info


def forward_intermediates(
    model: nn.Module,
    x: Tensor,
    indices: int | Sequence[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
    """Images `(B, in_chans, H, W)` → what `forward_features` gives, and maps of places on the way.

    Args:
        indices: of `feature_info`, negative ones from the end; a number n is the last n, None all.
            Maps come in the order of depth.
        norm: the last norm reads every map, in the models whose `forward_features` ends with it
            (`VisionTransformer`, `DependencyViT`).
        stop_early: timm's word; here all blocks run.
        output_fmt: "NCHW", maps `(B, C, h, w)`; or "NLC", `(B, h·w, C)`. Prefix tokens are left
            out, and pruned patches come back from their parents.
        intermediates_only: return the maps alone.

    Raises:
        ValueError: indices that are not there, or an unknown format.
    """
    names = [info["module"] for info in feature_info(model)]
    taken = _taken(len(names), indices)
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt={output_fmt!r}: expected NCHW or NLC")
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index in taken:
            for handle in _listen(model.get_submodule(names[index]), outputs, index):
                stack.callback(handle.remove)
        features = model.forward_features(x)
    maps = [_as_map(model, index, outputs[index], x, features, norm) for index in taken]
    if output_fmt == "NLC":
        maps = [rearrange(map, "b d h w -> b (h w) d") for map in maps]
    return maps if intermediates_only else (features, maps)


def prune_intermediate_layers(
    model: nn.Module,
    indices: int | Sequence[int] | None = 1,
    prune_norm: bool = False,
    prune_head: bool = True,
) -> list[int]:
    """What timm calls before it takes maps only: the classifier goes, and the layers stay."""
    if prune_head:
        model.reset_classifier(0)
    return _taken(len(feature_info(model)), indices)


def _taken(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Places from 0 to count - 1, ascending."""
    if indices is None:
        return list(range(count))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    if not wanted or not all(-count <= index < count for index in wanted):
        raise ValueError(
            f"indices={indices}: expected 1 to {count} maps, or places from {-count} to {count - 1}"
        )
    return sorted({index % count for index in wanted})


def _listen(block: nn.Module, outputs: dict[int, Tensor], index: int) -> Iterator[RemovableHandle]:
    """Put what `block` gives into `outputs[index]` whenever it runs."""

    def put(output: Tensor) -> None:
        outputs[index] = output

    if isinstance(block, DependencyBlock):  # called by halves, the second of which is x + branch
        yield block.norm2.register_forward_pre_hook(lambda _, inputs: put(inputs[0]))
        yield block.drop_path2.register_forward_hook(lambda *seen: put(outputs[index] + seen[-1]))
    else:
        yield block.register_forward_hook(lambda *seen: put(seen[-1]))


def _as_map(
    model: nn.Module, index: int, output: Tensor, x: Tensor, features: Tensor, norm: bool
) -> Tensor:
    """What a block gave, as `(B, C, h, w)`."""
    if output.ndim == 4:
        return output
    if isinstance(model, spformer.SPFormer):
        rows, _ = model.grid(*x.shape[-2:])
        return rearrange(output, "b (h w) d -> b d h w", h=rows)
    rows, _ = model.patch_embed.grid(*x.shape[-2:])
    output = model.norm(output) if norm else output
    if isinstance(model, DependencyViT):
        pruned = sum(layer <= index + 1 for layer in model.prune_layers)
        output = restore(output, features.stages[:pruned])
    return rearrange(output[:, model.num_prefix_tokens :], "b (h w) d -> b d h w", h=rows)


def get_classifier(model: nn.Module) -> nn.Module | tuple[nn.Module, nn.Module]:
    """The classifier `head`; with DeiT's distillation token, both classifiers."""
    return (model.head, model.head_dist) if hasattr(model, "head_dist") else model.head


def group_matcher(model: nn.Module, coarse: bool = False) -> dict:
    """timm's grouping of parameters by depth, for learning rates that decay with it.

    A block is a group; with `coarse` a stage is, in the models that have stages.
    """
    if isinstance(model, ResNet):
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": blocks}
    with_the_last = (99999,)  # timm's word for the group before
    if isinstance(model, spformer.SPFormer):
        inner = [] if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        outer = [(r"^stages\.(\d+)", None), (r"^between\.(\d+)", with_the_last)]
        return {"stem": r"^(?:stem|first)\.", "blocks": [*inner, *outer]}
    blocks = [(r"^blocks\.(\d+)", None), (r"^norm\.", with_the_last)]
    return {"stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed)", "blocks": blocks}


def give_global_pool(model_class: type[nn.Module]) -> None:
    """Give a class of ours timm's `reset_classifier(num_classes, global_pool=None)`.

    `forward_head` then gives the features of every place where `global_pool=""` was asked for.
    """
    reset, head = model_class.reset_classifier, model_class.forward_head
    has_choice = "global_pool" in signature(reset).parameters

    def reset_classifier(model, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; none for 0 classes, and then features come out.

        global_pool: None leaves the pooling as it is; `""`, with 0 classes, leaves it out, so that
            a map or tokens come out; else a pooling that this model has, "avg" or "token" or "map".

        Raises:
            ValueError: another pooling, or classes for features that are not pooled.
        """
        unpooled = model.unpooled if global_pool is None else global_pool == ""
        if unpooled and num_classes:
            raise ValueError(
                f"global_pool='', num_classes={num_classes}: expected 0 classes, or a pooling"
            )
        if has_choice:
            reset(model, num_classes, global_pool or None)
        elif global_pool in (None, "", _pool_name(model)):
            reset(model, num_classes)
        else:
            expected = f"{_pool_name(model)}, or '' with num_classes=0"
            raise ValueError(f"global_pool={global_pool!r}: expected {expected}")
        model.unpooled = unpooled

    @wraps(head)
    def forward_head(model, x, pre_logits: bool = False):
        return _every_place(model, x) if model.unpooled else head(model, x, pre_logits)

    model_class.unpooled = False
    model_class.reset_classifier, model_class.forward_head = reset_classifier, forward_head


def _pool_name(model: nn.Module) -> str:
    """timm's word for the one pooling that a model has; where there is none, its class's name."""
    pool = getattr(model, "pool", getattr(model, "avgpool", None))
    if isinstance(pool, AttentionPool):
        return "map"
    return "avg" if pool is None or isinstance(pool, GlobalAveragePool) else type(pool).__name__


def _every_place(model: nn.Module, features) -> Tensor:
    """What `forward_features` gave, as one tensor: a map `(B, C, h, w)`, or tokens `(B, N, D)`."""
    if isinstance(model, DependencyViT):
        return features.tokens
    return model.fc_norm(features) if isinstance(model, attention.VisionTransformer) else features
