"""Recording: what is collected, under which name, and that nothing of it remains."""

import battery
import pytest
import torch
from torch import nn

from attnlab import Probe, record
from attnlab.attention import MultiHeadAttention, attention_rollout, vit_mini


def tiny(**kwargs):
    return vit_mini(img_size=32, depth=2, **kwargs).eval()


def images(batch=2):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def impls(model):
    return [module.impl for module in model.modules() if hasattr(module, "impl")]


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


class Shared(nn.Module):
    """One attention called twice, and two probes with names of their own."""

    def __init__(self):
        super().__init__()
        self.attn = MultiHeadAttention(12, 3)
        self.first, self.second = Probe(), Probe()

    def forward(self, x):
        return self.second(self.first(self.attn(self.attn(x))) + 1)


def test_a_probe_is_an_identity_without_state():
    x = torch.rand(2, 3)
    assert Probe()(x) is x
    assert not Probe().state_dict()


def test_maps_by_the_name_of_the_owner(device):
    model = tiny().to(device)
    with record(model) as maps:
        model(images().to(device))
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    for map in maps.values():
        assert map.shape == (2, 3, 17, 17)
        assert not map.requires_grad
        torch.testing.assert_close(map.sum(-1), torch.ones(2, 3, 17, device=device))


def test_the_names_of_a_bare_module_and_of_other_probes():
    bare = MultiHeadAttention(12, 3)
    with record(bare) as maps:
        bare(torch.rand(1, 4, 12))
    assert list(maps) == [""]

    model = Shared()
    with record(model) as maps:
        out = model(torch.rand(1, 4, 12))
    assert list(maps) == ["attn", "first", "second"]
    torch.testing.assert_close(maps["second"], out)
    torch.testing.assert_close(maps["first"], out - 1)


def test_every_call_is_kept_and_the_last_one_is_the_map():
    model = Shared()
    with record(model) as maps:
        model(torch.rand(1, 4, 12))
        model(torch.rand(3, 5, 12))
    assert [map.shape[0] for map in maps.calls["attn"]] == [1, 1, 3, 3]
    assert maps["attn"] is maps.calls["attn"][-1]


def test_a_probe_that_was_not_reached_has_no_map():
    model = tiny()
    with record(model) as maps:
        model.blocks[0](torch.rand(1, 17, 96))
    assert list(maps) == ["blocks.0.attn"]


def test_recording_leaves_no_trace():
    model = tiny(impl="fused")
    expected = model(images())
    with record(model) as maps:
        assert set(impls(model)) == {"explicit"}
        recorded = model(images())
    assert set(impls(model)) == {"fused"}
    assert hooks(model) == 0
    model(images(batch=3))
    assert maps["blocks.0.attn"].shape[0] == 2, "recorded after the end"
    torch.testing.assert_close(recorded, expected)


def test_an_exception_restores_everything():
    model = tiny()
    with pytest.raises(RuntimeError, match="inside"), record(model):
        raise RuntimeError("inside")
    assert set(impls(model)) == {"auto"}
    assert hooks(model) == 0
    compiled = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    assert compiled(torch.zeros(1)) == 1, "still eager after the error"


def test_nested_records_each_collect_and_the_inner_leaves_the_outer_recording():
    model = tiny()
    with record(model) as outer:
        with record(model.blocks[1]) as inner:
            model(images())
        assert set(impls(model)) == {"explicit"}
        model(images())
    assert list(inner) == ["attn"]
    assert len(inner.calls["attn"]) == 1
    assert [len(calls) for calls in outer.calls.values()] == [2, 2]
    assert set(impls(model)) == {"auto"}


def test_maps_can_stay_in_the_graph():
    model = tiny()
    with record(model, detach=False) as maps:
        model(images())
    maps["blocks.1.attn"].square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_compiled_models_are_recorded_eagerly_and_stay_compiled(how):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    called = model = tiny()
    if how == "wrapped":
        called = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    expected = called(images())
    compiled = len(graphs)
    assert compiled
    with record(called) as maps:
        recorded = called(images())
    again = called(images())
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert len(graphs) == compiled, "recording compiled anew, or made the compiled code stale"
    torch.testing.assert_close(recorded, expected)
    torch.testing.assert_close(again, expected)


def test_a_model_first_called_while_recording_compiles_afterwards():
    torch._dynamo.reset()
    model = torch.compile(tiny(), backend="aot_eager", fullgraph=True)
    with record(model) as maps:
        recorded = model(images())
    assert len(maps) == 2
    torch.testing.assert_close(model(images()), recorded)


def test_under_autocast_the_maps_are_float32_and_rows_sum_to_one(device):
    model = battery.randomize(tiny()).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16), record(model) as maps:
        model(images().to(device))
    for map in maps.values():
        assert map.dtype == torch.float32
        torch.testing.assert_close(map.sum(-1), torch.ones(2, 3, 17, device=device))


def test_dense_maps_come_from_the_owner():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_probe = Probe()

        def forward(self, x):
            return self.attn_probe(x)

        def dense_map(self, map, shape):
            return map.new_zeros(len(map), 1, *shape)

    model = nn.Sequential(Owner())
    with record(model) as maps:
        model(torch.rand(2, 9))
    assert maps["0"].shape == (2, 9)
    assert maps.dense((4, 5))["0"].shape == (2, 1, 4, 5)


def test_rollout_multiplies_later_layers_on_the_left():
    first, second = (
        torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(i)).softmax(-1)
        for i in range(2)
    )
    eye = torch.eye(5)
    layers = [(map.mean(1) + eye) / 2 for map in (first, second)]
    rollout = attention_rollout([first, second])
    torch.testing.assert_close(rollout, layers[1] @ layers[0])
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(attention_rollout({"a": first, "b": second}), rollout)


def test_rollout_of_identity_and_of_uniform_attention():
    eye = torch.eye(5).expand(2, 3, 5, 5)
    uniform = torch.full((2, 3, 5, 5), 1 / 5)
    torch.testing.assert_close(attention_rollout([eye] * 4), eye[:, 0])
    expected = eye[:, 0] / 2**4 + (1 - 1 / 2**4) * uniform[:, 0]
    torch.testing.assert_close(attention_rollout([uniform] * 4), expected)


def test_rollout_of_a_recorded_model():
    model = tiny(distilled=True)
    with record(model) as maps:
        model(images())
    rollout = attention_rollout(maps)
    assert rollout.shape == (2, 18, 18)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 18))


def test_bad_input():
    class NoDense(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_probe = Probe()

        def forward(self, x):
            return self.attn_probe(x)

    def dense():
        model = NoDense()
        with record(model) as maps:
            model(torch.rand(2, 3))
        maps.dense()

    map = torch.rand(2, 3, 5, 5)
    battery.check_errors([
        (lambda: record("vit").__enter__(), "model='vit': expected an nn.Module"),
        (lambda: record(nn.Linear(2, 2)).__enter__(), "model=Linear: expected a module that holds"),
        (dense, "maps['']: its owner NoDense has no dense_map(map, shape)"),
        (lambda: attention_rollout([]), "maps is empty"),
        (lambda: attention_rollout([map, map[:, :, 1:]]), "maps[1] (2, 3, 4, 5): expected (2, h"),
        (lambda: attention_rollout([map[:, 0]]), "maps[0] (2, 5, 5): expected (2, heads, 5, 5)"),
    ])  # fmt: skip
