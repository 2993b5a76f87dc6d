"""Asks a model whether its blocks compute what their names promise, by three passes over a few positions.

In them, each layer that makes channels makes random numbers instead. Where the values are the same at every position,
attention returns just those, whatever it attends to: the input of o must be the values, each once for every query head
of its group. The input of down must depend on each channel's own numbers only, and be proportional to those of up where
there is a gate. And when heads and channels change places, as in a co-permutation, what is consumed must change places
with them and not otherwise: nothing goes by their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import NotUnderstood
from .orders import HeadOrder, LayerOrder, layer_orders
from .state import borrowed
from .structure import Structure, find_structure
from .units import Attention, Mlp, Span

_TOLERANCE = 16.0
"""Units in the last place that rounding may take: of the dtype, and at least of float32, to which softmax rounds."""


def confirm_structure(model: nn.Module, inputs: Mapping[str, Any], structure: Structure | None = None) -> Structure:
    """The structure of a model as far as the model agrees with it.

    This finds what names and shapes cannot tell: fused layers that interleave their parts, gates and sinks behind
    attention, norms between the layers of an MLP, keys and values taken from another layer, parameters and biases that
    belong to single heads.

    Args:
        model: as for `find_structure`. It runs three times, in evaluation mode, and is left as it was.
        inputs: a batch of two positions or more, as keyword arguments, such as `{"input_ids": torch.tensor([[1, 2]])}`.
        structure: what to confirm; None means `find_structure(model)`.

    Returns:
        The structure; blocks that do not compute what their names promise are moved to `not_understood`, and those
        whose heads or channels cannot change places have that as their obstacle.

    Raises:
        ValueError: inputs has less than two positions.
    """
    structure = find_structure(model) if structure is None else structure
    generator = torch.Generator().manual_seed(0)
    values = {block.value.path: block.value for block in structure.attentions}

    def random(path: str, output: Tensor) -> Tensor:
        return torch.randn(output.shape, generator=generator).to(output)

    def constant(path: str, output: Tensor) -> Tensor:
        numbers = random(path, output)
        if path in values:
            part = _part(numbers, values[path])
            part.copy_(part.flatten(0, -2)[0].expand_as(part).clone())
        return numbers

    seen = _observe(model, inputs, structure, constant)
    orders = _rolled(model, structure)
    before = _observe(model, inputs, structure, random)

    def moved(path: str, output: Tensor) -> Tensor:
        rows = orders[path].rows
        return before[path].detach() if rows is None else before[path].detach()[..., rows.to(output.device)]

    after = _observe(model, inputs, structure, moved)
    unclear = list(structure.not_understood)
    kept: list[Attention | Mlp] = []
    for block in structure.blocks:
        reason = _contradiction(block, seen)
        if reason is not None:
            unclear.append(NotUnderstood(block.path, reason))
            continue
        columns = orders[block.output].columns
        if block.obstacle is None and columns is not None:
            given, expected = after[block.output], before[block.output]
            if not _close(given, expected.index_select(-1, columns.to(expected.device))):
                what = "heads" if isinstance(block, Attention) else "channels"
                block = replace(block, obstacle=f"what {block.output} gets belongs to {what} by their numbers")
        kept.append(block)
    return replace(
        structure,
        attentions=tuple(block for block in kept if isinstance(block, Attention)),
        mlps=tuple(block for block in kept if isinstance(block, Mlp)),
        not_understood=tuple(unclear),
    )


def _rolled(model: nn.Module, structure: Structure) -> dict[str, LayerOrder]:
    """Orders of every layer in which each head, group and channel that can move has moved by one."""
    orders: dict[str, LayerOrder] = {}
    for block in structure.blocks:
        if isinstance(block, Mlp):
            orders.update(layer_orders(model, block, torch.arange(block.channels).roll(1)))
        else:
            groups = torch.arange(block.key_value_heads).roll(1)
            heads = groups[:, None] * block.group_size + torch.arange(block.group_size).roll(1)
            orders.update(layer_orders(model, block, HeadOrder(groups, heads.flatten())))
    return orders


def _observe(
    model: nn.Module, inputs: Mapping[str, Any], structure: Structure, invent: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What the layers that make channels were made to return, and what those that consume them were given, by path."""
    seen: dict[str, Tensor] = {}

    def make(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if output.numel() < 2 * output.shape[-1]:
                raise ValueError(f"inputs must hold at least two positions, but {path} got {list(output.shape[:-1])}")
            seen[path] = invent(path, output.detach()).requires_grad_()
            return seen[path]

        return hook

    def cut(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen[path] = args[0]
            return (args[0].detach(), *args[1:])

        return hook

    with ExitStack() as stack:
        stack.enter_context(borrowed(model))
        stack.enter_context(torch.enable_grad())
        for block in structure.blocks:
            for path in dict.fromkeys(span.path for span in block.inputs):
                stack.callback(model.get_submodule(path).register_forward_hook(make(path)).remove)
            stack.callback(model.get_submodule(block.output).register_forward_pre_hook(cut(block.output)).remove)
        model(**inputs)
    return seen


def _contradiction(block: Attention | Mlp, seen: dict[str, Tensor]) -> str | None:
    """In what a block does not compute what its names promise; None when it does."""
    paths = [*(span.path for span in block.inputs), block.output]
    idle = next((path for path in paths if path not in seen), None)
    if idle is not None:
        return f"{idle} was not called"
    if isinstance(block, Mlp):
        return _mlp_contradiction(block, seen)
    values = _part(seen[block.value.path].detach(), block.value).flatten(0, -2)[0]
    expected = values.view(block.key_value_heads, block.head_dim).repeat_interleave(block.group_size, 0).flatten()
    given = seen[block.output].detach().flatten(0, -2)
    if given.shape[-1] != expected.shape[-1] or not _close(given, expected.expand_as(given)):
        return f"{block.output} does not get means of the values of {block.value.path}"
    return None


def _mlp_contradiction(block: Mlp, seen: dict[str, Tensor]) -> str | None:
    hidden = seen[block.output]
    paths = list(dict.fromkeys(span.path for span in block.inputs))
    if not hidden.requires_grad or hidden.shape[-1] != block.channels:
        return f"{block.output} does not get what {' and '.join(paths)} make"
    made = [seen[path] for path in paths]
    every_other = torch.arange(block.channels, device=hidden.device) % 2
    gradients = torch.autograd.grad((hidden * every_other).sum(), made, retain_graph=True, allow_unused=True)
    by_path = dict(zip(paths, gradients, strict=True))
    for span in block.inputs:
        gradient = by_path[span.path]
        if gradient is None or (block.channels > 1 and not bool(_part(gradient, span).any())):
            return f"{block.output} does not depend on {span.path}"
        if bool((_part(gradient, span) * (1 - every_other)).any()):
            return f"the channels of {block.output} depend on more than one of {span.path}"
    if block.gate is not None:
        slope = torch.autograd.grad(hidden.sum(), seen[block.up.path])[0]
        product = _part(slope, block.up) * _part(seen[block.up.path].detach(), block.up)
        if not _close(product.reshape(hidden.shape), hidden.detach()):
            return f"{block.output} does not get the product of {block.up.path} and a gate"
    return None


def _part(tensor: Tensor, span: Span) -> Tensor:
    return tensor[..., span.first : span.first + span.channels]


def _close(actual: Tensor, expected: Tensor) -> bool:
    unit = max(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps)
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    return bool(((actual - expected).abs() <= _TOLERANCE * unit * scale).all())
