"""What calibration batches say of heads and channels: how large their activations are, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import is_transposed
from .layers import squared_norms
from .state import borrowed
from .structure import Structure, find_structure
from .units import ROLES, Dim

_MASK = "attention_mask"


def collect_activations(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], structure: Structure | None = None
) -> dict[str, Tensor]:
    """Sums of the squared activations of every channel that an attention block or MLP makes, over all tokens.

    One batch is held at a time. Tokens whose `attention_mask` is 0 do not count.

    Args:
        model: a decoder of `find_structure`'s kind. It runs in evaluation mode, and is left as it was.
        batches: keyword arguments of the model; tensors are moved to the device of its first parameter. An
            `attention_mask` is `[batch, length]`, 1 for tokens and 0 for padding.
        structure: of the model; None means `find_structure(model)`.

    Returns:
        By the path of each layer that consumes channels (o or down), `[K]` float64 on the CPU: the sum of `x[m, k]^2`
        over the tokens m.

    Raises:
        ValueError: no batch, no token, a mask that does not fit the activations, or a layer that no batch reaches.
    """
    structure = find_structure(model) if structure is None else structure
    totals: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def accumulate(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            rows = x.reshape(-1, x.shape[-1])
            if mask is not None:
                rows = rows[_rows_of(mask, rows.shape[0], path)]
            sums = squared_norms(rows, "input")
            totals[path] = totals[path] + sums if path in totals else sums

        return hook

    with ExitStack() as stack:
        stack.enter_context(borrowed(model))
        stack.enter_context(torch.no_grad())
        for block in structure.blocks:
            hook = accumulate(block.output)
            stack.callback(model.get_submodule(block.output).register_forward_pre_hook(hook).remove)
        tokens = batch_count = 0
        for batch in _on_device(model, batches):
            mask = _mask_of(model, batch)
            tokens += int(mask.sum()) if mask is not None else 1
            batch_count += 1
            model(**batch)
    if not batch_count or not tokens:
        raise ValueError(f"batches must hold at least one token, got {batch_count} batches and none")
    return _in_order(totals, [block.output for block in structure.blocks])


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    structure: Structure | None = None,
    *,
    roles: Iterable[str] | None = None,
    loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Sums over the batches of the squared gradient norm of every channel's part of the weight.

    One batch is held at a time, and of the weights' gradients one layer's: each is dropped as soon as it is counted.

    Args:
        model: as for `collect_activations`. It runs in evaluation mode, so without dropout; training flags,
            `requires_grad` and gradients are left as they were.
        batches: as for `collect_activations`; with labels, unless `loss` is given. A model that computes its loss from
            labels leaves padding out by their value, -100.
        structure: of the model; None means `find_structure(model)`.
        roles: which roles' layers to look at; None means all.
        loss: a scalar from the model's output and the batch; None takes the output's `loss`.

    Returns:
        By the path of each layer, float64 on the CPU: for o and down `[K]`, of each input channel k the sum of
        `||dW[:, k]||^2`; for the others `[N]`, of each output channel n the sum of `||dW[n, :]||^2`.

    Raises:
        ValueError: no batch, an unknown role, no loss, one that is not a finite scalar, or a layer that the loss does
            not depend on.
    """
    structure = find_structure(model) if structure is None else structure
    wanted: dict[str, Dim] = {}
    for role in ROLES if roles is None else roles:
        wanted.update({units.path: units.dim for units in structure.units(role)})
    totals: dict[str, Tensor] = {}

    def accumulate(path: str, layer: nn.Module, dim: Dim) -> Any:
        transposed = is_transposed(layer)

        def hook(weight: Tensor) -> None:
            gradient = weight.grad
            weight.grad = None
            if gradient is not None:
                sums = squared_norms(gradient.t() if transposed else gradient, dim)
                totals[path] = totals[path] + sums if path in totals else sums

        return hook

    with ExitStack() as stack:
        stack.enter_context(borrowed(model, [f"{path}.weight" for path in wanted]))
        stack.enter_context(torch.enable_grad())
        for path, dim in wanted.items():
            layer = model.get_submodule(path)
            weight = layer.get_parameter("weight")
            stack.callback(weight.register_post_accumulate_grad_hook(accumulate(path, layer, dim)).remove)
        batch_count = 0
        for batch in _on_device(model, batches):
            batch_count += 1
            _loss(model(**batch), batch, loss).backward()  # type: ignore[no-untyped-call]
    if not batch_count:
        raise ValueError("batches must hold at least one batch, got none")
    return _in_order(totals, list(wanted))


def _on_device(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"batches must hold mappings of the model's arguments, got a {type(batch).__name__}")
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _mask_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The batch's mask `[batch length]` as booleans, or None without one."""
    mask = batch.get(_MASK)
    if mask is None:
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{_MASK} of an encoder-decoder model is the encoder's; give batches without padding")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{_MASK} must be a tensor [batch, length], got {shape}")
    return mask.flatten() != 0


def _rows_of(mask: Tensor, rows: int, path: str) -> Tensor:
    if mask.numel() != rows:
        raise ValueError(f"{_MASK} has {mask.numel()} positions, but {path} gets {rows}")
    return mask


def _loss(output: Any, batch: Mapping[str, Any], loss: Callable[[Any, Mapping[str, Any]], Tensor] | None) -> Tensor:
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if value is None:
        raise ValueError("the model returned no loss; batches must hold labels, or give loss=")
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite().all()):
        shown = value if not isinstance(value, Tensor) or value.numel() == 1 else list(value.shape)
        raise ValueError(f"loss must be a finite scalar, got {shown}")
    return value.reshape(())


def _in_order(totals: dict[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    missing = [path for path in paths if path not in totals]
    if missing:
        raise ValueError(f"no batch reaches {', '.join(missing[:5])}" + (", ..." if len(missing) > 5 else ""))
    return {path: totals[path] for path in paths}
