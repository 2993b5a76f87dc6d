"""Bytes are exact: saved for backward, live at once, resident."""

from __future__ import annotations

import sys

import pytest
import torch

import peft_kernels as pk
from benchmarks import memory
from benchmarks.limits import Shape

M, K, N, r = 96, 64, 48, 4


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    weight = torch.randn(K, K, requires_grad=True)
    x = torch.randn(M, K, requires_grad=True)
    total, storages = memory.saved_bytes(lambda: (x @ weight) * x, [weight])
    # x twice (for the matmul and for the product) and the matmul's result; the weight is left out.
    assert total == 2 * x.nbytes
    assert storages[x.untyped_storage().data_ptr()] == x.nbytes


def test_saved_bytes_of_a_view_are_those_of_its_storage() -> None:
    x = torch.randn(M, K, requires_grad=True)
    part = x[: M // 2]
    total, _ = memory.saved_bytes(lambda: part.sin(), [])
    assert total == x.nbytes


def test_saved_bytes_of_a_sparse_tensor_are_its_indices_and_values() -> None:
    values = torch.randn(3, requires_grad=True)
    indices = torch.tensor([[0, 2, 5], [1, 0, 3]])
    x = torch.randn(K, M)

    def product() -> torch.Tensor:
        return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (N, K), is_coalesced=True), x)

    total, _ = memory.saved_bytes(product, [indices, values, x])
    assert total == 0
    total, _ = memory.saved_bytes(product, [x])
    assert total == indices.nbytes + values.nbytes


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_our_layer_saves_x_and_hidden_only(dropout_p: float) -> None:
    layer = pk.nn.LoRALinear(K, N, bias=False, r=r, lora_dropout=dropout_p)
    x = torch.randn(M, K, requires_grad=True)
    total, _ = memory.saved_bytes(lambda: layer(x), layer.parameters())
    rng_state = 16 if dropout_p else 0
    assert total == Shape(M, K, N, r, x.element_size()).saved_bytes() + rng_state


def test_peak_is_the_most_that_lived_at_once() -> None:
    size = 1 << 20

    def step() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        second = torch.ones(2 * size, dtype=torch.uint8)
        del first, second
        third = torch.ones(size, dtype=torch.uint8)
        del third

    assert memory.peak_tensor_bytes(step) == 3 * size


def test_peak_does_not_count_what_was_alive_before() -> None:
    held = [torch.ones(1 << 20)]

    def step() -> None:
        held.pop()
        torch.ones(1 << 10)

    assert memory.peak_tensor_bytes(step) <= 4 << 10


def test_tensor_bytes_count_shared_storage_once() -> None:
    x = torch.ones(100)
    assert memory.tensor_bytes([x, x[:10], torch.ones(10)]) == 440


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_peak_sees_memory_that_is_gone_again() -> None:
    size = 64 << 20

    def step() -> None:
        torch.ones(size, dtype=torch.uint8)

    before, peak = memory.peak_resident_bytes(step)
    assert 0.9 * size < peak - before < 1.5 * size
