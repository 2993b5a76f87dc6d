"""Token elimination on a whole model: `inject` with a `TokenEliminationConfig` begins it, `remove` or `eject` ends it.

The layers themselves are `nn.TokenElimination`; this package says which layers of a model become some, what they share,
and what they did.
"""

from .gradient import score_by_gradient
from .model import check_removable, eliminate, eliminating_layers, remove, report, set_predictors

__all__ = [
    "check_removable",
    "eliminate",
    "eliminating_layers",
    "remove",
    "report",
    "score_by_gradient",
    "set_predictors",
]
