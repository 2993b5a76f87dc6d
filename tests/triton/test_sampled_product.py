"""`sampled_product` on Triton against the formula in float64, by the accuracy rule, at sizes off the tiles."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft_kernels.triton_kernels import sparse_delta

from peft_kernels.reference.sparse_delta import sampled_product as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out

SIZES = [(1, 1, 1), (0, 5, 4), (3, 5, 2), (70, 131, 70), (129, 17, 259), (40, 300, 20)]  # M, N, K


def entries(n, k, density, index_dtype=torch.int32):
    chosen = torch.rand(n * k, generator=torch.Generator().manual_seed(1)) < density
    return chosen.nonzero().flatten().to(index_dtype)


def operands(m, n, k, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(m, c, generator=generator).to(dtype).to(device) for c in (n, k)]


def test_the_launcher_has_the_operators_arguments():
    (launcher,) = sparse_delta.LAUNCHERS.values()
    schema = torch.ops.peft_kernels.sampled_product.default._schema
    assert [argument.name for argument in schema.arguments] == list(inspect.signature(launcher).parameters)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_sizes_and_densities(place, dtype, sizes, density, index_dtype):
    m, n, k = sizes
    dy, x = operands(m, n, k, dtype, place.device)
    indices = entries(n, k, density, index_dtype).to(place.device)
    found = sparse_delta.sampled_product(dy, x, indices, torch.float32)
    assert found.dtype == torch.float32
    exact = reference(dy.double(), x.double(), indices, torch.float64)
    assert_accurate(found, reference(dy, x, indices, torch.float32), exact, "sampled_product")


def test_a_tile_with_entries_in_one_row_only(place, dtype):
    dy, x = operands(33, 200, 150, dtype, place.device)
    indices = (77 * 150 + torch.arange(150)).to(place.device)
    exact = reference(dy.double(), x.double(), indices, torch.float64)
    found = sparse_delta.sampled_product(dy, x, indices, torch.float32)
    assert_accurate(found, reference(dy, x, indices, torch.float32), exact, "sampled_product")


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_strides(place, dtype, layout):
    dy, x = operands(37, 40, 50, dtype, place.device)
    indices = entries(40, 50, 0.1).to(place.device)
    found = sparse_delta.sampled_product(laid_out(dy, layout), laid_out(x, layout), indices, torch.float32)
    assert_same_bits(found, sparse_delta.sampled_product(dy, x, indices, torch.float32))


def test_long_sums_are_split_and_finished_in_one_order(place, dtype, launched):
    dy, x = operands(1100, 30, 20, dtype, place.device)
    indices = entries(30, 20, 0.2).to(place.device)
    found = sparse_delta.sampled_product(dy, x, indices, torch.float32)
    assert [name for name, _ in launched] == ["sampled_product_kernel", "sum_partials_kernel"]
    assert launched[0][1][2] > 1
    assert_same_bits(found, sparse_delta.sampled_product(dy, x, indices, torch.float32))
    exact = reference(dy.double(), x.double(), indices, torch.float64)
    assert_accurate(found, reference(dy, x, indices, torch.float32), exact, "sampled_product")


def test_the_result_comes_in_the_dtype_asked_for(place, half):
    dy, x = operands(9, 20, 30, half, place.device)
    indices = entries(20, 30, 0.1).to(place.device)
    found = sparse_delta.sampled_product(dy, x, indices, half)
    assert_same_bits(found, sparse_delta.sampled_product(dy, x, indices, torch.float32).to(half))


BAD = {
    "x_of_other_rows": ({"x": lambda t: t[1:]}, "x must be [9, K], got float32 [8, 30]"),
    "x_of_other_dtype": ({"x": lambda t: t.half()}, "x must have grad_out's dtype, float32, got float16"),
    "indices_matrix": ({"indices": lambda t: t[None]}, "indices must be 1-D, got int32 [1, "),
    "indices_int16": ({"indices": lambda t: t.short()}, "indices must be int32 or int64, got int16"),
    "indices_strided": ({"indices": lambda t: t[::2]}, "indices must be contiguous, got int32"),
    "too_many": (
        {"indices": lambda t: torch.arange(601).int()},
        "must be at most N K = 600 positions, got int32 [601]",
    ),
    "elsewhere": ({"indices": lambda t: t.to("meta")}, "indices must be on "),
    "dtype": ({"dtype": lambda _: torch.int32}, "dtype must be float32, bfloat16 or float16, got int32"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(place, change, message):
    dy, x = operands(9, 20, 30, torch.float32, place.device)
    indices = entries(20, 30, 0.1).to(place.device)
    arguments = {"grad_out": dy, "x": x, "indices": indices, "dtype": torch.float32}
    for name, function in change.items():
        changed = function(arguments[name])
        arguments[name] = changed.to(place.device) if name == "indices" and changed.device.type == "cpu" else changed
    with pytest.raises(RuntimeError) as error:
        sparse_delta.LAUNCHERS["sampled_product"](*arguments.values())
    assert str(error.value).startswith("sampled_product: ") and message in str(error.value)
