"""Co-permutation: the channels that train are brought together, and the model computes the same function.

Where hidden channels change places, the rows of the layers that make them and the columns of the layer that consumes
them move alike, so every product in between stays what it was; sums over channels are taken in another order only.
Heads move as a whole, so rotary embeddings and norms within a head do not notice, and each query head keeps its
key-value head.

Source: Yang et al., "S2FT", NeurIPS 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..nn.linear import is_transposed
from .layers import layer_obstacle, shared_parameters, sizes_of
from .orders import LayerOrder, head_order, layer_orders, order_of
from .slices import Slice
from .structure import Structure, find_structure
from .units import ROLES, Attention, Mlp, Units


class Permutation:
    """What `co_permute` did, to be undone.

    Attributes:
        slices: the channels that train, where they are now; of the same layers as before.
        orders: by path, how each layer's channels have moved.
        active: whether it has not been undone yet.
    """

    def __init__(self, slices: dict[str, Slice], orders: dict[str, LayerOrder]) -> None:
        self.slices = slices
        self.orders = orders
        self.active = True

    @property
    def contiguous(self) -> bool:
        """Whether every slice is a range."""
        return all(part.contiguous for part in self.slices.values())

    def check(self, model: nn.Module, adapted: Collection[str] = ()) -> None:
        """Raises ValueError, as `undo` would, where it cannot be undone in this model.

        Args:
            model: as for `undo`.
            adapted: paths of layers that have an adapter now, which will be taken off.
        """
        if not self.active:
            raise ValueError("the permutation has been undone already")
        for path, order in self.orders.items():
            if path not in adapted:
                _check_layer(model, path, order)

    def undo(self, model: nn.Module) -> None:
        """Puts every channel back in its place, in place; bits are moved and not changed, trained ones neither.

        Args:
            model: the one that was permuted, with its plain layers: adapters have to be taken off first.

        Raises:
            ValueError: it has been undone already, or a layer is missing, not plain or of another size. Nothing has
                changed then.
        """
        self.check(model)
        _apply(model, {path: order.inverse() for path, order in self.orders.items()})
        self.active = False


@torch.no_grad()
def co_permute(model: nn.Module, slices: Mapping[str, Slice], structure: Structure | None = None) -> Permutation:
    """Moves heads and channels, in place, so that those which train come first and are consecutive.

    Every slice becomes a range where that is possible: in MLPs, when the slices of a block are equal or nested, or are
    two; in attention, when they are so and hold whole groups of heads. `select(coupled=True)` chooses such slices.
    Otherwise channels come as close together as the structure allows, and the new indices say where. Heads move as a
    whole, so channels chosen from within a head keep their places in it.

    Weights move as bits, with their gradients where they have any; what an optimizer holds does not move, so permute
    before it is made.

    Args:
        model: as for `find_structure`, with plain linear layers.
        slices: by path, of `select` for instance; blocks without any stay as they are.
        structure: of the model; None means `find_structure(model)`. A `confirm_structure` has been tried out.

    Returns:
        The new slices, and the way back.

    Raises:
        ValueError: a path is in no block that is understood, a slice has the wrong dim or an index out of range, or a
            block's heads or channels cannot change places: something goes by their numbers, or a weight is tied,
            or is not in memory. Nothing has changed then.
    """
    structure = find_structure(model) if structure is None else structure
    _check_slices(model, slices, structure)
    orders: dict[str, LayerOrder] = {}
    refused: list[str] = []
    for block in structure.blocks:
        if not any(path in slices and slices[path].indices.numel() for path in _paths(block)):
            continue
        if block.obstacle is not None:
            refused.append(block.obstacle)
        orders.update(_block_orders(model, block, slices))
    shared = shared_parameters(model, orders)
    refused += [f"{name} is tied to {other}" for name, other in shared.items()]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ValueError(f"heads or channels cannot change places: {'; '.join(refused[:3])}{more}")
    for path, order in orders.items():
        _check_layer(model, path, order)
    moved = {path: _moved(part, orders.get(path)) for path, part in slices.items()}
    _apply(model, orders)
    return Permutation(moved, orders)


def _paths(block: Attention | Mlp) -> list[str]:
    return list(dict.fromkeys([*(span.path for span in block.inputs), block.output]))


def _check_slices(model: nn.Module, slices: Mapping[str, Slice], structure: Structure) -> None:
    known = {units.path: units.dim for role in ROLES for units in structure.units(role)}
    for path, part in slices.items():
        if path not in known:
            reasons = [item.reason for item in structure.not_understood if f"{path}.".startswith(f"{item.path}.")]
            raise ValueError(
                f"slices must name layers of attention blocks or MLPs, but {path!r} is none"
                + (f": {reasons[0]}" if reasons else "")
            )
        if part.dim != known[path]:
            raise ValueError(f"slices[{path!r}] must have dim={known[path]!r}, got {part.dim!r}")
        size = sizes_of(model.get_submodule(path))[0 if part.dim == "output" else 1]
        if part.indices.numel() and int(part.indices[-1]) >= size:
            raise ValueError(f"slices[{path!r}] must have indices below {size}, got {int(part.indices[-1])}")


def _block_orders(model: nn.Module, block: Attention | Mlp, slices: Mapping[str, Slice]) -> dict[str, LayerOrder]:
    """How each layer of a block moves."""
    masks = {units.role: _chosen(units, slices) for role in ROLES if (units := block.units(role)) is not None}
    if isinstance(block, Mlp):
        return layer_orders(model, block, order_of(list(masks.values())))
    heads = head_order([masks["q"], masks["o"]], [masks["k"], masks["v"]], block.group_size)
    return layer_orders(model, block, heads)


def _chosen(units: Units, slices: Mapping[str, Slice]) -> Tensor:
    """`[count]`: which units have a channel in the slice of their layer."""
    mask = torch.zeros(units.count, dtype=torch.bool)
    if units.path in slices:
        numbers = (slices[units.path].indices - units.first).div(units.width, rounding_mode="floor")
        mask[numbers[(numbers >= 0) & (numbers < units.count)]] = True
    return mask


def _moved(part: Slice, order: LayerOrder | None) -> Slice:
    """The same channels where they will be."""
    channels = None if order is None else order.rows if part.dim == "output" else order.columns
    if channels is None:
        return part
    return Slice(channels.argsort()[part.indices].sort().values, part.dim)


def _check_layer(model: nn.Module, path: str, order: LayerOrder) -> None:
    """Raises unless the layer can be permuted in place."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model has no layer {path}") from None
    reason = layer_obstacle(layer)
    if reason is None:
        weight = layer.get_parameter("weight")
        if weight.is_meta:
            reason = "its weight is on the meta device, where nothing can be moved"
        elif weight.is_inference():
            reason = "its weight was made in inference mode and cannot be changed"
        elif any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
            reason = "its weight repeats the same memory"
        else:
            for axis, channels in enumerate((order.rows, order.columns)):
                if channels is not None and channels.numel() != sizes_of(layer)[axis]:
                    reason = f"its weight is {list(sizes_of(layer))}, but {channels.numel()} channels were permuted"
    if reason is not None:
        raise ValueError(f"{path} cannot be permuted: {reason}")


@torch.no_grad()
def _apply(model: nn.Module, orders: Mapping[str, LayerOrder]) -> None:
    """Permutes each layer; when one fails, for want of memory, those before it are put back."""
    done: list[tuple[nn.Module, LayerOrder]] = []
    try:
        for path, order in orders.items():
            layer = model.get_submodule(path)
            _permute(layer, order)
            done.append((layer, order))
    except BaseException:
        for layer, order in done:
            _permute(layer, order.inverse())
        raise


def _permute(layer: nn.Module, order: LayerOrder) -> None:
    transposed = is_transposed(layer)
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    moves: list[tuple[Tensor, Tensor]] = []
    for matrix in (weight.detach(), weight.grad):
        for axis, channels in ((0, order.rows), (1, order.columns)):
            if matrix is not None and channels is not None:
                moves.append(
                    (matrix, matrix.index_select(1 - axis if transposed else axis, channels.to(matrix.device)))
                )
    for vector in (bias.detach(), bias.grad) if bias is not None else ():
        if vector is not None and order.rows is not None:
            moves.append((vector, vector[order.rows.to(vector.device)]))
    for tensor, moved in moves:  # only now, when there was memory for all of it
        tensor.copy_(moved)
