"""How attention maps are recorded, and rolled out through the layers.

A mechanism passes its weights through `self.attn_probe = Probe()`, which does nothing.
`with record(model) as maps:` listens to every probe while it is open, and nothing is stored
outside it. A listener is a forward hook, so recording nests, and a probe costs one call.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn


class Probe(nn.Module):
    """An identity that `record` can find: `x` → the same `x`, of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Maps(dict[str, Tensor]):
    """The last tensor seen by each probe, by the dotted name of the module that owns the probe.

    `calls[name]` lists the tensors of every call, oldest first (a module with shared weights is
    called several times in one forward).
    """

    def __init__(self):
        super().__init__()
        self.calls: dict[str, list[Tensor]] = {}
        self._owners: dict[str, nn.Module] = {}

    def dense(self, shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Every last map as `(B, heads, queries, keys)`, through its owner's `dense_map`.

        Args:
            shape: size of the token grid, `(H, W)` or `(T, H, W)`, for the mechanisms whose native
                layout needs it (windows, criss-cross, superpixels).

        Raises:
            ValueError: a probe's owner has no `dense_map(map, shape)`.
        """
        for name in self:
            if not hasattr(self._owners[name], "dense_map"):
                raise ValueError(
                    f"maps[{name!r}]: its owner {type(self._owners[name]).__name__} has no "
                    "dense_map(map, shape), which turns a map into (B, heads, queries, keys)"
                )
        return {name: self._owners[name].dense_map(map, shape) for name, map in self.items()}


@contextmanager
def record(model: nn.Module, *, detach: bool = True) -> Iterator[Maps]:
    """Collect what the probes of `model` see while the context is open.

    Inside, every module that owns a probe has `impl = "explicit"` (the only path on which attention
    weights exist), and compiled models run eagerly. Both end with the context, also on an error.

    Args:
        model: any module that holds probes; a `torch.compile`d one may be given and called.
        detach: False keeps the maps in the autograd graph.

    Yields:
        `Maps`, filled as the model is called: `maps["blocks.0.attn"]` is `(B, heads, N, N)` for a
        Vision Transformer. The name is `""` when the owner is `model` itself; a probe that is not
        called `attn_probe` keeps its own full name.

    Raises:
        ValueError: `model` is not a module, or holds no probe.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: expected an nn.Module")
    modules = dict(model.named_modules())
    probes = {path: module for path, module in modules.items() if isinstance(module, Probe)}
    if not probes:
        raise ValueError(f"model={type(model).__name__}: expected a module that holds a Probe")

    maps = Maps()
    explicit: dict[nn.Module, str] = {}
    with ExitStack() as stack:
        for path, probe in probes.items():
            owner = modules[path.rpartition(".")[0]]
            if hasattr(owner, "impl"):
                explicit.setdefault(owner, owner.impl)
            name = _name(path)
            maps._owners[name] = owner
            handle = probe.register_forward_hook(_listener(maps, name, detach))
            stack.callback(handle.remove)
        stack.enter_context(_eager())
        try:
            for owner in explicit:
                owner.impl = "explicit"
            yield maps
        finally:
            for owner, impl in explicit.items():
                owner.impl = impl


def attention_rollout(maps: Maps | dict[str, Tensor] | list[Tensor]) -> Tensor:
    """How much each output token holds of each input token, through all layers (Abnar & Zuidema).

    Per layer, Â = ½ (mean over heads of A + I), half for the residual path; the result is
    Â_L ⋯ Â_2 Â_1. Its rows sum to 1.

    Args:
        maps: first layer first: what `record` yielded, or a dict or list of `(B, heads, N, N)`.

    Returns:
        `(B, N, N)`. For a class token, `rollout[:, 0, prefix:]` is a map over the patches.

    Raises:
        ValueError: no map, or one that is not `(B, heads, N, N)` like the first.
    """
    maps = maps.dense() if isinstance(maps, Maps) else maps
    layers = list(maps.values()) if isinstance(maps, dict) else list(maps)
    if not layers:
        raise ValueError("maps is empty: expected one (B, heads, N, N) map a layer")
    batch, tokens = len(layers[0]), layers[0].shape[-1]
    rollout = torch.eye(tokens, device=layers[0].device, dtype=layers[0].dtype)
    for index, weights in enumerate(layers):
        shape = tuple(weights.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (batch, tokens, tokens):
            expected = f"({batch}, heads, {tokens}, {tokens})"
            raise ValueError(f"maps[{index}] {shape}: expected {expected}, (B, heads, N, N)")
        rollout = (weights.mean(1) @ rollout + rollout) / 2
    return rollout


def _name(path: str) -> str:
    """The key of a probe: its owner's path, without the wrappers of `torch.compile`."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    return ".".join(parts[:-1] if parts[-1] == "attn_probe" else parts)


def _listener(maps: Maps, name: str, detach: bool):
    def listen(probe: Probe, inputs: tuple[Tensor], output: Tensor) -> None:
        maps[name] = output.detach() if detach else output
        maps.calls.setdefault(name, []).append(maps[name])

    return listen


def _eager():
    """Compiled code runs uncompiled. Nothing can be compiled before torch._dynamo is imported."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
