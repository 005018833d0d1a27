"""The battery that every mechanism of attnlab passes (STYLE.md): plain checks, each usable alone.

A check takes a module or a `make_module` function, and batched input tensors (axis 0 is the batch);
keyword `options` go to the module as they are (a mask without a batch axis, say). It raises an
AssertionError that says in words what is wrong. Parameters are randomised first, because a fresh
module hides errors behind zero biases and zero gates, and values are compared in float64.

    def test_battery(device):
        def make():
            return MultiHeadAttention(24, num_heads=3).to(device)

        battery(make, torch.randn(2, 10, 24, device=device), parameters=4 * 24**2 + 4 * 24)
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

import attnlab
from attnlab.lab.bench_case import with_impl

TOLERANCE = 1e-9  # float64: far above rounding, far below any wrong equation


def battery(
    make_module: Callable[[], nn.Module],
    *inputs: Tensor,
    impls: Sequence[str] = ("explicit", "auto", "fused"),
    parameters: int | None = None,
    sizes: Sequence[tuple[tuple[Tensor, ...], tuple[int, ...]]] = (),
    identity_at_init: bool = False,
    rows_axis: int | None = -1,
    grid: tuple[int, ...] | None = None,
    errors: Iterable[tuple[Callable[[], object], str]] = (),
    compiles: bool = True,
    **options,
) -> None:
    """Run every check on fresh modules.

    Args:
        make_module: builds the module; called anew for each check.
        inputs: example inputs with at least two samples.
        impls: the module's forms, which must all agree with the first.
        parameters: exact number of parameters; None is not checked.
        sizes: `((inputs...), output shape)` cases for `check_sizes`.
        identity_at_init: whether a fresh module returns its first input.
        rows_axis: axis along which recorded maps sum to 1; None when the paper's do not.
        grid: token grid, handed to `dense_map`.
        errors: `(callable, fragment of the message)` cases for `check_errors`.
        compiles: whether to compile; False for a module that consists of compiled parts.
    """
    if identity_at_init:
        check_identity_at_init(make_module(), *inputs, **options)
    if parameters is not None:
        check_parameters(make_module(), parameters)
    if sizes:
        check_sizes(make_module(), sizes, **options)
    if rows_axis is not None:
        check_rows_sum_to_one(make_module(), *inputs, axis=rows_axis, **options)
    if compiles:
        check_compiles(make_module(), *inputs, **options)
    check_impls_agree(make_module(), *inputs, impls=impls, **options)
    check_batch_independent(make_module(), *inputs, **options)
    check_input_untouched(make_module(), *inputs, **options)
    check_recording(make_module(), *inputs, grid=grid, **options)
    check_autocast(make_module(), *inputs, **options)
    check_state_dict_round_trip(make_module, *inputs, **options)
    check_errors(errors)


def check_matches(ours: Callable, reference: Callable, *inputs: Tensor, tol=TOLERANCE) -> None:
    """Two callables agree in float64, in value and in the gradient of every floating input.

    Give them the same weights first; a module is converted to float64.
    """
    for call in (ours, reference):
        if isinstance(call, nn.Module):
            call.double()
    expected = _value_and_gradients(lambda *x: reference(*x), inputs)
    got = _value_and_gradients(lambda *x: ours(*x), inputs)
    _assert_same(got, expected, tol, "differs from the reference")


def check_impls_agree(module, *inputs, impls=("explicit", "fused"), tol=TOLERANCE, **options):
    """Every `impl` gives the first one's value and gradients, those of the parameters included."""
    module = randomize(module).eval()
    results = {}
    for impl in impls:
        results[impl] = _value_and_gradients(
            with_impl(copy.deepcopy(module), impl), inputs, **options
        )
    for impl in impls[1:]:
        what = f"impl={impl!r} differs from impl={impls[0]!r}"
        _assert_same(results[impl], results[impls[0]], tol, what)


def check_batch_independent(module, *inputs, tol=TOLERANCE, **options) -> None:
    """In eval mode, what comes out for one sample does not depend on the others in the batch."""
    assert all(len(x) >= 2 for x in inputs), "give inputs of at least two samples"
    module = randomize(module).eval().double()
    inputs = [_double(x) for x in inputs]
    with torch.no_grad():
        together = _tensors(module(*inputs, **options))
        for i in range(len(inputs[0])):
            alone = _tensors(module(*(x[i : i + 1] for x in inputs), **options))
            for a, b in zip(alone, together, strict=True):
                _assert_close(a, b[i : i + 1], tol, f"sample {i} depends on the rest of its batch")


