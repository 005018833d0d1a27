"""The state_dict layouts of the official codes of DANet and OCNet, and how they become ours.

A table maps the beginnings of their names to ours; the first that fits is taken. Names below a
module's own are the business of that module's table: hooks run from the outermost module inwards.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

PAM = {"query_conv.": "query.", "key_conv.": "key.", "value_conv.": "value."}

DANET = {  # `DANetHead` of junfu1115/DANet, 2020
    "conv5a.": "reduce_position.",
    "conv5c.": "reduce_channel.",
    "sa.": "position.",
    "sc.": "channel.",
    "conv51.": "refine_position.",
    "conv52.": "refine_channel.",
    "conv6.1.": "classify_position.",
    "conv7.1.": "classify_channel.",
    "conv8.1.": "classify.",
}

# The heads of openseg-group/OCNet.pytorch ("v1"); openseg.pytorch nests BatchNorm and ReLU once
# more, so that its `conv_bn_dropout.1.0.weight` is v1's `conv_bn_dropout.1.weight`.
FUSION = {"conv_bn_dropout.1.0.": "fuse.1.", "conv_bn_dropout.": "fuse."}
OCNET_BASE = {"stages.0.": "context.", **FUSION}
OCNET_PYRAMID = {"stages.": "contexts.", "up_dr.": "lift.", **FUSION}
OCNET_ASP = {
    "context.0.": "reduce.0.",
    "context.1.": "reduce.1.",
    "context.2.stages.0.": "context.",
    "context.2.conv_bn_dropout.": "refine.",
    **{f"conv{i + 2}.": f"convs.{i}." for i in range(4)},
    **FUSION,
}
OBJECT_CONTEXT = {"f_key.": "key.", "f_query.": "query.", "f_value.": "value.", "W.": "proj."}
OPENSEG_EMBEDDING = {"0.": "0.", "1.0.": "1.", "2.": "3.", "3.0.": "4."}
OPENSEG_OBJECT_CONTEXT = {
    **{f"f_key.{old}": f"key.{new}" for old, new in OPENSEG_EMBEDDING.items()},
    **{f"f_query.{old}": f"query.{new}" for old, new in OPENSEG_EMBEDDING.items()},
    **OBJECT_CONTEXT,
}

DANET_NETWORK = {"pretrained.": "backbone."}
OCNET_NETWORK = {  # the whole network of v1, whose stem is "deep" in `attnlab.resnet`
    "conv1.": "backbone.conv1.0.",
    "bn1.": "backbone.conv1.1.",
    "conv2.": "backbone.conv1.3.",
    "bn2.": "backbone.conv1.4.",
    "conv3.": "backbone.conv1.6.",
    "bn3.": "backbone.bn1.",
    **{f"layer{i}.": f"backbone.layer{i}." for i in range(1, 5)},
    "layer5.": "head.reduce.",  # of the pyramid, whose context is not in a Sequential
    "context.0.": "head.reduce.0.",
    "context.1.": "head.reduce.1.",
    "context.2.": "head.context.",
    "context.": "head.context.",
    "cls.": "head.classify.",
    "dsn.0.": "aux_head.reduce.0.",
    "dsn.1.": "aux_head.reduce.1.",
    "dsn.3.": "aux_head.classify.",
}

StateDict = dict[str, Tensor]


def renaming(table: Mapping[str, str]) -> Callable:
    """A load_state_dict pre-hook that renames a module's entries by `table`, in place."""
    return partial(_rename, table)


def _rename(table: Mapping[str, str], module: nn.Module, state: StateDict, prefix: str, *_) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        for old, new in table.items():
            if name.startswith(old):
                state[prefix + new + name.removeprefix(old)] = state.pop(key)
                break


def untie_qk(module: nn.Module, state: StateDict, prefix: str, *_) -> None:
    """Pre-hook of `ObjectContext`. v1 saves the one embedding of queries and keys under two names.

    Raises:
        ValueError: the two differ, where the module has one embedding for both.
    """
    openseg = f"{prefix}f_key.1.0.weight" in state
    _rename(OPENSEG_OBJECT_CONTEXT if openseg else OBJECT_CONTEXT, module, state, prefix)
    if module.query is not None:
        return
    for query in [key for key in state if key.startswith(f"{prefix}query.")]:
        key = f"{prefix}key.{query.removeprefix(f'{prefix}query.')}"
        if key not in state or not torch.equal(state[query], state[key]):
            raise ValueError(f"{query}: expected the same values as {key}, for share_qk=True")
        del state[query]


def convert_network(module: nn.Module, state: StateDict, prefix: str, *_) -> None:
    """Pre-hook of `Segmenter`: the whole networks of DANet and of OCNet v1."""
    if any(key.startswith(f"{prefix}pretrained.") for key in state):
        _rename(DANET_NETWORK, module, state, prefix)
    elif f"{prefix}cls.weight" in state:
        _rename(OCNET_NETWORK, module, state, prefix)
