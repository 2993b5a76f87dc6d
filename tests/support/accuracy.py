"""How close is close enough: at most twice PyTorch's own error.

Every result is compared with the exact one (the formula in float64), and so is what plain PyTorch computes in the
tested dtype. The rule holds for the root mean square of the errors and for the largest error. In a small tensor
PyTorch's own error may be small by luck, so the rule has a floor: a few units in the last place of the tensor's scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, own: Tensor, exact: Tensor, what: str) -> None:
    """Raises unless `actual` is as accurate as `own`, PyTorch's result in the tested dtype, within a factor of two.

    Args:
        actual: the result under test.
        own: plain PyTorch's result, any dtype.
        exact: the float64 result.
        what: names the result in the message.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.double().cpu()
    ours, theirs = actual.double().cpu() - exact, own.double().cpu() - exact
    floor = _units(actual) * torch.finfo(actual.dtype).eps
    _assert_within(_rms(ours), 2 * _rms(theirs) + floor * _rms(exact), f"{what}: root mean square error")
    _assert_within(ours.abs().max(), 2 * theirs.abs().max() + floor * exact.abs().max(), f"{what}: largest error")


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raises unless both tensors hold the same bits; NaNs of equal bits are equal."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    differing = (_bits(actual) != _bits(expected)).any(-1).sum().item() if actual.numel() else 0
    assert differing == 0, f"{what}: {differing} of {actual.numel()} elements differ"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1, 1).view(torch.uint8)


def _units(tensor: Tensor) -> int:
    if tensor.dtype == torch.float64:  # nothing is more exact, so the error of PyTorch's own shows as zero
        return 64
    return 1 if tensor.numel() >= 512 else 4


def _rms(error: Tensor) -> Tensor:
    return error.square().mean().sqrt()


def _assert_within(error: Tensor, allowed: Tensor, what: str) -> None:
    # Negated so that NaN fails.
    if not bool(error <= allowed):
        raise AssertionError(f"{what} is {error.item():.3e}, allowed {allowed.item():.3e}")
