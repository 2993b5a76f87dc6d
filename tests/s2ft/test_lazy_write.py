"""When a layer writes its slice into its weight, and that taking it out gives back every bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_kernels.nn import S2FTLinear
from peft_kernels.nn.s2ft_layer import S2FTLayer
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.s2ft_layer import DIMS, KINDS
from ..support.s2ft_module import random_s2ft_module, weight_with_slice

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIM = pytest.mark.parametrize("dim", DIMS)
KIND = pytest.mark.parametrize("kind", KINDS)
OPTIMIZERS = {
    "SparseAdamW": lambda p: SparseAdamW(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


@pytest.fixture
def writes(monkeypatch):
    """The numbers of channels that were written since the test began."""
    done = []
    write = S2FTLayer._write_into

    def counted(layer, weight, restored):
        done.append(layer.num_channels)
        write(layer, weight, restored)

    monkeypatch.setattr(S2FTLayer, "_write_into", counted)
    return done


def steps(layer, optimizer, number=3):
    x = torch.randn(number, 4, 24, generator=torch.Generator().manual_seed(2)).to(layer.weight.dtype)
    for batch in x:
        optimizer.zero_grad()
        layer(batch).float().square().sum().backward()
        optimizer.step()


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_step_of_any_optimizer_is_written_and_can_be_taken_out(kind, dtype, make):
    layer, original = random_s2ft_module(kind, dtype)
    optimizer = make([layer.trainable])
    for _ in range(3):
        before = layer.trainable.detach().clone()
        steps(layer, optimizer, 1)
        assert not torch.equal(layer.trainable, before)
        y = layer(torch.eye(24, dtype=dtype))
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
        assert_same_bits(
            y.detach(), nn.functional.linear(torch.eye(24, dtype=dtype), layer.oriented(layer.weight), layer.bias)
        )
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)
    layer(torch.zeros(24, dtype=dtype))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["restore_weight", "unmerge", "to_linear", "deepcopy"])
def test_every_way_out_gives_back_the_original_bits(kind, dtype, way):
    layer, original = random_s2ft_module(kind, dtype)
    steps(layer, SparseAdamW([layer.trainable], lr=0.05))
    assert not torch.equal(layer.weight, original)
    if way == "unmerge":
        layer.merge()
        layer.unmerge()
    elif way == "to_linear":
        assert layer.to_linear(merge=False).weight is layer.weight
    elif way == "deepcopy":
        layer = copy.deepcopy(layer)
        layer.restore_weight()
    else:
        layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@DIM
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_even_what_is_no_number_is_lost(dim, dtype):
    linear = nn.Linear(24, 20, dtype=dtype)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(dtype).smallest_normal])
    with torch.no_grad():
        linear.weight[0, :4] = odd
        linear.weight[:4, 0] = odd
    original = linear.weight.detach().clone()
    layer = S2FTLinear.from_linear(linear, torch.arange(4), dim)
    with torch.no_grad():
        layer.trainable.fill_(1e4)
    layer(torch.zeros(24, dtype=dtype))
    assert (layer.weight == 1e4).sum() == 4 * (20 if dim == "input" else 24) or dtype == torch.bfloat16
    assert not torch.equal(layer.weight[4, 1], original[4, 1]) or dim == "output"
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def by_optimizer(layer):
    layer.trainable.grad = torch.ones_like(layer.trainable)
    torch.optim.SGD([layer.trainable], lr=1.0).step()


def in_place(layer):
    with torch.no_grad():
        layer.trainable.mul_(2)


def one_entry(layer):
    with torch.no_grad():
        layer.trainable[3, 1] = 7


def by_data(layer):
    layer.trainable.data = layer.trainable.data * 2


def as_vector(layer):
    vector = 2 * nn.utils.parameters_to_vector([layer.trainable]).detach()
    nn.utils.vector_to_parameters(vector, [layer.trainable])


def other_parameter(layer):
    layer.trainable = nn.Parameter(torch.randn(layer.trainable.shape))


def uncounted(layer):
    layer.trainable.data.mul_(2)
    layer.restore_weight()  # as the docstring says


CHANGES = (by_optimizer, in_place, one_entry, by_data, as_vector, other_parameter, uncounted)


@KIND
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_the_slice_is_written(kind, change):
    layer, original = random_s2ft_module(kind)
    x = torch.randn(3, 24)
    before = layer(x).detach()
    change(layer)
    after = layer(x).detach()
    assert not torch.equal(before, after)
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


def test_a_slice_is_written_when_it_has_changed_and_only_then(writes):
    layer, _ = random_s2ft_module()
    x = torch.randn(3, 24)
    for _ in range(3):
        layer(x)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    assert writes == [5]
    in_place(layer)
    layer(x)
    layer(x)
    assert writes == [5, 5]


@KIND
def test_after_a_backward_pass_it_is_written_anew(kind, writes):
    layer, _ = random_s2ft_module(kind)
    x = torch.randn(3, 24)
    for _ in range(3):
        layer(x).sum().backward()
        layer.trainable.data.add_(1.0)  # what torch does not count
    y = layer(x)
    assert writes == [5] * 4
    expected = torch.nn.functional.linear(x, layer.oriented(layer.weight), layer.bias)
    assert_same_bits(y.detach(), expected.detach())


def test_a_new_layer_has_nothing_to_write(writes):
    layer = S2FTLinear(24, 20, num_channels=5)
    layer(torch.zeros(24)).sum().backward()
    assert not writes


@KIND
def test_the_sparse_optimizer_writes_in_its_own_pass(kind, writes):
    layer, original = random_s2ft_module(kind)
    optimizer = SparseAdamW([layer.trainable], lr=0.05)
    layer(torch.ones(24)).sum().backward()
    optimizer.step()
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))
    layer(torch.ones(24))
    assert len(writes) == 1, "the first forward's"


@KIND
def test_a_weight_changed_by_another_gets_the_slice_again(kind):
    layer, original = random_s2ft_module(kind)
    layer(torch.zeros(24))
    with torch.no_grad():
        layer.weight.copy_(original)  # as a broadcast of the base model would
    layer(torch.zeros(24))
    assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original))


@pytest.mark.parametrize("change", [in_place, lambda layer: layer.restore_weight()], ids=["slice", "restore"])
def test_a_backward_pass_that_would_use_a_changed_weight_is_refused(change):
    layer, _ = random_s2ft_module()
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    change(layer)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_sparse_optimizer_between_forward_and_backward_is_noticed():
    layer, _ = random_s2ft_module()
    optimizer = SparseAdamW([layer.trainable])
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    y = layer(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@KIND
def test_another_forward_in_between_does_no_harm(kind):
    layer, _ = random_s2ft_module(kind)
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer(x)
    layer.write()
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.oriented(layer.weight).sum(0).expand(3, 24))


@KIND
def test_layers_made_in_inference_mode_follow_their_slice_too(kind):
    with torch.inference_mode():
        layer, original = random_s2ft_module(kind)
        layer(torch.zeros(24))
        layer.trainable.mul_(2)
        layer(torch.zeros(24))
        assert_same_bits(layer.weight, weight_with_slice(layer, original))


@KIND
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "move",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.double(),
        lambda layer: layer.half(),
        lambda layer: nn.Sequential(layer).bfloat16()[0],
    ],
    ids=["to", "double", "half", "parent"],
)
def test_another_dtype_rounds_the_original_and_keeps_the_slice(kind, move, merged):
    layer, original = random_s2ft_module(kind)
    layer(torch.zeros(24))
    if merged:
        layer.merge()
    layer = move(layer)
    dtype = layer.weight.dtype
    expected = weight_with_slice(layer, original.to(dtype))
    y = layer(torch.eye(24, dtype=dtype))
    assert layer.original.dtype == dtype and layer.indices.dtype == torch.int64 and layer.merged == merged
    assert_same_bits(layer.weight.detach(), expected)
    assert_same_bits(y.detach(), nn.functional.linear(torch.eye(24, dtype=dtype), layer.oriented(expected), layer.bias))
    if merged:
        layer.unmerge()
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original.to(dtype))
    if not merged:
        layer(torch.ones(24, dtype=dtype)).sum().backward()
        SparseAdamW([layer.trainable], lr=0.1).step()
        assert layer.trainable.grad.dtype == layer.trainable.dtype
        assert_same_bits(layer.weight.detach(), weight_with_slice(layer, original.to(dtype)))


@KIND
def test_half_precision_and_back_loses_what_half_precision_loses(kind):
    layer, original = random_s2ft_module(kind)
    layer.bfloat16().float()
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original.bfloat16().float())


@KIND
@pytest.mark.parametrize("way", ["meta", "to_empty"])
def test_a_layer_that_lost_its_memory_says_so_until_it_is_loaded(kind, way):
    layer, original = random_s2ft_module(kind)
    x = torch.randn(3, 24)
    expected, state = layer(x).detach(), copy.deepcopy(layer.state_dict())
    if way == "meta":
        layer.to("meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="is not filled yet; load a state_dict into it"):
        layer(x)
    layer.restore_weight()  # must not write into channels that are not there
    layer.load_state_dict(state)
    assert_same_bits(layer(x).detach(), expected)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


def test_the_optimizer_of_a_layer_that_is_gone_still_steps():
    layer, _ = random_s2ft_module()
    trainable = layer.trainable
    layer(torch.ones(24)).sum().backward()
    optimizer, before = SparseAdamW([trainable], lr=0.1), trainable.detach().clone()
    del layer
    optimizer.step()
    assert not torch.equal(trainable, before)