def check_input_untouched(module, *inputs, **options) -> None:
    """Neither forward nor backward writes to an input, in train and in eval mode."""
    module = randomize(module)
    for training in (True, False):
        module.train(training)
        for grad in (False, True):
            # Not leaves: autograd would forbid to write to those, and this looks whether one does.
            given = [_leaf(x).clone() for x in inputs]
            with torch.set_grad_enabled(grad):
                out = module(*given, **options)
            if grad:
                sum(x.sum() for x in _tensors(out) if x.requires_grad).backward()
            for i, (x, original) in enumerate(zip(given, inputs, strict=True)):
                assert torch.equal(x, original), f"input {i} was written to ({training=}, {grad=})"


def check_sizes(module, cases, **options) -> None:
    """`cases` of `((inputs...), output shape)`: shape as expected, and finite, in eval mode.

    The table itself is checked: two sizes or more, one of batch 1, and one that is not square
    where the inputs are images or feature maps.
    """
    shapes = [inputs[0].shape for inputs, _ in cases]
    assert len({shape[1:] for shape in shapes}) >= 2, "give at least two sizes"
    assert any(shape[0] == 1 for shape in shapes), "give a case of batch 1"
    if len(shapes[0]) >= 4:
        assert any(shape[-1] != shape[-2] for shape in shapes), "give a case that is not square"
    module = randomize(module).eval()
    for inputs, expected in cases:
        with torch.no_grad():
            out = _tensors(module(*inputs, **options))[0]
        given = tuple(inputs[0].shape)
        assert out.shape == expected, f"input {given}: got {tuple(out.shape)}, expected {expected}"
        assert out.isfinite().all(), f"input {given}: the output is not finite"


def check_identity_at_init(module, *inputs, **options) -> None:
    """A fresh module, in train and eval mode, returns its first input exactly."""
    for training in (True, False):
        with torch.no_grad():
            out = _tensors(module.train(training)(*inputs, **options))[0]
        _assert_close(out, inputs[0], 0.0, f"not the identity at initialisation ({training=})")


def check_rows_sum_to_one(module, *inputs, axis=-1, tol=TOLERANCE, **options) -> None:
    """Every recorded map is non-negative and sums to 1 along `axis`."""
    module = randomize(module).eval().double()
    with torch.no_grad(), attnlab.record(module) as maps:
        module(*(_double(x) for x in inputs), **options)
    for name, map in maps.items():
        assert (map >= 0).all(), f"map {name!r} has negative weights"
        sums = map.sum(axis)
        _assert_close(sums, torch.ones_like(sums), tol, f"map {name!r} summed along axis {axis}")


def check_recording(module, *inputs, grid=None, tol=TOLERANCE, **options) -> None:
    """`record` changes no output, leaves no trace, and `dense` gives (B, heads, queries, keys)."""
    module = randomize(module).eval().double()
    inputs = [_double(x) for x in inputs]
    before = {name: m.impl for name, m in module.named_modules() if hasattr(m, "impl")}
    with torch.no_grad():
        plain = _tensors(module(*inputs, **options))
        with attnlab.record(module) as maps:
            recorded = _tensors(module(*inputs, **options))
    for a, b in zip(recorded, plain, strict=True):
        _assert_close(a, b, tol, "recording changes the output")
    after = {name: m.impl for name, m in module.named_modules() if hasattr(m, "impl")}
    assert after == before, f"recording leaves impl changed: {before} became {after}"
    assert maps, "nothing was recorded: pass the weights through the probe when impl is explicit"
    for name, map in maps.dense(grid).items():
        shape = tuple(map.shape)
        assert map.ndim == 4, f"dense map {name!r} is {shape}, expected (B, heads, queries, keys)"
        assert shape[0] == len(inputs[0]), f"dense map {name!r} is {shape}: not one a sample"


def check_autocast(module, *inputs, tol=0.1, **options) -> None:
    """Under bf16 autocast, forward and backward are finite and near float32 (relative to its norm).

    `tol` is loose: the check is for overflow and lost terms, not for rounding.
    """
    module = randomize(module).float().eval()
    inputs = [_leaf(x.float() if x.is_floating_point() else x) for x in inputs]
    with torch.no_grad():
        expected = _tensors(module(*inputs, **options))
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        out = _tensors(module(*inputs, **options))
    sum(x.float().square().sum() for x in out if x.requires_grad).backward()
    for a, b in zip(out, expected, strict=True):
        assert a.isfinite().all(), "the output is not finite under bf16 autocast"
        error = ((a.float() - b).norm() / b.norm()).item()
        assert error <= tol, f"bf16 autocast: relative error {error:.2g}, expected at most {tol}"
    named = {f"input {i}": x for i, x in enumerate(inputs)} | dict(module.named_parameters())
    for name, x in named.items():
        finite = x.grad is None or x.grad.isfinite().all()
        assert finite, f"the gradient of {name} is not finite under bf16 autocast"


