"""Same inputs and seed, same bits: from run to run, and for any number of threads."""

from __future__ import annotations

import pytest
import torch

import peft_kernels

from ..support.accuracy import assert_same_bits
from ..support.lora import TENSORS, gradients, random_layer, seeded_call
from ..support.operators import DROPPING, OPERATORS, random_call
from ..support.places import LAYER_OPERATORS, operators_at_places, places_and_dtypes

# Large enough that work is split among threads, with ragged ends.
SIZES = ({"rows": 1100, "columns": 140, "out_columns": 130}, {"rows": 3, "columns": 3000, "out_columns": 2100})


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def each_operator(backend=None):
    return pytest.mark.parametrize(("operator", "place", "dtype"), operators_at_places(OPERATORS, backend=backend))


def large_call(operator, dtype, sizes, device):
    dropout_p = 0.2 if operator in DROPPING else 0.0
    return random_call(operator, **sizes, rank=9, dtype=dtype, dropout_p=dropout_p, device=device)


@each_operator()
@pytest.mark.parametrize("sizes", SIZES, ids=["tall", "wide"])
def test_operators_give_the_same_bits_from_run_to_run(operator, place, dtype, sizes):
    call = large_call(operator, dtype, sizes, place.device)
    first, second = (call.run(place.kernel(operator, dtype)) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)


@each_operator("cpu")
@pytest.mark.parametrize("sizes", SIZES, ids=["tall", "wide"])
def test_operators_give_the_same_bits_for_any_number_of_threads(operator, place, dtype, sizes, restored_threads):
    call = large_call(operator, dtype, sizes, place.device)
    # torch's own matrix product splits its sums by the number of threads; zeros leave the part that is ours.
    for name in {"matrix", "weight"} & call.arguments.keys():
        call = call.map(lambda t: t, **{name: torch.zeros_like(call.arguments[name])})
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call.run(place.kernel(operator, dtype)))
    for other in results[1:]:
        for left, right in zip(other, results[0], strict=True):
            assert_same_bits(left, right)


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_layer_gives_the_same_bits_from_run_to_run(place, dtype, dropout_p):
    layer = random_layer((300,), 140, 130, 16, dtype, device=place.device).training(*TENSORS)
    grad_out = torch.randn(300, 130).to(dtype).to(place.device)
    runs = []
    with peft_kernels.use_backend(place.backend):
        for _ in range(3):
            y = seeded_call(layer, dropout_p)
            runs.append({"y": y.detach(), **gradients(y, grad_out, layer)})
    for run in runs[1:]:
        for name, tensor in run.items():
            assert_same_bits(tensor, runs[0][name], name)


@pytest.mark.parametrize("rows", [1, 2, 5, 64, 257])
@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("lora_shrink", dtypes=(torch.float32, torch.bfloat16)))
def test_mask_of_a_row_does_not_depend_on_how_many_rows_there_are(place, dtype, rows):
    sizes = {"rows": 300, "columns": 40}
    call = random_call("lora_shrink", **sizes, dtype=dtype, dropout_p=0.5, integers=True, device=place.device)
    (whole,) = call.run(place.kernel("lora_shrink", dtype))
    (part,) = call.map(lambda t: t, x=call.arguments["x"][:rows]).run(place.kernel("lora_shrink", dtype))
    assert_same_bits(part, whole[:rows])
