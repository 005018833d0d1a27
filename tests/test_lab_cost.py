"""`attnlab.lab.cost` against numbers that are known beforehand."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnlab.lab import cost

MIB = 2**20


def test_parameters_count_shared_ones_once():
    layer = nn.Linear(10, 10)
    assert cost.parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 110
    layer.requires_grad_(False)
    assert cost.parameters(layer) == 110
    with pytest.raises(ValueError, match=r"module=3: expected an nn.Module"):
        cost.parameters(3)


def test_flops_are_twice_the_multiply_accumulates(device):
    linear = nn.Linear(30, 50, device=device)
    x = torch.randn(7, 30, device=device)
    assert cost.macs(linear, x) == 7 * 30 * 50
    assert cost.flops(linear, x) == 2 * 7 * 30 * 50
    conv = nn.Conv2d(4, 6, 3, padding=1, device=device)
    assert cost.macs(conv, torch.randn(2, 4, 5, 8, device=device)) == 2 * 5 * 8 * 6 * 4 * 9


def test_flops_see_the_fused_attention(device):
    q = torch.randn(2, 3, 64, 16, device=device)

    def explicit(q):
        return (q @ q.mT).softmax(-1) @ q

    def fused(q):
        return F.scaled_dot_product_attention(q, q, q)

    expected = 2 * 2 * 3 * 64 * 64 * 16  # q·k and weights·v
    assert cost.macs(explicit, q) == cost.macs(fused, q) == expected
    assert cost.macs(fused, q.requires_grad_()) == expected


def test_counting_leaves_the_module_as_it_was(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(device)
    model[1].eval()
    model.train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost.measure(model, torch.randn(2, 3, 8, 8, device=device), repeats=1)
    assert [module.training for module in model.modules()] == [True, False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_peak_memory_of_plain_tensors(device):
    def one():
        return torch.empty(MIB, dtype=torch.uint8, device=device)

    def in_turn():
        for _ in range(5):
            one()

    def together():
        return [one() for _ in range(5)]

    assert cost.peak_memory(one, device) == MIB
    assert cost.peak_memory(in_turn, device) == MIB
    assert cost.peak_memory(together, device) == 5 * MIB
    assert cost.peak_memory(lambda: None, device) == 0


def test_peak_memory_of_explicit_and_fused_attention(device):
    heads, tokens, dim = 4, 512, 32
    q = torch.randn(1, heads, tokens, dim, device=device)
    matrix, output = heads * tokens**2 * 4, heads * tokens * dim * 4

    def explicit():
        return (q @ q.mT).softmax(-1) @ q  # scores and weights live side by side

    def fused():
        return F.scaled_dot_product_attention(q, q, q)

    assert 2 * matrix <= cost.peak_memory(explicit, device) <= 2 * matrix + output
    assert output <= cost.peak_memory(fused, device) <= matrix / 2


def test_peak_memory_does_not_count_what_was_there(device):
    weight = torch.zeros(MIB, device=device, requires_grad=True)

    def step():
        (weight * 2).sum().backward()

    # The gradient exists after the first call, and a second one of 4 MiB is added to it.
    assert cost.peak_memory(step, device) == pytest.approx(4 * MIB, rel=0.01)
    held = [torch.empty(MIB, dtype=torch.uint8, device=device)]
    assert cost.peak_memory(held.clear, device) == 0


def test_the_profiler_says_nothing():
    """In a process of its own, for what counts is the profiler's first use."""
    code = "import torch; from attnlab.lab import cost; cost.peak_memory(lambda: torch.empty(10))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_latency_is_the_median_after_the_warm_up():
    calls = []

    def slow_at_first():
        calls.append(1)
        time.sleep(0.2 if len(calls) in (1, 2, 5) else 0.01)

    assert 0.01 <= cost.latency(slow_at_first, warmup=2, repeats=5) < 0.1
    assert len(calls) == 7
    with pytest.raises(ValueError, match="repeats=0: expected an integer ≥ 1"):
        cost.latency(slow_at_first, repeats=0)
    with pytest.raises(ValueError, match="warmup=-1"):
        cost.latency(slow_at_first, warmup=-1)


def test_measure_gives_all_of_it(device):
    x = torch.randn(64, 100, device=device)
    found = cost.measure(nn.Linear(100, 200, device=device), x, repeats=2)
    assert found["parameters"] == 20_200
    assert found["flops"] == 2 * found["macs"] == 2 * 64 * 100 * 200
    assert found["memory"] == pytest.approx(64 * 200 * 4, abs=512)
    assert 0 < found["latency"] < 10
    with pytest.raises(ValueError, match=r"inputs=\[\]: expected tensors on one device"):
        cost.measure(nn.Linear(1, 1))


def test_growth_is_the_exponent():
    sizes = [16, 64, 256]
    assert cost.growth(sizes, [3 * n**2 for n in sizes]) == pytest.approx(2)
    assert cost.growth(sizes, [7.0] * 3) == pytest.approx(0)
    for wrong in (([1], [1]), ([1, 2], [1]), ([1, 1], [1, 2])):
        with pytest.raises(ValueError, match=r"sizes, values=.*two sequences of one length"):
            cost.growth(*wrong)
    with pytest.raises(ValueError, match="numbers > 0"):
        cost.growth([1, 2], [0, 1])


def test_machine_names_what_computes(device):
    name = cost.machine(device)
    assert name == name.strip()
    assert ("threads" in name) == (device.type == "cpu")


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device='meta': expected cpu or cuda"):
        cost.peak_memory(lambda: None, "meta")
