"""`slices.Switch`: each adapter computed in turn, every bit given back, and nothing changed where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import slices
from peft_kernels.slices import SliceAdapter

from ..support.accuracy import assert_same_bits
from ..support.slices import (
    BAD_FOR_SMALL,
    adapter_of,
    assert_same_state,
    dense,
    small,
    state,
    trained,
    update,
    with_change,
)
from .architectures import build, every_architecture, logits, roles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_switching_to_and_fro_computes_each_and_restores_the_bits(llama, tokens, dtype):
    adapters = [adapter_of(lambda: llama(dtype=dtype), seed) for seed in (1, 2)]
    model = llama(dtype=dtype).eval()
    before, base = state(model), model(tokens).logits
    expected = [with_change(model, adapter)(tokens).logits for adapter in adapters]
    switch = slices.Switch(model)
    for number in (0, 1, 0, 0, 1):
        switch.to(adapters[number])
        assert switch.current is adapters[number]
        assert_same_bits(model(tokens).logits.detach(), expected[number].detach())
    switch.to(None)
    assert switch.current is None
    assert_same_state(model, before)
    assert torch.equal(model(tokens).logits, base)
    switch.to(None)


@pytest.mark.parametrize("co_permute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switched_model_is_the_trained_one(llama, tokens, dtype, co_permute):
    # original + (trainable - original) is trainable again, but for the last bit.
    trained_model = trained(llama(dtype=dtype), co_permute=co_permute, fuse_swiglu=False)
    model = llama(dtype=dtype).eval()
    slices.Switch(model).to(slices.take(trained_model))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(model(tokens).logits, trained_model(tokens).logits, **close)
    pk.eject(trained_model, merge=True)
    for name, value in trained_model.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], value, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


@every_architecture
def test_every_architecture_switches_to_what_was_trained_co_permuted(name):
    def make():
        return build(name)

    model = trained(make(), ratios=dict.fromkeys(roles(name), 0.34), co_permute=True)
    expected, adapter, base = logits(model), slices.take(model), make()
    assert not torch.allclose(logits(base), expected, rtol=1e-2)
    slices.Switch(base).to(adapter)
    torch.testing.assert_close(logits(base), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("updates", "message"), BAD_FOR_SMALL.values(), ids=BAD_FOR_SMALL.keys())
def test_a_switch_that_cannot_be_made_changes_nothing(updates, message, first):
    model, good = small(), SliceAdapter({"0": update([0, 4])})
    switch = slices.Switch(model)
    if not first:
        switch.to(good)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        switch.to(SliceAdapter({"2": update([3], shape=(4, 9)), **updates}))
    assert_same_state(model, before)
    assert switch.current is (None if first else good)
    switch.to(None)
    assert_same_state(model, state(small()))


def test_two_layers_with_one_weight_get_their_bits_back():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    switch = slices.Switch(model)
    switch.to(SliceAdapter({"0": update([1, 3], shape=(6, 6)), "1": update([1, 2], shape=(6, 6))}))
    assert not torch.equal(model[0].weight, before)
    switch.to(None)
    assert_same_bits(model[0].weight.detach(), before)


def test_a_switch_refuses_weights_that_it_cannot_write_before_it_changes_one():
    model = small()
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    before = state(model)
    switch = slices.Switch(model)
    with pytest.raises(ValueError, match=r"2 .*not contiguous"):
        switch.to(SliceAdapter({"0": update([1]), "2": update([3], shape=(4, 9))}))
    assert_same_state(model, before)
    assert switch.current is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_in_another_dtype_is_added_in_the_wider_one(dtype):
    model = small()
    weight = model[0].weight.detach().clone()
    part = update([0, 4], value=0.1, dtype=dtype)
    slices.Switch(model).to(SliceAdapter({"0": part}))
    expected = weight.double() + dense(part).double()
    torch.testing.assert_close(model[0].weight.detach(), expected.float(), rtol=1e-6, atol=1e-6)


DIMS = ("input", "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("first", "second"), [(a, b) for a in DIMS for b in DIMS])
def test_adapters_of_any_dims_follow_each_other(first, second, backend, dtype):
    model = small().to(dtype)
    before = state(model)
    adapters = [SliceAdapter({"0": update([1, 4], dim=first)}), SliceAdapter({"0": update([0, 4], dim=second)})]
    switch = slices.Switch(model)
    with pk.use_backend(backend):
        for adapter in (*adapters, *adapters[::-1]):
            switch.to(adapter)
            part = adapter["0"]
            wide = torch.promote_types(dtype, torch.float32)
            expected = before["0.weight"].to(wide).index_add(part.axis, part.slice.indices, part.change.to(wide))
            assert_same_bits(model[0].weight.detach(), expected.to(dtype))
        switch.to(None)
    assert_same_state(model, before)


def test_one_pass_serves_a_layer_that_both_adapters_change(monkeypatch):
    calls, kernel = [], pk.backends.kernel
    monkeypatch.setattr(pk.backends, "kernel", lambda name, *where: (calls.append(name), kernel(name, *where))[1])
    switch = slices.Switch(small())
    for channels in ([1, 4], [0, 4], [2]):
        switch.to(SliceAdapter({"0": update(channels)}))
    assert calls == ["slice_exchange_"] * 3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dims", [("input", "input"), ("input", "output")])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("number", range(3))
def test_an_interrupt_loses_no_bit(monkeypatch, number, ran, dims, shared):
    # Ctrl-C comes between two of Python's instructions: before a kernel has run, or behind it, where a result that it
    # returned would be lost.
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    if shared:
        model[1].weight = model[0].weight
    first, second = (
        SliceAdapter({path: update(channels, shape=(6, 6), dim=dim) for path, channels in zip("01", of, strict=True)})
        for dim, of in zip(dims, (([1, 3], [1, 2]), ([0, 3], [2, 4])), strict=True)
    )
    before, switch = state(model), slices.Switch(model)
    switch.to(first)
    left, kernel = [number], pk.backends.kernel

    def interrupted(name, *where):
        function = kernel(name, *where)

        def call(*arguments):
            left[0] -= 1
            if left[0] >= 0 or ran:
                function(*arguments)
            if left[0] < 0:
                raise KeyboardInterrupt

        return call

    with monkeypatch.context() as patch:
        patch.setattr(pk.backends, "kernel", interrupted)
        try:
            switch.to(second)
        except KeyboardInterrupt:
            assert switch.current is None
        else:
            assert left[0] >= 0
    switch.to(None)
    assert_same_state(model, before)


def test_a_model_that_moved_with_an_adapter_in_it_gets_the_next_one_on_its_own_bits():
    model, first, second = small(), SliceAdapter({"0": update([1, 4])}), SliceAdapter({"0": update([0, 4])})
    expected = small().double()
    switch = slices.Switch(model)
    switch.to(first)
    model.double()
    # What rounds in float32 is not undone in float64, where both adapters have no channel.
    switch.to(second)
    slices.Switch(expected).to(second)
    assert_same_state(model, state(expected))
    switch.to(None)
    assert_same_state(model, state(small().double()))


def test_training_a_graph_through_a_switched_weight_is_refused():
    model = small()
    y = model(torch.randn(2, 6, requires_grad=True))
    slices.Switch(model).to(SliceAdapter({"2": update([1], shape=(4, 9))}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_adapter_s_second_turn_sees_what_has_become_of_the_model():
    model, adapter = small(), SliceAdapter({"0": update([1, 4])})
    switch = slices.Switch(model)
    switch.to(adapter)
    switch.to(None)
    model[0] = nn.Linear(6, 9)
    model.double()
    before = model[0].weight.detach().clone()
    switch.to(adapter)
    change = adapter["0"].change.double()
    assert_same_bits(model[0].weight.detach()[:, [1, 4]], before[:, [1, 4]] + change)
    switch.to(None)
    assert_same_bits(model[0].weight.detach(), before)
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"0 must be a plain nn\.Linear or Conv1D, it is a Identity"):
        switch.to(adapter)


def test_after_a_switch_that_broke_off_the_base_model_comes_back():
    model, first, second = (
        small(),
        SliceAdapter({"0": update([1, 4])}),
        SliceAdapter({"0": update([0]), "2": update([3], shape=(4, 9))}),
    )
    before = state(model)
    switch = slices.Switch(model)
    switch.to(first)
    with pytest.raises(pk.BackendUnavailable), pk.use_backend("cuda"):
        switch.to(None)
    assert switch.current is None
    switch.to(second)
    switch.to(None)
    assert_same_state(model, before)


def test_weights_that_share_memory_get_their_bits_back_and_other_owners_are_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(model[0].weight.data)
    before = model[0].weight.detach().clone()
    switch = slices.Switch(model)
    switch.to(SliceAdapter({"0": update([1, 3], shape=(6, 6)), "1": update([1, 2], shape=(6, 6))}))
    switch.to(None)
    assert_same_bits(model[0].weight.detach(), before)
    with pytest.raises(ValueError, match="0 cannot hold an adapter: its weight is another module's too"):
        switch.to(SliceAdapter({"0": update([1, 3], shape=(6, 6))}))
    assert_same_bits(model[0].weight.detach(), before)
