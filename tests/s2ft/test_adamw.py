"""Fifty steps of `slice_adamw_` against `torch.optim.AdamW` on a dense parameter whose gradient is masked."""

from __future__ import annotations

import pytest
import torch

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.places import places_and_dtypes, serves
from ..support.s2ft import random_slice

STEPS = 50
NUMBERS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
EACH_PLACE = pytest.mark.parametrize(
    ("place", "weight_dtype"), places_and_dtypes("slice_adamw_", dtypes=(torch.float32, torch.bfloat16))
)
EACH_DECAY = pytest.mark.parametrize("weight_decay", [0.0, 0.3])
DIM = pytest.mark.parametrize("dim", [0, 1])


def gradients(own, dtype):
    """A gradient for each step, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(5)
    shape = (STEPS, *own.trainable.shape)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(own.trainable.device)


def run_ours(place, own, grads, weight_decay, written=True):
    """Trainable and moments after all steps, in the dtype of the gradients; and the weight."""
    trainable = own.trainable.to(grads.dtype, copy=True)
    exp_avg, exp_avg_sq = (torch.zeros_like(grads[0]) for _ in range(2))
    weight = own.weight.clone()
    where = (weight, own.indices) if written else (None, None)
    kernel = place.kernel("slice_adamw_", weight.dtype)
    for step, grad in enumerate(grads, 1):
        kernel(trainable, grad, exp_avg, exp_avg_sq, *where, own.dim, step, *NUMBERS.values(), weight_decay)
    return trainable, exp_avg, exp_avg_sq, weight


def run_torch(own, grads, weight_decay):
    """The same by torch's optimizer on a dense parameter with zeros for the gradients of all other channels."""
    start = grads.new_zeros(own.weight.shape).index_copy(own.dim, own.indices, own.trainable.to(grads.dtype))
    dense = torch.nn.Parameter(start)
    optimizer = torch.optim.AdamW(
        [dense], NUMBERS["lr"], (NUMBERS["beta1"], NUMBERS["beta2"]), NUMBERS["eps"], weight_decay, foreach=False
    )
    for grad in grads:
        dense.grad = torch.zeros_like(dense).index_copy(own.dim, own.indices, grad)
        optimizer.step()
    state = optimizer.state[dense]
    if grads.dtype in (torch.float32, torch.float64):  # float16 holds no eps as small as this: zeros become NaN
        others = dense.detach().index_fill(own.dim, own.indices, 0.0)
        assert not others.any(), "torch changed another channel"
    return [t.detach().index_select(own.dim, own.indices) for t in (dense, state["exp_avg"], state["exp_avg_sq"])]


@EACH_PLACE
@EACH_DECAY
@DIM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_are_those_of_torch(place, weight_dtype, weight_decay, dim, dtype):
    if not serves(place, ("slice_adamw_",), dtype):
        pytest.skip(f"{place.backend} does not take float64")
    own = random_slice((60, 61), 12, dim, dtype=weight_dtype, device=place.device)
    grads = gradients(own, dtype)
    *ours, _ = run_ours(place, own, grads, weight_decay)
    units = 16 * torch.finfo(dtype).eps  # of the largest number that a sum of fifty steps has met
    theirs = run_torch(own, grads, weight_decay)
    for name, actual, expected in zip(("trainable", "exp_avg", "exp_avg_sq"), ours, theirs, strict=True):
        difference = (actual - expected).abs().max()
        assert difference <= units * expected.abs().max(), f"{name}: {difference / expected.abs().max():.1e}"


@EACH_PLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fifty_steps_are_as_accurate_as_those_of_torch(place, weight_dtype, dtype):
    own = random_slice((60, 61), 12, dtype=weight_dtype, device=place.device)
    own = own.map(lambda tensor: tensor.to(dtype).to(tensor.dtype))
    grads = gradients(own, dtype)
    *ours, _ = run_ours(place, own, grads, 0.3)
    runs = (ours, run_torch(own, grads, 0.3), run_torch(own, grads.double(), 0.3))
    for name, actual, own_result, exact in zip(("trainable", "exp_avg", "exp_avg_sq"), *runs, strict=True):
        assert_accurate(actual, own_result, exact, name)


@EACH_PLACE
@DIM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_holds_trainable_after_every_step(place, weight_dtype, dim, dtype):
    own = random_slice((60, 61), 12, dim, dtype=weight_dtype, device=place.device)
    grads = gradients(own, dtype)
    trainable, *moments, weight = run_ours(place, own, grads, 0.3)
    expected = own.weight.index_copy(dim, own.indices, trainable.to(weight_dtype))
    assert_same_bits(weight, expected)
    alone, *moments_alone, unchanged = run_ours(place, own, grads, 0.3, written=False)
    assert_same_bits(unchanged, own.weight)
    for written, without in zip((trainable, *moments), (alone, *moments_alone), strict=True):
        assert_same_bits(written, without)
