"""In which order to put a block's heads or channels, so that those which train come together.

An order is `[count]` int64: what comes to place i was at `order[i]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import sizes_of
from .units import ROLES, Attention, Mlp


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """How the heads of an attention block change places: groups as a whole, and query heads within their group.

    Attributes:
        key_value: `[key_value_heads]` the order of the groups.
        query: `[heads]` the order of the query heads; heads of one group stay together.
    """

    key_value: Tensor
    query: Tensor


def order_of(chosen: Sequence[Tensor]) -> Tensor:
    """An order of elements that are chosen by several sets.

    Nested sets all come to the front; two sets that are not, side by side with what they share in between. More than
    two that are not nested cannot all be consecutive, in general; those that most sets have then come first.

    Args:
        chosen: masks `[count]`, one per set.
    """
    distinct: list[Tensor] = []
    for mask in chosen:
        if bool(mask.any()) and not any(torch.equal(mask, other) for other in distinct):
            distinct.append(mask)
    if len(distinct) == 2 and not _nested(*distinct):
        first, second = distinct
        rank = torch.where(first, torch.where(second, 1, 0), torch.where(second, 2, 3))
    else:
        rank = -torch.stack([*distinct, torch.zeros_like(chosen[0])]).long().sum(0)
    return rank.sort(stable=True).indices


def head_order(query: Sequence[Tensor], key_value: Sequence[Tensor], group_size: int) -> HeadOrder:
    """An order of heads that keeps each query head with its key-value head.

    Where all sets hold whole groups, groups are ordered like channels. Where query heads are chosen within groups, the
    groups that are chosen in part are put in pairs, chosen heads towards each other, with those chosen in full between
    the first two: as few runs as can be.

    Args:
        query: masks `[heads]` of the query heads that a role chooses.
        key_value: masks `[key_value_heads]`, likewise.
        group_size: query heads per key-value head.
    """
    grouped = [mask.view(-1, group_size) for mask in query]
    if all(torch.equal(mask.any(1), mask.all(1)) for mask in grouped):
        order = order_of([*(mask.any(1) for mask in grouped), *key_value])
        return HeadOrder(order, (order[:, None] * group_size + torch.arange(group_size)).flatten())
    weight = torch.stack(grouped).long().sum(0)  # [groups, group_size]: how many sets have this head
    count = (weight > 0).sum(1)
    membership = torch.stack([torch.zeros_like(count), *(mask.long() for mask in key_value)]).sum(0)
    groups: list[int] = []
    flipped: list[bool] = []
    for level in membership.unique().flip(0).tolist():
        of_level = (membership == level).nonzero().flatten().tolist()
        ordered, towards_end = _paired(of_level, count, group_size)
        groups += ordered
        flipped += towards_end
    heads = []
    for group, last in zip(groups, flipped, strict=True):
        rank = weight[group] if last else -weight[group]
        heads.append(group * group_size + rank.sort(stable=True).indices)
    return HeadOrder(torch.tensor(groups), torch.cat(heads))


def _paired(groups: list[int], count: Tensor, group_size: int) -> tuple[list[int], list[bool]]:
    """An order of these groups, and of each whether its chosen heads come last."""
    counts = {group: int(count[group]) for group in groups}
    full = [group for group in groups if counts[group] == group_size]
    partial = sorted((group for group in groups if 0 < counts[group] < group_size), key=lambda group: -counts[group])
    none = [group for group in groups if counts[group] == 0]
    if len(partial) < 2:
        return [*full, *partial, *none], [False] * len(groups)
    ends = [place % 2 == 0 and place + 1 < len(partial) for place in range(len(partial))]
    ordered = [partial[0], *full, *partial[1:], *none]
    return ordered, [ends[0], *[False] * len(full), *ends[1:], *[False] * len(none)]


def _nested(first: Tensor, second: Tensor) -> bool:
    both = first & second
    return torch.equal(both, first) or torch.equal(both, second)


@dataclass(frozen=True, eq=False)
class LayerOrder:
    """How one layer's channels change places, in or out; what comes to place i was at `order[i]`.

    Attributes:
        rows: `[N]` int64, of the output channels, weight and bias; None where they stay.
        columns: `[K]` int64, of the input channels; None where they stay.
    """

    rows: Tensor | None
    columns: Tensor | None

    def inverse(self) -> LayerOrder:
        """The order that undoes this one."""
        return LayerOrder(*(None if order is None else order.argsort() for order in (self.rows, self.columns)))


def layer_orders(model: nn.Module, block: Attention | Mlp, order: Tensor | HeadOrder) -> dict[str, LayerOrder]:
    """How the layers of a block move, by path, when its heads or channels take an order."""
    orders: dict[str, LayerOrder] = {}
    for units in map(block.units, ROLES):
        if units is None:
            continue
        if isinstance(order, HeadOrder):
            numbers = order.query if units.role in ("q", "o") else order.key_value
        else:
            numbers = order
        channels = units.first + (numbers[:, None] * units.width + torch.arange(units.width)).flatten()
        if units.dim == "input":
            orders[units.path] = LayerOrder(None, channels)
            continue
        earlier = orders.get(units.path)
        size = sizes_of(model.get_submodule(units.path))[0]
        rows = torch.arange(size) if earlier is None or earlier.rows is None else earlier.rows
        after = units.first + channels.numel()
        orders[units.path] = LayerOrder(torch.cat((rows[: units.first], channels, rows[after:])), None)
    return orders
