"""What the launchers refuse beyond the calls of `tests/lora/test_bad_input.py`, which run here too."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft_kernels.triton_kernels import (
    checks,
    lora,
    s2ft,
    slice_checks,
    sparse_delta,
    token_checks,
    token_elimination,
    token_selection,
)

from ..support.operators import ACTIVATIONS, DROPPING, OPERATORS, random_call

EACH = pytest.mark.parametrize("operator", OPERATORS)
OTHER_TENSORS = [
    (operator, name)
    for operator in OPERATORS
    for name, value in random_call(operator, dropout_p=0.5).arguments.items()
    if isinstance(value, torch.Tensor) and name != ACTIVATIONS[operator]
]


def test_every_launcher_has_a_check_with_its_arguments():
    families = (lora, s2ft, sparse_delta, token_elimination, token_selection)
    launchers = {name: launcher for family in families for name, launcher in family.LAUNCHERS.items()}
    every_check = {**checks.CHECKS, **slice_checks.CHECKS, **token_checks.CHECKS}
    assert set(every_check) == set(launchers)
    for operator, launcher in launchers.items():
        expected = inspect.signature(launcher).parameters.values()
        found = inspect.signature(every_check[operator]).parameters.values()
        assert [(p.name, p.annotation) for p in found] == [(p.name, p.annotation) for p in expected]


@pytest.mark.parametrize(("operator", "name"), OTHER_TENSORS)
def test_tensors_elsewhere_are_refused(operator, name, place):
    call = random_call(operator, dropout_p=0.5, device=place.device)
    bad = call.map(lambda tensor: tensor, **{name: call.arguments[name].to("meta")})
    with pytest.raises(RuntimeError, match=rf"^{operator}: {name} must be .*on {place.device}.*, got .* on meta"):
        bad.run(lora.LAUNCHERS[operator])


@EACH
def test_float64_activations_are_refused(operator, place):
    call = random_call(operator, dtype=torch.float64, device=place.device)
    message = rf"^{operator}: {ACTIVATIONS[operator]} must be float32, bfloat16 or float16, got float64"
    with pytest.raises(RuntimeError, match=message):
        call.run(lora.LAUNCHERS[operator])


@EACH
def test_bad_calls_launch_nothing(operator, place, launched):
    call = random_call(operator, device=place.device)
    with pytest.raises(RuntimeError, match=operator):
        call.map(lambda tensor: tensor.to(torch.complex64)).run(lora.LAUNCHERS[operator])
    assert launched == []


@pytest.mark.parametrize("operator", DROPPING)
def test_without_dropout_no_random_state_is_asked_for(operator, place):
    call = random_call(operator, device=place.device)
    state = torch.zeros(5, device=place.device)
    for rng_state in (None, state):
        call.map(lambda tensor: tensor, rng_state=rng_state).run(lora.LAUNCHERS[operator])
