"""`slices.serve`: each row of a batch with its own adapter, and plain layers afterwards."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from peft_kernels import slices
from peft_kernels.slices import SliceAdapter

from ..support.slices import BAD_FOR_SMALL, adapter_of, assert_same_state, small, state, update, with_change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_of_a_batch_gets_its_adapter(llama, dtype):
    adapters = {f"a{seed}": adapter_of(lambda: llama(dtype=dtype), seed) for seed in (1, 2)}
    adapters["narrow"] = adapter_of(lambda: llama(dtype=dtype), 5, ratios={"down": 0.1})
    model = llama(dtype=dtype).eval()
    before, kinds = state(model), [type(module) for module in model.modules()]
    batch = torch.randint(0, 64, (6, 7), generator=torch.Generator().manual_seed(2))
    names = ["a2", None, "a1", "narrow", "a2", None]
    expected = []
    switch = slices.Switch(model)
    for row, name in zip(batch, names, strict=True):
        switch.to(None if name is None else adapters[name])
        expected.append(model(row[None]).logits[0])
    switch.to(None)
    base = model(batch).logits
    served = slices.serve(model, adapters)
    assert served.names == ("a1", "a2", "narrow")
    assert torch.equal(model(batch).logits, base), "outside of rows it is the base model"
    with served.rows(names):
        torch.testing.assert_close(model(batch).logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
        with served.rows([None, "a1"]):
            torch.testing.assert_close(model(batch[1:3]).logits, torch.stack(expected[1:3]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(batch).logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(batch).logits, base)
    served.stop()
    assert [type(module) for module in model.modules()] == kinds
    assert_same_state(model, before)
    assert torch.equal(model(batch).logits, base)
    served.stop()


def test_generation_serves_row_by_row(llama):
    adapters = {name: adapter_of(llama, seed, scale=0.5) for name, seed in (("a", 1), ("b", 2))}
    model = llama(use_cache=True).eval()
    prompt = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    switch, expected = slices.Switch(model), []
    for name in ("b", None, "a"):
        switch.to(None if name is None else adapters[name])
        expected.append(model.generate(prompt, **options)[0])
    switch.to(None)
    assert not torch.equal(expected[0], expected[1]), "the adapters say something else"
    served = slices.serve(model, adapters)
    with served.rows(["b", None, "a"]):
        found = model.generate(prompt.expand(3, -1), **options)
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("autocast", [True, False])
def test_serving_in_half_precision(autocast):
    model = small() if autocast else small().bfloat16()
    part, other = update([0, 4], value=0.25), update([1], "output", (4, 9), value=-0.5)
    x = torch.randn(3, 6).to(model[0].weight.dtype)
    exact = small().double() if autocast else copy.deepcopy(model).double()
    changed = with_change(exact, SliceAdapter({"0": part, "2": other}))
    served = slices.serve(model, {"a": SliceAdapter({"0": part, "2": other})})
    with served.rows([None, "a", None]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    expected = torch.stack([exact(x[0].double()), changed(x[1].double()), exact(x[2].double())])
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)


def test_a_layer_at_two_places_is_served_at_both():
    torch.manual_seed(5)
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.Sequential(shared)})
    x = torch.randn(2, 6)
    adapter = SliceAdapter({"first.0": update([1, 3], shape=(6, 6))})
    switch = slices.Switch(model)
    switch.to(adapter)
    expected = model["second"](model["first"](x))
    switch.to(None)
    served = slices.serve(model, {"a": adapter})
    with served.rows(["a", "a"]):
        torch.testing.assert_close(model["second"](model["first"](x)), expected)
    served.stop()
    assert model["first"][0] is model["second"][0] and type(model["first"][0]) is nn.Linear


def test_rows_that_do_not_fit_are_refused():
    model, x = small(), torch.randn(3, 6)
    served = slices.serve(model, {"a": SliceAdapter({"0": update([1])})})
    with pytest.raises(KeyError, match="adapters are a, got b, c"), served.rows(["c", "a", "b"]):
        pass
    with (
        served.rows(["a", None]),
        pytest.raises(ValueError, match=r"x must be \[2, ..., 6\], as rows says, got \[3, 6"),
    ):
        model(x)
    with served.rows(["a"]), pytest.raises(ValueError, match=r"got \[6\]"):
        model(x[0])
    with pytest.raises(RuntimeError, match="in the middle"), served.rows(["a", "a", "a"]):
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), small()(x))
    served.stop()
    with pytest.raises(RuntimeError, match="stopped"), served.rows(["a"]):
        pass


@pytest.mark.parametrize(("updates", "message"), BAD_FOR_SMALL.values(), ids=BAD_FOR_SMALL.keys())
def test_serving_that_cannot_be_done_changes_nothing(updates, message):
    model = small()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        slices.serve(model, {"good": SliceAdapter({"2": update([3], shape=(4, 9))}), "bad": SliceAdapter(updates)})
    with pytest.raises(ValueError, match="adapters must not be empty"):
        slices.serve(model, {})
    model[0].forward = abs
    with pytest.raises(TypeError, match="ServedLinear cannot replace this layer: its forward is replaced on the inst"):
        slices.serve(model, {"a": SliceAdapter({"2": update([3], shape=(4, 9)), "0": update([1])})})
    assert [type(module) for module in model.modules()] == kinds


def test_a_served_model_is_not_served_again_nor_switched():
    model, adapter = small(), SliceAdapter({"0": update([1])})
    slices.serve(model, {"a": adapter})
    for refused in (lambda: slices.serve(model, {"a": adapter}), lambda: slices.Switch(model).to(adapter)):
        with pytest.raises(ValueError, match=r"0 must be a plain nn\.Linear or Conv1D, it is a ServedLinear"):
            refused()


def test_a_second_thread_is_refused_while_one_computes():
    model = nn.Sequential(nn.Linear(6, 9))
    served = slices.serve(model, {"a": SliceAdapter({"0": update([1, 4])})})
    raised = []

    def enter():
        try:
            with served.rows(["a"]):
                pass
        except RuntimeError as error:
            raised.append(str(error))

    with served.rows([None]):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert raised and "another thread is computing" in raised[0]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(raised) == 1
