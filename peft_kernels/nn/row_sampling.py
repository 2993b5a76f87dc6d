"""How a layer samples the rows that its weight gradient comes from, and which layers share a sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..ops import recompute
from ..ops.wta_crs import RowSample, check_keep_ratio, computing_dtype, draw_uniforms
from ..reference.lora import as_rows


@dataclass
class _Shared:
    """The sample of one input, and who has taken it."""

    sample: RowSample
    version: int
    keep_ratio: float
    grad_norms: Tensor | None
    taken_by: list[RowSampling] = field(default_factory=list)


_samples: Any = WeakIdKeyDictionary()
"""By input: goes with it, so that the rows are kept no longer than layers can ask for them."""


class RowSampling:
    """One layer's way to sample the rows of its input.

    Layers that are called with the same tensor, as the projections to q, k and v are, share one sample, so that its
    rows are kept once, as the tensor itself would have been. A layer takes a sample once: called with that tensor
    again, in another step, it draws anew. Inside `torch.compile` every layer draws for itself.

    The random numbers come from torch's generator of the device, and each call draws as many of them, whether it keeps
    a sample or not: so activation checkpointing, which sets the generator back, finds the same sample, and everything
    behind it the same numbers.

    Attributes:
        keep_ratio: share of the rows that are kept, in (0, 1].
        grad_norms: M numbers that probabilities are multiplied by, see `ops.draw_rows`; None for none. They hold for
            every call until they are replaced.

    Raises:
        ValueError: keep_ratio is not in (0, 1].
    """

    def __init__(self, keep_ratio: float, grad_norms: Tensor | None = None) -> None:
        self.keep_ratio = keep_ratio
        self.grad_norms = grad_norms

    @property
    def keep_ratio(self) -> float:
        """Share of the rows that are kept."""
        return float(self._keep_ratio)

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        check_keep_ratio(type(self).__name__, value)
        # As text, which is a constant to `torch.compile`: of a float it may make a symbol, and of the number of kept
        # rows then an expression that autograd Functions do not take.
        self._keep_ratio = repr(float(value))

    def sample(self, x: Tensor, wanted: bool) -> RowSample | None:
        """The rows of x `[..., K]` that are to be kept for backward; None to keep x, or nothing.

        Args:
            wanted: whether there is a weight gradient to keep them for.

        None is for x that has no more rows than are kept, and for x that is on offer (`ops.recompute.offered`): what is
        formed again in backward costs no memory, and gives the exact gradient.
        """
        total = as_rows(x).shape[0]
        count = ops.kept_rows(total, self.keep_ratio)
        if count >= total:
            return None
        uniforms = draw_uniforms(count, x.device)
        if not wanted or not torch.is_grad_enabled() or _on_offer(x):
            return None
        if torch.compiler.is_compiling():
            return ops.draw_rows(x, self.keep_ratio, grad_norms=self.grad_norms, uniforms=uniforms)
        shared = _samples.get(x)
        if shared is None or not self._may_take(shared, x):
            sample = ops.draw_rows(x, self.keep_ratio, grad_norms=self.grad_norms, uniforms=uniforms)
            assert sample is not None
            shared = _samples[x] = _Shared(sample, x._version, self.keep_ratio, self.grad_norms)
        shared.taken_by.append(self)
        return shared.sample

    def _may_take(self, shared: _Shared, x: Tensor) -> bool:
        return (
            shared.version == x._version  # nobody has changed x since
            and shared.keep_ratio == self.keep_ratio
            and shared.grad_norms is self.grad_norms
            and shared.sample.kept.dtype == computing_dtype(x)
            and not any(taker is self for taker in shared.taken_by)
        )


def _on_offer(x: Tensor) -> bool:
    """Whether a layer would take x from an offer; autocast would give it another tensor than the one on offer."""
    return recompute.is_offered(x) and computing_dtype(x) == x.dtype
