"""Which heads and channels train: the coupled structures of a model, a choice in them, and bringing it together.

    structure = find_structure(model)
    selection = select(model, {"o": 0.05, "down": 0.03}, seed=0, structure=structure)
    permutation = co_permute(model, selection.slices, structure)
    permutation.slices                      # by path: the channels, now consecutive
    ...                                     # train; take the adapters off
    permutation.undo(model)

`units.py` says what heads and channels are, `blocks.py` and `structure.py` find them, `probe.py` tries out what was
found; `statistics.py` and `scores.py` measure them, `selection.py` chooses; `orders.py` and `permutation.py` move them.
"""

from .blocks import NotUnderstood
from .orders import LayerOrder
from .permutation import Permutation, co_permute
from .probe import confirm_structure
from .selection import BUDGETS, SELECTIONS, Selection, select
from .slices import Slice
from .statistics import collect_activations, collect_gradients
from .structure import Structure, find_structure
from .units import ROLES, Attention, Mlp, Span, Units

__all__ = [
    "BUDGETS",
    "ROLES",
    "SELECTIONS",
    "Attention",
    "LayerOrder",
    "Mlp",
    "NotUnderstood",
    "Permutation",
    "Selection",
    "Slice",
    "Span",
    "Structure",
    "Units",
    "co_permute",
    "collect_activations",
    "collect_gradients",
    "confirm_structure",
    "find_structure",
    "select",
]
