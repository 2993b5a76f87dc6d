"""Asking a module what it computes, with random numbers, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .linear import has_hooks, replaced_call

TOKENS = 12


def random_like(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same normal numbers every time, on the device and in the dtype of `like`."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(device=like.device, dtype=like.dtype)


def on_meta(module: nn.Module) -> bool:
    """Whether a module has nothing to answer with."""
    return any(parameter.is_meta for parameter in module.parameters())


def still_is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class does, and nothing watches: what was asked of it holds."""
    return type(module) is kind and not has_hooks(module) and replaced_call(module) is None


@contextmanager
def in_evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """With everything in these modules in evaluation, where they draw nothing at random."""
    training = [inner for module in modules for inner in module.modules() if inner.training]
    for inner in training:
        inner.training = False
    try:
        yield
    finally:
        for inner in training:
            inner.training = True


@contextmanager
def undisturbed(module: nn.Module, training: bool) -> Iterator[None]:
    """With everything in the module training or not, without checkpointing, and torch's generators set back after."""
    flags = {inner: inner.training for inner in module.modules()}
    checkpointing = {inner: value for inner in flags if (value := inner.__dict__.get("gradient_checkpointing"))}
    device = next(module.parameters()).device
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=kind):
        torch.manual_seed(0)
        try:
            for inner in flags:
                inner.training = training
            for inner in checkpointing:
                inner.gradient_checkpointing = False  # type: ignore[assignment]
            yield
        finally:
            for inner, flag in flags.items():
                inner.training = flag
            for inner, value in checkpointing.items():
                inner.gradient_checkpointing = value