def check_compiles(
    module, *inputs, backend="aot_eager", fullgraph=True, tol=TOLERANCE, dtype=torch.float64,
    **options,
) -> None:  # fmt: skip
    """`torch.compile` gives the eager value and gradients, in one graph."""
    module = randomize(module).eval()
    torch._dynamo.reset()
    expected = _value_and_gradients(module, inputs, dtype=dtype, **options)
    compiled = torch.compile(copy.deepcopy(module), backend=backend, fullgraph=fullgraph)
    got = _value_and_gradients(compiled, inputs, dtype=dtype, **options)
    got = {name.replace("_orig_mod.", ""): x for name, x in got.items()}
    _assert_same(got, expected, tol, f"compiled by {backend} differs from eager")


def check_state_dict_round_trip(make_module, *inputs, tol=TOLERANCE, **options) -> None:
    """Saved as safetensors and loaded (strict) into another module, it computes the same."""
    module, other = randomize(make_module(), seed=0), randomize(make_module(), seed=1)
    saved = safetensors.torch.save(module.state_dict())
    other.load_state_dict(safetensors.torch.load(saved), strict=True)
    expected = _value_and_gradients(module.eval(), inputs, **options)
    got = _value_and_gradients(other.eval(), inputs, **options)
    _assert_same(got, expected, tol, "after a state_dict round trip, differs from the original")


def check_parameters(module: nn.Module, count: int) -> None:
    """The exact number of parameters; a failure lists what each part has."""
    got = sum(p.numel() for p in module.parameters())
    parts = [(name, sum(p.numel() for p in m.parameters())) for name, m in module.named_children()]
    parts += [(name, p.numel()) for name, p in module.named_parameters(recurse=False)]
    listed = ", ".join(f"{name} {number:,}" for name, number in parts if number)
    assert got == count, f"{got:,} parameters, expected {count:,}: {listed}"


def check_errors(cases: Iterable[tuple[Callable[[], object], str]]) -> None:
    """Each callable raises a ValueError whose message holds its fragment."""
    for call, fragment in cases:
        message = None
        try:
            call()
        except ValueError as error:
            message = str(error)
        assert message is not None, f"no ValueError was raised; expected one with {fragment!r}"
        assert fragment in message, f"the message {message!r} lacks {fragment!r}"


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and running statistics, in place: no zero bias or zero gate hides a bug."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for parameter in module.parameters():
        matrix = parameter.ndim > 1
        parameter.copy_(normal(parameter, parameter[0].numel() ** -0.5 if matrix else 0.5))
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(normal(buffer, 0.5))
        elif name.endswith("running_var"):
            buffer.copy_(normal(buffer, 0.3).exp())
    return module


def _value_and_gradients(call, inputs, dtype=torch.float64, **options) -> dict[str, Tensor]:
    """Outputs, and the gradients of a fixed random projection of them, by name."""
    module = call if isinstance(call, nn.Module) else nn.Module()
    module.to(dtype).zero_grad()
    leaves = [_leaf(x.to(dtype) if x.is_floating_point() else x) for x in inputs]
    result = {f"output {i}": x for i, x in enumerate(_tensors(call(*leaves, **options)))}
    generator = torch.Generator().manual_seed(0)
    loss = 0.0
    for out in result.values():
        if out.requires_grad:
            projection = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            loss = loss + (out * projection.to(out)).sum()
    if isinstance(loss, Tensor):
        loss.backward()
    named = {f"input {i}": x for i, x in enumerate(leaves)} | dict(module.named_parameters())
    for name, x in named.items():
        if x.requires_grad:
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            result[f"the gradient of {name}"] = grad.clone()
    return {name: x.detach() for name, x in result.items()}


def _assert_same(got, expected, tol, what) -> None:
    assert got.keys() == expected.keys(), f"{what}: has {sorted(got)}, expected {sorted(expected)}"
    for name in got:
        _assert_close(got[name], expected[name], tol, f"{what} in {name}")


def _assert_close(got: Tensor, expected: Tensor, tol: float, what: str) -> None:
    shapes = tuple(got.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what}: shape {shapes[0]}, expected {shapes[1]}"
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tol, f"{what}: largest difference {error:.3g}, expected at most {tol:g}"


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _tensors(out) -> list[Tensor]:
    """The tensors of an output: one, or a tuple, list or dict of them."""
    if isinstance(out, Tensor):
        return [out]
    return [x for part in (out.values() if isinstance(out, dict) else out) for x in _tensors(part)]
