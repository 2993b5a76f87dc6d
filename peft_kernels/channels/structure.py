"""The coupled structures of a transformer: which layers make the channels that another one consumes.

Attention makes heads: `o(softmax(q k^T) v)`; head h is `head_dim` consecutive output channels of q and input channels
of o, and shares the k and v of key-value head `h // group_size`. An MLP makes channels: `down(act(gate(x)) * up(x))`,
or `down(act(up(x)))`. A *role* is a layer's part in this, or a part of a fused layer's: q, k, v, o, gate, up, down.

Blocks are known by the names of the layers in them, by their shapes, and by nothing in between that would not fit;
no class is. `confirm_structure` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .blocks import NotUnderstood, attention_in, mlp_in
from .layers import type_name
from .units import ROLES, Attention, Mlp, Units


@dataclass(frozen=True)
class Structure:
    """What `find_structure` found.

    Attributes:
        attentions: the attention blocks, in the model's order.
        mlps: the MLPs, in the model's order.
        not_understood: blocks that look like either and are neither, and layers outside of both, each with the reason.
    """

    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    not_understood: tuple[NotUnderstood, ...]

    @property
    def blocks(self) -> tuple[Attention | Mlp, ...]:
        """Attention blocks, then MLPs."""
        return self.attentions + self.mlps

    def units(self, role: str) -> tuple[Units, ...]:
        """Where the heads, or channels, of a role lie: one entry per block that has the role, in the model's order."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        found = (block.units(role) for block in self.blocks)
        return tuple(units for units in found if units is not None)

    def roles(self) -> dict[str, tuple[str, ...]]:
        """The roles of every layer in a block, by its path; a fused layer has several."""
        roles: dict[str, tuple[str, ...]] = {}
        for block in self.blocks:
            for role in ROLES:
                units = block.units(role)
                if units is not None:
                    roles[units.path] = (*roles.get(units.path, ()), role)
        return roles

    def __str__(self) -> str:
        head = f"Structure: {len(self.attentions)} attention blocks, {len(self.mlps)} MLPs"
        return "\n".join([head, *(f"  not understood: {item.path}: {item.reason}" for item in self.not_understood)])


def find_structure(model: nn.Module) -> Structure:
    """Finds the attention blocks and MLPs of a model; looks at names and shapes only, and runs nothing.

    Args:
        model: any module; of transformers' models Llama, Mistral, Qwen, Gemma, Phi, Phi-3, GPT-2 and whatever is built
            from the same parts.

    Returns:
        The blocks, and what was not understood with the reason. Nothing that has a weight matrix, embeddings aside, is
        left out of both.
    """
    attentions: list[Attention] = []
    mlps: list[Mlp] = []
    unclear: list[NotUnderstood] = []
    for path, module in model.named_modules():
        for found in (attention_in(path, module), mlp_in(path, module)):
            if isinstance(found, Attention):
                attentions.append(found)
            elif isinstance(found, Mlp):
                mlps.append(found)
            elif found is not None:
                unclear.append(found)
    structure = Structure(tuple(attentions), tuple(mlps), tuple(unclear))
    return Structure(structure.attentions, structure.mlps, (*unclear, *_outside(model, structure)))


def _outside(model: nn.Module, structure: Structure) -> Iterator[NotUnderstood]:
    """Modules with a weight matrix of their own that no block holds, understood or not."""
    inside = structure.roles()
    for path, module in model.named_modules():
        if path in inside or isinstance(module, nn.Embedding):
            continue
        if any(f"{path}.".startswith(f"{block.path}." if block.path else "") for block in structure.not_understood):
            continue
        if any(parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values()):
            yield NotUnderstood(path, f"a {type_name(module)} outside of attention blocks and MLPs")
