"""`lora_linear` on the Triton backend, forward and backward, and the way its big product takes."""

from __future__ import annotations

import pytest
import torch
from peft_kernels.triton_kernels import lora

import peft_kernels

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.lora import (
    TENSORS,
    formula,
    gradients,
    mask_of_seeded_call,
    plain_pytorch,
    random_layer,
    seeded_call,
)


def run(layer, place, dropout_p, backend):
    """y and the gradients of all tensors."""
    layer = layer.training(*TENSORS)
    with peft_kernels.use_backend(backend):
        y = seeded_call(layer, dropout_p)
    grad_out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), **gradients(y, grad_out, layer)}, grad_out


def check(layer, place, dropout_p):
    found, grad_out = run(layer, place, dropout_p, place.backend)
    keep = mask_of_seeded_call(layer, dropout_p) if dropout_p else None
    exact_layer = layer.map(lambda tensor: tensor.double()).training(*TENSORS)
    exact_y = formula(exact_layer, keep, dropout_p)
    exact = {"y": exact_y.detach(), **gradients(exact_y, grad_out.double(), exact_layer)}
    own_layer = layer.training(*TENSORS)
    own_y = plain_pytorch(own_layer, keep, dropout_p)
    own = {"y": own_y.detach(), **gradients(own_y, grad_out, own_layer)}
    for name, actual in found.items():
        assert actual.dtype == (layer.x if name == "y" else getattr(layer, name)).dtype
        assert_accurate(actual, own[name], exact[name], name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("leading", "in_features", "out_features", "rank"),
    [((7,), 24, 20, 4), ((2, 35), 45, 70, 1), ((66,), 70, 131, 16), ((0,), 12, 9, 3), ((3, 5), 33, 40, 65)],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_every_gradient(place, dtype, leading, in_features, out_features, rank, bias, dropout_p):
    layer = random_layer(leading, in_features, out_features, rank, dtype, bias=bias, device=place.device)
    check(layer, place, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_float32_factors_over_half_precision(place, half, dropout_p):
    layer = random_layer((2, 20), 50, 34, 16, half, torch.float32, device=place.device)
    check(layer, place, dropout_p)


@pytest.mark.parametrize("layout", ["transposed", "every_other", "offset"])
def test_strides(place, dtype, layout):
    layer = random_layer((3, 7), 27, 22, 5, dtype, device=place.device)
    check(layer.map(lambda tensor: laid_out(tensor, layout)), place, 0.3)


def test_runs_repeat_bit_for_bit(place, dtype):
    layer = random_layer((40,), 70, 50, 8, dtype, device=place.device)
    first, second = (run(layer, place, 0.3, place.backend)[0] for _ in range(2))
    for name in first:
        assert_same_bits(second[name], first[name], name)


def test_the_big_product_is_fused_in_half_precision_and_the_librarys_in_float32(place, dtype, launched):
    x, matrix = torch.ones(9, 8, dtype=dtype, device=place.device), torch.eye(8, dtype=dtype, device=place.device)
    hidden, factor = torch.ones(9, 2, device=place.device), torch.ones(2, 8, device=place.device)
    bias = torch.full((8,), 3.0, dtype=dtype, device=place.device)
    y = lora.lora_matmul(x, matrix, bias, hidden, factor, 0.5, 0.0, None)
    assert torch.equal(y, torch.full_like(x, 5.0))
    expected = ["matmul_kernel"] if dtype.itemsize == 2 else ["accumulate_kernel"]
    assert [kernel for kernel, _ in launched] == expected
