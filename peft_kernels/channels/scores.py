"""How large each unit of a block is, by its weights, activations or gradients: sums of squares, all in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .layers import sizes_of, squared_norms, weight_of
from .units import Attention, Mlp, Units


def block_scores(
    model: nn.Module,
    block: Attention | Mlp,
    units: Sequence[Units],
    selection: str,
    activations: Mapping[str, Tensor] | None,
    gradients: Mapping[str, Tensor] | None,
) -> Tensor:
    """The squared score of every unit of a block, `[count]` float64, summed over roles whose units are chosen together.

    Args:
        model: holds the weights.
        block: whose units.
        units: of each role, with one `count`.
        selection: "weight" is `||W_u||^2`, Frobenius over the unit's rows or columns; "activation" the sum of squares
            of the unit's channels over the calibration tokens; "weight_activation" their product; "gradient" is
            `||dW_u||^2`, summed over the batches.
        activations: of `collect_activations`, for the second and third.
        gradients: of `collect_gradients`, for the last.

    Raises:
        ValueError: a statistic is missing, has another length, or is not finite.
    """
    count = units[0].count
    if selection == "gradient":
        squares = []
        for of in units:
            size = sizes_of(model.get_submodule(of.path))[0 if of.dim == "output" else 1]
            squares.append(_statistic(gradients, "gradients", of.path, size))
        scores = _summed(squares, units)
    elif selection == "activation":
        scores = _activation(block, count, activations)
    else:
        squares = [squared_norms(weight_of(model.get_submodule(of.path)), of.dim) for of in units]
        scores = _summed(squares, units)
        if selection == "weight_activation":
            scores = scores * _activation(block, count, activations)
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the {selection} scores of {units[0].path} must be finite, got NaN or infinity")
    return scores


def _activation(block: Attention | Mlp, count: int, activations: Mapping[str, Tensor] | None) -> Tensor:
    """Of what the block's last layer consumes, in as many equal parts as there are units."""
    size = block.channels if isinstance(block, Mlp) else block.heads * block.head_dim
    return _statistic(activations, "activations", block.output, size).view(count, -1).sum(1)


def _summed(squares: list[Tensor], units: Sequence[Units]) -> Tensor:
    """Sums over the channels of each unit, and over the roles."""
    parts = [
        channels[of.first : of.first + of.count * of.width].view(of.count, of.width).sum(1)
        for channels, of in zip(squares, units, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _statistic(statistics: Mapping[str, Tensor] | None, name: str, path: str, size: int) -> Tensor:
    if statistics is None or path not in statistics:
        raise ValueError(f"{name} must hold {path}, as collect_{name} returns them")
    channels = statistics[path]
    if tuple(channels.shape) != (size,):
        raise ValueError(f"{name} must hold {path} as [{size}], got {list(channels.shape)}")
    return channels.detach().to("cpu", torch.float64)
