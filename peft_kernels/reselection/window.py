"""What the backward passes of a few steps show of entries that do not train yet: their gradients, sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, ops
from ..nn.sparse_delta import SparseDeltaLinear
from ..reference.lora import accumulation_dtype
from . import ranks

PROBES = 64
"""How many trained entries of each layer are looked at to find out what became of the gradients before the step."""
_ROUNDING = 1e-5


class Window:
    """The candidates of one layer and their gradients, from `open` to `close`.

    The layer calls `observe` in backward. The first call that shows a gradient takes the candidates: as many positions
    as train, those of the largest `|dy^T x|` among the ones that do not. From then on their gradients add up, over all
    the backward passes of a step, to one gradient g per optimizer step, as the optimizer's own do; `commit` counts it.

    Attributes:
        layer: whose candidates these are.
        candidates: `[c]` sorted positions in the layer's index dtype; None until a backward pass has been seen.
        total: `[c]` sum of g over the steps, in the accumulation dtype.
        total_squares: `[c]` sum of g^2.
        steps: how many steps those are.
    """

    candidates: Tensor | None
    total: Tensor | None
    total_squares: Tensor | None
    steps: int
    _pending: Tensor | None
    _probes: Tensor | None

    def __init__(self, layer: SparseDeltaLinear) -> None:
        self.layer = layer
        count = layer.num_deltas
        self._probed = torch.arange(0, count, max(1, -(-count // PROBES)), device=layer.indices.device)
        self._forget()

    def _forget(self) -> None:
        self.candidates = self.total = self.total_squares = None
        self.steps = 0
        self.discard()

    def open(self) -> None:
        """Begins to watch the layer."""
        self._forget()
        self.layer.gradient_observer = self.observe

    def close(self) -> None:
        """Ends watching it, and forgets what was seen."""
        self.layer.gradient_observer = None
        self._forget()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def observe(self, grad_out: Tensor, x: Tensor) -> None:
        """Takes a backward pass in: dy `[M, N]`, x `[M, K]`."""
        product = backends.kernel("sampled_product", x.device.type, x.dtype)
        gradient = product(grad_out, x, self.layer.indices[self._probed], self.layer.values.dtype)
        self._probes = gradient if self._probes is None else self._probes.add_(gradient)
        if self.candidates is None:
            self._choose(grad_out, x)
        if self.candidates is not None:
            gradient = product(grad_out, x, self.candidates, self._dtype())
            self._pending = gradient if self._pending is None else self._pending.add_(gradient)

    def _choose(self, grad_out: Tensor, x: Tensor) -> None:
        indices = self.layer.indices
        count = min(indices.numel(), self.layer.weight.numel() - indices.numel())
        chosen = torch.full((count,), -1, dtype=torch.int64, device=indices.device)
        # Not in a pass that overflowed, whose step a gradient scaler leaves out, nor in one with nothing to choose by.
        if ranks.is_first() and _tells(grad_out) and _tells(x):
            chosen.copy_(ops.gradient_topk(grad_out, x, count, exclude=indices)[0])
        ranks.from_first(chosen)
        if bool((chosen >= 0).all()):
            self.candidates = chosen.to(indices.dtype)

    def probes(self) -> tuple[Tensor, Tensor]:
        """A few gradients of entries that train: as backward made them, and as the optimizer has got them."""
        got = self.layer.values.grad
        seen = self._probes
        zeros = torch.zeros(self._probed.numel(), device=self._probed.device, dtype=self.layer.values.dtype)
        return zeros if seen is None else seen, zeros if got is None else got.detach()[self._probed]

    def commit(self, scale: float) -> None:
        """Counts what has come since the last commit as the gradient of one step, times `scale`."""
        pending, candidates = self._pending, self.candidates
        self.discard()
        if candidates is None:
            return
        if pending is None:  # the layer has not been used in this step
            pending = torch.zeros(candidates.shape, device=candidates.device, dtype=self._dtype())
        gradient = ranks.average(pending).mul_(scale)
        self.total = gradient.clone() if self.total is None else self.total.add_(gradient)
        squares = gradient.square_()
        self.total_squares = squares if self.total_squares is None else self.total_squares.add_(squares)
        self.steps += 1

    def discard(self) -> None:
        """Forgets what has come since the last commit, but for the candidates."""
        self._pending = self._probes = None

    def _dtype(self) -> torch.dtype:
        return accumulation_dtype(self.layer.values.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What has been counted so far; empty before the first commit."""
        if self.candidates is None or self.total is None or self.total_squares is None:
            return {}
        return {"candidates": self.candidates, "total": self.total, "total_squares": self.total_squares}

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Continues from `tensors`."""
        device = self.layer.indices.device
        copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        self.candidates, self.total, self.total_squares = (
            copies.get(name) for name in ("candidates", "total", "total_squares")
        )
        self.steps = steps
        self.discard()


def _tells(factor: Tensor) -> bool:
    """Whether a factor of the gradient is finite, and is not zero everywhere."""
    if factor.numel() == 0:
        return False
    extremes = torch.stack(factor.aminmax())
    return bool(extremes.isfinite().all() & extremes.any())


def gradient_scale(windows: list[Window]) -> float:
    """What the gradients were multiplied by between backward and the optimizer: by clipping, by a loss scaler.

    Found on a few entries of each layer that train, for which both are known: the least-squares ratio.
    """
    pairs = [window.probes() for window in windows]
    if not pairs:
        return 1.0
    device = pairs[0][0].device
    seen, got = (torch.cat([pair[side].to(device, torch.float64) for pair in pairs]) for side in (0, 1))
    ranks.average(seen)
    square, product = (float(number) for number in torch.stack((seen @ seen, seen @ got)))
    scale = product / square if square > 0.0 else 1.0
    return 1.0 if abs(scale - 1.0) <= _ROUNDING else scale
