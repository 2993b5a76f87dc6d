"""SwiGLU that also writes some channels: the raw operators in every dtype, and `swiglu_s2ft` as autograd sees it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import compiled_places, places, places_and_dtypes
from ..support.s2ft import random_channels

OPERATORS = ("swiglu", "swiglu_backward")
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*OPERATORS))
# torch's own silu ends a row in other operations than it began it with.
EACH_OWN_PLACE = pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(*OPERATORS) if case.values[0].backend != "reference"]
)
EACH_DOUBLE_PLACE = pytest.mark.parametrize("place", places(*OPERATORS, dtypes=(torch.float64,)))
# (M, K, s): nothing, one, around vectors, all channels, and large enough for several threads.
SIZES = ((0, 5, 2), (3, 0, 0), (4, 7, 0), (1, 1, 1), (5, 31, 31), (9, 16, 3), (6, 100, 11), (130, 1501, 45))


def plain(gate, up, indices):
    h = silu(gate) * up
    return h, h[..., indices]


def plain_backward(grad_h, gate, up):
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    return torch.autograd.grad(silu(leaves[0]) * leaves[1], leaves, grad_h)


def activations(*shape, dtype, device="cpu", count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(scale * n).to(dtype).to(device) for scale, n in zip((4, 1, 1), numbers, strict=False)]


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(place, dtype, size):
    m, k, s = size
    gate, up = activations(m, k, dtype=dtype, device=place.device)
    indices = random_channels(k, s).to(place.device)
    h, x_slice = place.kernel("swiglu", dtype)(gate, up, indices)
    assert h.dtype == dtype and h.is_contiguous() and x_slice.is_contiguous()
    assert_accurate(h, plain(gate, up, indices)[0], plain(gate.double(), up.double(), indices)[0], "h")
    assert_same_bits(x_slice, h[:, indices], "slice")


@EACH_PLACE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward(place, dtype, size):
    gate, up, grad_h = activations(*size[:2], dtype=dtype, device=place.device, count=3)
    actual = place.kernel("swiglu_backward", dtype)(grad_h, gate, up)
    own = plain_backward(grad_h, gate, up)
    exact = plain_backward(grad_h.double(), gate.double(), up.double())
    for name, *tensors in zip(("gate", "up"), actual, own, exact, strict=True):
        assert tensors[0].dtype == dtype and tensors[0].is_contiguous()
        assert_accurate(*tensors, f"gradient of {name}")


@EACH_OWN_PLACE
def test_every_size_of_gate(place, dtype):
    # Across exp's whole range, a few numbers to each binade, to a few units in the last place of each.
    magnitudes = torch.logspace(-8, 3, 4001, dtype=torch.float64)
    magnitudes = magnitudes[magnitudes < (80 if dtype != torch.float64 else 700)]
    gate = torch.cat([-magnitudes, magnitudes]).to(dtype)[None].to(place.device)
    up, none = torch.ones_like(gate), torch.empty(0, dtype=torch.int64, device=place.device)
    h, _ = place.kernel("swiglu", dtype)(gate, up, none)
    dgate, dup = place.kernel("swiglu_backward", dtype)(up, gate, up)
    wide = gate.double()
    sigmoid = wide.sigmoid()
    limits, units = torch.finfo(dtype), 4 if dtype in (torch.float32, torch.float64) else 0.51
    for actual, exact in ((h, wide * sigmoid), (dup, wide * sigmoid)):
        allowed = units * limits.eps * exact.abs() + limits.smallest_normal
        assert bool(((actual.double() - exact).abs() <= allowed).all())
    # 1 - sigmoid loses what sigmoid was rounded by.
    exact = sigmoid * (1 + wide * (1 - sigmoid))
    allowed = max(units, 1) * limits.eps * (exact.abs() + sigmoid * (1 + wide.abs())) + limits.smallest_normal
    assert bool(((dgate.double() - exact).abs() <= allowed).all())


@EACH_PLACE
def test_what_is_not_finite_stays_visible(place, dtype):
    special = [float("nan"), float("inf"), -float("inf"), 300.0, -300.0, 0.0, -0.0]
    gate = torch.tensor([special], dtype=dtype, device=place.device).repeat(2, 5)
    up, none = torch.ones_like(gate), torch.empty(0, dtype=torch.int64, device=place.device)
    h, _ = place.kernel("swiglu", dtype)(gate, up, none)
    exact = silu(gate.double())
    assert torch.equal(h.isnan(), exact.isnan())
    assert torch.equal(h.isinf(), exact.isinf())
    assert torch.equal(h[:, 3:].nan_to_num().sign(), exact.to(dtype)[:, 3:].nan_to_num().sign())


@EACH_OWN_PLACE
@pytest.mark.parametrize("layout", [*LAYOUTS, "halves", "expanded"])
def test_same_bits_in_every_layout(place, dtype, layout):
    tensors = activations(9, 70, dtype=dtype, device=place.device, count=3)
    gate, up, grad_h = tensors
    if layout == "halves":  # one product with a joint weight, cut in two
        gate_view, up_view = torch.cat([gate, up], 1).chunk(2, 1)
        grad_view = grad_h
    elif layout == "expanded":
        gate, up, grad_h = (tensor[:1].repeat(9, 1) for tensor in tensors)
        gate_view, up_view, grad_view = (tensor[:1].expand(9, 70) for tensor in tensors)
    else:
        gate_view, up_view, grad_view = (laid_out(tensor, layout) for tensor in tensors)
    indices = random_channels(70, 9).to(place.device)
    forward, backward = (place.kernel(name, dtype) for name in OPERATORS)
    for left, right in zip(forward(gate_view, up_view, indices), forward(gate, up, indices), strict=True):
        assert_same_bits(left, right)
    for left, right in zip(backward(grad_view, gate_view, up_view), backward(grad_h, gate, up), strict=True):
        assert_same_bits(left, right)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_OWN_PLACE
def test_same_bits_for_any_number_of_threads(place, dtype, restored_threads):
    gate, up, grad_h = activations(50, 3001, dtype=dtype, device=place.device, count=3)
    indices = random_channels(3001, 70).to(place.device)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        forward = place.kernel("swiglu", dtype)(gate, up, indices)
        runs.append([*forward, *place.kernel("swiglu_backward", dtype)(grad_h, gate, up)])
    for run in runs[1:]:
        for left, right in zip(run, runs[0], strict=True):
            assert_same_bits(left, right)


# What is changed about a good call (float32 [6, 5], 2 channels), and the message.
BAD_CALLS = [
    ("swiglu", {"gate": lambda t: t[0]}, r"gate must be 2-D, got float32 \[5\]"),
    ("swiglu", {"gate": torch.Tensor.int}, r"gate must be float32, .*, got int32 \[6, 5\]"),
    ("swiglu", {"up": lambda t: t[:5]}, r"up must be \[6, 5\], got float32 \[5, 5\]"),
    ("swiglu", {"up": torch.Tensor.bfloat16}, r"up must have .*, float32, got bfloat16 \[6, 5\]"),
    ("swiglu", {"indices": torch.Tensor.int}, r"indices must be int64, got int32 \[2\]"),
    ("swiglu", {"indices": lambda t: t[None]}, r"indices must be 1-D, got int64 \[1, 2\]"),
    ("swiglu_backward", {"grad_h": lambda t: t[:, 1:]}, r"grad_h must be \[6, 5\], got float32 \[6, 4\]"),
    ("swiglu_backward", {"grad_h": torch.Tensor.half}, r"grad_h must have .*, float32, got float16 \[6, 5\]"),
    ("swiglu_backward", {"up": lambda t: t[0]}, r"up must be 2-D, got float32 \[5\]"),
]


@pytest.mark.parametrize(("namespace", "device"), compiled_places(*OPERATORS))
@pytest.mark.parametrize(("operator", "changes", "message"), BAD_CALLS)
def test_bad_arguments_are_refused(namespace, device, operator, changes, message):
    gate, up, grad_h = activations(6, 5, dtype=torch.float32, device=device, count=3)
    if operator == "swiglu":
        arguments = {"gate": gate, "up": up, "indices": torch.tensor([1, 3], device=device)}
    else:
        arguments = {"grad_h": grad_h, "gate": gate, "up": up}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=rf"{operator}: {message}"):
        getattr(getattr(torch.ops, namespace), operator)(*arguments.values())


def leaves(*shape, dtype=torch.float64, device="cpu"):
    return [t.requires_grad_() for t in activations(*shape, dtype=dtype, device=device)]


@EACH_PLACE
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_function_of_any_number_of_leading_dimensions(place, dtype, leading):
    gate, up = leaves(*leading, 24, dtype=dtype, device=place.device)
    indices = random_channels(24, 5).to(place.device)
    with peft_kernels.use_backend(place.backend):
        h, x_slice = ops.swiglu_s2ft(gate, up, indices)
        found = torch.autograd.grad(h, [gate, up], torch.ones_like(h))
    assert h.shape == (*leading, 24) and x_slice.shape == (*leading, 5)
    own = [h.detach(), *plain_backward(torch.ones_like(h), gate, up)]
    wide = [tensor.detach().double() for tensor in (gate, up)]
    exact = [plain(*wide, indices)[0], *plain_backward(torch.ones_like(wide[0]), *wide)]
    for name, *tensors in zip(("h", "gate", "up"), (h.detach(), *found), own, exact, strict=True):
        assert_accurate(*tensors, name)
    h.detach().add_(1)  # a tensor of its own, that may be changed


@EACH_DOUBLE_PLACE
@pytest.mark.parametrize("used", ["h", "slice", "both"])
def test_gradcheck_and_gradgradcheck_of_either_result(place, used):
    gate, up = leaves(2, 2, 6, device=place.device)
    indices = torch.tensor([1, 4], device=place.device)

    def call(gate, up):
        with peft_kernels.use_backend(place.backend):
            results = ops.swiglu_s2ft(gate, up, indices)
        return results if used == "both" else results[used == "slice"]

    assert torch.autograd.gradcheck(call, (gate, up))
    assert torch.autograd.gradgradcheck(call, (gate, up))


@EACH_DOUBLE_PLACE
def test_functional_gradients(place):
    gate, up = (t.detach() for t in leaves(5, 8, device=place.device))
    indices = torch.tensor([0, 3, 7], device=place.device)

    def loss(function):
        return lambda gate, up: sum(result.square().sum() for result in function(gate, up, indices))

    with peft_kernels.use_backend(place.backend):
        found = torch.func.grad(loss(ops.swiglu_s2ft), argnums=(0, 1))(gate, up)
    for actual, expected in zip(found, torch.func.grad(loss(plain), argnums=(0, 1))(gate, up), strict=True):
        torch.testing.assert_close(actual, expected)


@EACH_PLACE
def test_gate_and_up_are_kept_and_h_is_not(place, dtype):
    gate, up = leaves(3, 11, 24, dtype=dtype, device=place.device)
    indices = random_channels(24, 5).to(place.device)
    saved = []
    with (
        peft_kernels.use_backend(place.backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ops.swiglu_s2ft(gate, up, indices)
    expected = {tensor.untyped_storage().data_ptr() for tensor in (gate, up, indices)}
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"up": torch.ones(3, 5)}, ValueError, r"up must be \[3, 4\] like gate, got float32 \[3, 5\]"),
        ({"up": torch.ones(3, 4).half()}, TypeError, "up must have gate's dtype, torch.float32, got float16"),
        ({"gate": torch.ones(())}, ValueError, r"gate must be \[..., K\], got float32 \[\]"),
        ({"gate": torch.ones(3, 4).int()}, TypeError, "gate must be float32, .* got int32"),
        ({"indices": torch.tensor([1]).int()}, TypeError, r"indices must be int64, got int32 \[1\]"),
        ({"indices": torch.tensor([[1]])}, ValueError, r"indices must be 1-D, got int64 \[1, 1\]"),
        ({"up": torch.ones(3, 4, device="meta")}, ValueError, "up must be on gate's device, cpu, got .* on meta"),
    ],
)
def test_function_refuses_bad_arguments(changes, error, message):
    arguments = {"gate": torch.ones(3, 4), "up": torch.ones(3, 4), "indices": torch.tensor([1, 2]), **changes}
    with pytest.raises(error, match=f"swiglu_s2ft: {message}"):
        ops.swiglu_s2ft(**arguments)
