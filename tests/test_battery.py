"""The battery accepts a right mechanism, and each check rejects the mistake it is there for."""

import battery
import pytest
import torch
from torch import nn

from attnlab import Probe
from attnlab.attention import attention_weights, scaled_dot_product_attention


class Right(nn.Module):
    """A small self-attention on (B, N, 6) with a gated residual; the mistakes below change it."""

    def __init__(self, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.qkv = nn.Linear(6, 18)
        self.gate = nn.Parameter(torch.zeros(()))
        self.attn_probe = Probe()

    def weights(self, q, k):
        return attention_weights(q, k)

    def forward(self, x):
        if x.ndim != 3:
            raise ValueError(f"x {tuple(x.shape)}: expected (B, N, 6)")
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        if self.impl == "explicit":
            out = self.attn_probe(self.weights(q, k)).to(v.dtype) @ v
        else:
            out = scaled_dot_product_attention(q, k, v, impl=self.impl)
        return x + self.gate * out[:, 0]

    def dense_map(self, map, shape=None):
        return map


class SoftmaxOverBatch(Right):
    def weights(self, q, k):
        return (q @ k.transpose(-2, -1)).softmax(0)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return x + self.gate * (self.attn_probe(self.weights(q, k)) @ v)[:, 0]


class SoftmaxOverQueries(Right):
    def weights(self, q, k):
        return attention_weights(k, q).transpose(-2, -1)


class NegativeWeights(Right):
    def weights(self, q, k):
        return 2 * attention_weights(q, k) - 1 / k.shape[-2]


class WritesToInput(Right):
    def forward(self, x):
        out = super().forward(x)
        x.data.mul_(2)
        return out


class WrongGradient(Right):
    def forward(self, x):
        return super().forward(x.detach() if self.impl == "fused" else x)


class ForgetsScale(Right):
    def weights(self, q, k):
        return attention_weights(q, k, scale=1.0)


class ForgetsGate(Right):
    def forward(self, x):
        return x + super().forward(x)


class OneSizeOnly(Right):
    def forward(self, x):
        return super().forward(x)[:, :4]


class NoBatchOfOne(Right):
    def forward(self, x):
        return super().forward(x) / (len(x) - 1)


class OverflowsInHalf(Right):
    def forward(self, x):
        half = torch.is_autocast_enabled(x.device.type)
        return super().forward(x) + (float("inf") if half else 0.0)


class OverflowsBackward(Right):
    def forward(self, x):
        out = super().forward(x)
        return out + (0 * self.gate).sqrt()


class BreaksTheGraph(Right):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class HidesState(Right):
    def __init__(self):
        super().__init__()
        self.hidden = [torch.rand(6)]

    def forward(self, x):
        return super().forward(x) + self.hidden[0]


class RecordsNothing(Right):
    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return x + self.gate * (self.weights(q, k) @ v)[:, 0]


class SparseMap(Right):
    def dense_map(self, map, shape=None):
        return map[:, 0]


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
SIZES = [((X,), (3, 5, 6)), ((X[:1, :4],), (1, 4, 6))]


def test_a_right_mechanism_passes_every_check():
    errors = [(lambda: Right()(X[0]), "x (5, 6): expected (B, N, 6)")]
    battery.battery(
        Right, X, parameters=127, sizes=SIZES, identity_at_init=True, errors=errors
    )  # fmt: skip


REJECTED = [
    (battery.check_batch_independent, SoftmaxOverBatch, "depends on the rest of its batch"),
    (battery.check_rows_sum_to_one, SoftmaxOverBatch, "summed along axis -1"),
    (battery.check_rows_sum_to_one, SoftmaxOverQueries, "summed along axis -1"),
    (battery.check_rows_sum_to_one, NegativeWeights, "negative weights"),
    (battery.check_input_untouched, WritesToInput, "input 0 was written to"),
    (battery.check_impls_agree, WrongGradient, "in the gradient of input 0"),
    (battery.check_impls_agree, ForgetsScale, "impl='fused' differs from impl='explicit'"),
    (battery.check_recording, ForgetsScale, "recording changes the output"),
    (battery.check_recording, RecordsNothing, "nothing was recorded"),
    (battery.check_recording, SparseMap, "expected (B, heads, queries, keys)"),
    (battery.check_identity_at_init, ForgetsGate, "not the identity at initialisation"),
    (battery.check_autocast, OverflowsInHalf, "the output is not finite under bf16"),
    (battery.check_autocast, OverflowsBackward, "the gradient of gate is not finite"),
]


@pytest.mark.parametrize(("check", "wrong", "reason"), REJECTED)
def test_a_check_rejects_the_mistake_it_is_there_for(check, wrong, reason):
    with pytest.raises(AssertionError) as failure:
        check(wrong(), X)
    assert reason in str(failure.value)


def test_sizes_are_checked():
    with pytest.raises(AssertionError, match=r"got \(3, 4, 6\), expected \(3, 5, 6\)"):
        battery.check_sizes(OneSizeOnly(), SIZES)
    with pytest.raises(AssertionError, match="not finite"):
        battery.check_sizes(NoBatchOfOne(), SIZES)


def test_a_table_of_sizes_that_would_show_nothing_is_rejected():
    image = torch.zeros(1, 6, 4, 4)
    square = [((image,), (1, 6, 4, 4)), ((image[..., :2, :2],), (1, 6, 2, 2))]
    for table, reason in (
        (SIZES[:1], "two sizes"),
        ([((X,), X.shape), ((X[:, :4],), (3, 4, 6))], "batch 1"),
        (square, "not square"),
    ):
        with pytest.raises(AssertionError, match=reason):
            battery.check_sizes(nn.Identity(), table)


def test_a_wrong_reference_is_rejected_in_value_and_in_gradient():
    battery.check_matches(torch.exp, torch.exp, X)
    with pytest.raises(AssertionError, match="in output 0"):
        battery.check_matches(torch.exp, torch.expm1, X)
    with pytest.raises(AssertionError, match="in the gradient of input 0"):
        battery.check_matches(torch.exp, lambda x: x.detach().exp() + 0 * x, X)


def test_a_graph_break_is_rejected():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        battery.check_compiles(BreaksTheGraph(), X)


def test_state_outside_the_state_dict_is_rejected():
    with pytest.raises(AssertionError, match="after a state_dict round trip"):
        battery.check_state_dict_round_trip(HidesState, X)


def test_a_wrong_number_of_parameters_lists_the_parts():
    with pytest.raises(AssertionError, match="127 parameters, expected 126: qkv 126, gate 1"):
        battery.check_parameters(Right(), 126)


def test_a_missing_or_vague_error_is_rejected():
    def vague():
        raise ValueError("bad shape")

    with pytest.raises(AssertionError, match="no ValueError was raised"):
        battery.check_errors([(lambda: None, "x")])
    with pytest.raises(AssertionError, match="lacks 'expected'"):
        battery.check_errors([(vague, "expected")])


def test_an_error_of_another_kind_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        battery.check_errors([(lambda: 1 / 0, "expected")])
