"""Attention blocks and MLPs, and where in which layer each of their heads or channels lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("up", "gate", "down")
ROLES = ATTENTION_ROLES + MLP_ROLES

Dim = Literal["input", "output"]


@dataclass(frozen=True)
class Span:
    """Consecutive output channels of a layer: all of them, or a part of a fused layer's.

    Attributes:
        path: of the layer.
        first: the first of the channels.
        channels: how many they are.
    """

    path: str
    first: int
    channels: int


@dataclass(frozen=True)
class Units:
    """The units of one role in one block: what is chosen or moved as a whole, a head or a channel.

    Unit u is the channels `first + u width` to `first + (u + 1) width - 1` of the layer.

    Attributes:
        role: q, k, v, o, up, gate or down.
        block: path of the block.
        path: path of the layer.
        dim: "input" for the columns of W `[N, K]`, "output" for its rows.
        first: the first channel of the first unit.
        count: how many units.
        width: channels of a unit.
    """

    role: str
    block: str
    path: str
    dim: Dim
    first: int
    count: int
    width: int


@dataclass(frozen=True)
class Attention:
    """An attention block.

    Attributes:
        path: where it sits in the model.
        query: the channels `[heads head_dim]` that are queries.
        key: the channels `[key_value_heads head_dim]` that are keys.
        value: the channels `[key_value_heads head_dim]` that are values.
        output: path of the layer that consumes the heads.
        heads: number of query heads.
        key_value_heads: number of key-value heads; `heads` is a multiple.
        head_dim: channels of a head.
        obstacle: why its heads cannot change places; None when they can.
    """

    path: str
    query: Span
    key: Span
    value: Span
    output: str
    heads: int
    key_value_heads: int
    head_dim: int
    obstacle: str | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.key_value_heads

    @property
    def inputs(self) -> tuple[Span, ...]:
        """What makes the heads."""
        return self.query, self.key, self.value

    def units(self, role: str, groups: bool = False) -> Units | None:
        """The heads of a role: query heads of q and o, key-value heads of k and v; None for a role of an MLP.

        Args:
            role: one of ROLES.
            groups: True takes all query heads of a key-value head as one unit.
        """
        if role not in ATTENTION_ROLES:
            return None
        count, width = self.heads, self.head_dim
        if groups:
            count, width = self.key_value_heads, self.head_dim * self.group_size
        if role == "o":
            return Units(role, self.path, self.output, "input", 0, count, width)
        if role == "q":
            return Units(role, self.path, self.query.path, "output", self.query.first, count, width)
        span = self.key if role == "k" else self.value
        return Units(role, self.path, span.path, "output", span.first, self.key_value_heads, self.head_dim)


@dataclass(frozen=True)
class Mlp:
    """An MLP.

    Attributes:
        path: the module that its layers are in.
        gate: the channels `[channels]` that go through the activation; None without a gate.
        up: the channels `[channels]` that the gate multiplies, or that go through the activation where there is none.
        output: path of the layer that consumes the channels.
        channels: how many there are, the intermediate size.
        obstacle: why its channels cannot change places; None when they can.
    """

    path: str
    gate: Span | None
    up: Span
    output: str
    channels: int
    obstacle: str | None = None

    @property
    def inputs(self) -> tuple[Span, ...]:
        """What makes the channels."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def units(self, role: str, groups: bool = False) -> Units | None:
        """The channels of a role; None for a role that it does not have. `groups` does not matter."""
        if role == "down":
            return Units(role, self.path, self.output, "input", 0, self.channels, 1)
        span = {"up": self.up, "gate": self.gate}.get(role)
        return None if span is None else Units(role, self.path, span.path, "output", span.first, self.channels, 1)
