"""Which heads and channels train: drawn at random, or those with the largest or smallest scores.

Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024,
section 3: the choice is made over all layers together, so that the layers' counts differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from .scores import block_scores
from .slices import Slice
from .structure import Structure, find_structure
from .units import ATTENTION_ROLES, MLP_ROLES, ROLES, Attention, Mlp, Units

SELECTIONS = ("random", "weight", "activation", "weight_activation", "gradient")
BUDGETS = ("global", "per_layer")


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select` chose.

    Attributes:
        slices: by path, the channels that train, in the model's order of blocks.
        left_out: paths of the layers that the ratios mean and in which no channel was chosen.
        chosen: by role, how many units were chosen and how many there are; a unit is a head, a channel, or all heads
            of a key-value head.
    """

    slices: dict[str, Slice]
    left_out: tuple[str, ...]
    chosen: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        counts = ", ".join(f"{role} {count} of {total}" for role, (count, total) in self.chosen.items())
        lines = [f"Selection: {counts}, in {len(self.slices)} layers"]
        return "\n".join(lines + [f"  none in {path}" for path in self.left_out])


def select(
    model: nn.Module,
    ratios: Mapping[str, float],
    *,
    selection: str = "random",
    largest: bool = True,
    seed: int | None = None,
    budget: str = "global",
    coupled: bool = False,
    layers: Collection[str] | None = None,
    taken: Iterable[Mapping[str, Slice]] = (),
    structure: Structure | None = None,
    activations: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> Selection:
    """Chooses whole heads for q, k, v and o, and channels for up, gate and down; the model is not changed.

    Of the units of a role, `floor(ratio * their number)` are chosen, at least one. Of equal scores the one in the
    earlier layer comes first, then the one of the smaller index. Scores of different layers are compared as they are.

    Args:
        model: as for `find_structure`.
        ratios: by role, the share to choose, in (0, 1].
        selection: "random"; or the norm of the unit's part of the "weight", of its "activation", their product
            "weight_activation", or of its "gradient". Units of q, k, v, up and gate have the activation of the head or
            channel that they make.
        largest: chooses the largest scores; False the smallest, which did best for activations in the paper. Does not
            matter to "random".
        seed: of "random", leaving torch's generators alone; None draws from torch's default CPU generator.
        budget: "global" counts over all layers together; "per_layer" in each by itself, at least one in each.
        coupled: True chooses q, k, v and o of a block from one ranking, and so up, gate and down: a role with a smaller
            ratio has a subset of another's units, and where both q or o and k or v are asked for, all heads of a
            key-value head are one unit. `co_permute` can then make every slice contiguous.
        layers: paths of the layers to choose in; None means all that have a role in `ratios`.
        taken: slices of other adapters, whose heads and channels are not chosen again: adapters that share none do not
            interfere when they are fused. Shares are of all units, those taken included.
        structure: of the model; None means `find_structure(model)`.
        activations: of `collect_activations`, for "activation" and "weight_activation".
        gradients: of `collect_gradients`, for "gradient".

    Returns:
        The channels by path, the layers without any, and the counts.

    Raises:
        ValueError: an argument is out of range, the model has no layer for a role, fewer units than wanted are not
            taken, or a statistic is missing, of another shape or not finite.
    """
    _check(ratios, selection, seed, budget)
    structure = find_structure(model) if structure is None else structure
    allowed = _allowed(structure, ratios, layers)
    if selection == "random" and seed is None:
        seed = int(torch.randint(2**48, (), device="cpu"))
    indices: dict[str, list[Tensor]] = {path: [] for block in structure.blocks for path in _paths(block, allowed)}
    dims = {units.path: units.dim for role in ratios for units in structure.units(role)}
    chosen: dict[str, tuple[int, int]] = {}
    others = list(taken)
    for roles in _sets(ratios, coupled):
        ranked = _Ranked(structure, roles, allowed)
        if selection == "random":
            scores = ranked.drawn(int(seed or 0))
        else:
            scores = [
                block_scores(model, block, units, selection, activations, gradients)
                for block, units in zip(ranked.blocks, ranked.units, strict=True)
            ]
        rankings = ranked.rankings(scores, budget, largest and selection != "random")
        for role in roles:
            picked, total = ranked.first(role, rankings, Fraction(str(ratios[role])), others)
            chosen[role] = sum(numbers.numel() for _, numbers in picked), total
            for units, numbers in picked:
                within = numbers[:, None] * units.width + torch.arange(units.width)
                indices[units.path].append(units.first + within.flatten())
    slices = {path: Slice(torch.cat(parts).sort().values, dims[path]) for path, parts in indices.items() if parts}
    slices = {path: found for path, found in slices.items() if found.indices.numel()}
    return Selection(slices, tuple(path for path in indices if path not in slices), chosen)


class _Ranked:
    """The units of roles that are ranked together, block by block.

    Attributes:
        blocks: those that have one of the roles.
        units: of each block, the units of the roles it has; all of one count.
    """

    def __init__(self, structure: Structure, roles: tuple[str, ...], allowed: frozenset[tuple[str, str]]) -> None:
        groups = not {"q", "o"}.isdisjoint(roles) and not {"k", "v"}.isdisjoint(roles)
        self.blocks: list[Attention | Mlp] = []
        self.units: list[list[Units]] = []
        self._seed_offset = ROLES.index(roles[0])
        for block in structure.blocks:
            found = [block.units(role, groups) for role in roles]
            units = [of for of in found if of is not None and (of.path, of.role) in allowed]
            if units:
                self.blocks.append(block)
                self.units.append(units)

    def drawn(self, seed: int) -> list[Tensor]:
        """A random order of all units, as scores; of each block apart it is a random order too."""
        counts = [units[0].count for units in self.units]
        generator = torch.Generator().manual_seed(seed * len(ROLES) + self._seed_offset)
        return list(torch.randperm(sum(counts), generator=generator, device="cpu").double().split(counts))

    def rankings(self, scores: list[Tensor], budget: str, largest: bool) -> list[tuple[Tensor, Tensor]]:
        """Rankings to take the first of, each as blocks' numbers and their units' numbers: one, or one per block."""
        numbers = [torch.full(of.shape, block, dtype=torch.int64) for block, of in enumerate(scores)]
        inner = [torch.arange(of.numel()) for of in scores]
        if budget == "global":
            scores, numbers, inner = [torch.cat(scores)], [torch.cat(numbers)], [torch.cat(inner)]
        orders = [of.sort(stable=True, descending=largest).indices for of in scores]
        return [(blocks[order], units[order]) for blocks, units, order in zip(numbers, inner, orders, strict=True)]

    def first(
        self, role: str, rankings: list[tuple[Tensor, Tensor]], ratio: Fraction, taken: list[Mapping[str, Slice]]
    ) -> tuple[list[tuple[Units, Tensor]], int]:
        """The units of one role that come first and are not taken, in each block that has the role, and how many there
        are in all."""
        places = {number: of for number, units in enumerate(self.units) for of in units if of.role == role}
        free = {number: _free(of, taken) for number, of in places.items()}
        has = torch.tensor([number in places for number in range(len(self.units))])
        picked: dict[int, Tensor] = {}
        total = 0
        for blocks, inner in rankings:
            blocks, inner = blocks[has[blocks]], inner[has[blocks]]
            if not blocks.numel():
                continue
            total += blocks.numel()
            count = max(1, ratio.numerator * blocks.numel() // ratio.denominator)
            kept = torch.tensor([bool(free[b][u]) for b, u in zip(blocks.tolist(), inner.tolist(), strict=True)])
            blocks, inner = blocks[kept], inner[kept]
            if blocks.numel() < count:
                raise ValueError(f"taken leaves {blocks.numel()} units of {role} of the {count} that are to be chosen")
            for number in blocks[:count].unique().tolist():
                picked[number] = inner[:count][blocks[:count] == number].sort().values
        return [(places[number], picked[number]) for number in sorted(picked)], total


def _free(units: Units, taken: list[Mapping[str, Slice]]) -> Tensor:
    """Which units share no channel with a slice that is taken."""
    free = torch.ones(units.count, dtype=torch.bool)
    for slices in taken:
        part = slices.get(units.path)
        if part is None or part.dim != units.dim:
            continue
        numbers = (part.indices - units.first) // units.width
        inside = (part.indices >= units.first) & (numbers < units.count)
        free[numbers[inside]] = False
    return free


def _sets(ratios: Mapping[str, float], coupled: bool) -> list[tuple[str, ...]]:
    """The roles that are ranked together, always in one order, whatever the order of `ratios`."""
    if not coupled:
        return [(role,) for role in ROLES if role in ratios]
    families = (tuple(role for role in family if role in ratios) for family in (ATTENTION_ROLES, MLP_ROLES))
    return [roles for roles in families if roles]


def _paths(block: Attention | Mlp, allowed: frozenset[tuple[str, str]]) -> list[str]:
    found = (block.units(role) for role in ROLES)
    return list(dict.fromkeys(units.path for units in found if units and (units.path, units.role) in allowed))


def _allowed(
    structure: Structure, ratios: Mapping[str, float], layers: Iterable[str] | None
) -> frozenset[tuple[str, str]]:
    """Paths and roles to choose in."""
    roles = structure.roles()
    paths = list(roles) if layers is None else list(layers)
    for path in paths:
        if path not in roles:
            raise ValueError(f"layers must name layers of attention blocks or MLPs, but {path!r} is none")
    allowed = {(path, role) for path in paths for role in roles[path] if role in ratios}
    for role in ratios:
        if not any(role == other for _, other in allowed):
            known = sorted({other for others in roles.values() for other in others}, key=ROLES.index)
            unclear = "".join(f"; not understood: {item.path}: {item.reason}" for item in structure.not_understood[:3])
            raise ValueError(
                f"ratios asks for {role}, but {'the model has' if layers is None else 'layers have'} none; roles: "
                f"{', '.join(known) or 'none'}{unclear}"
            )
    return frozenset(allowed)


def _check(ratios: Mapping[str, float], selection: str, seed: int | None, budget: str) -> None:
    if not isinstance(ratios, Mapping) or not ratios:
        raise ValueError(f"ratios must map roles to shares, got {ratios!r}")
    for role, ratio in ratios.items():
        if role not in ROLES:
            raise ValueError(f"ratios must have keys of {', '.join(ROLES)}, got {role!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratios[{role!r}] must be in (0, 1], got {ratio!r}")
    for name, value, choices in (("selection", selection, SELECTIONS), ("budget", budget, BUDGETS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**60):
        raise ValueError(f"seed must be an integer in [0, 2^60), got {seed!r}")
