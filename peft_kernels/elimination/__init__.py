"""Selected tokens on a whole model: `inject` with a `TokenEliminationConfig` or a `TokenTuneConfig` begins it.

`remove` or `eject` ends it. The layers themselves are `nn.TokenElimination` and `nn.TokenTune`; this package says which
layers of a model become some, what they share, and what they did. It also trains predictors of scores, and finds
thresholds.
"""

from .computed import computed_labels, computed_share
from .gradient import score_by_gradient
from .model import (
    check_removable,
    eliminate,
    eliminating_layers,
    remove,
    report,
    selective_layers,
    set_predictors,
)
from .predictor import BlockPredictor, Predictors
from .predictor_training import train_predictors
from .pruning import PruningReport, prune_predictors
from .recall import LayerRecall, RecallReport, recall_report
from .threshold_refinement import ThresholdReport, refine_thresholds
from .thresholds import Thresholds, set_thresholds
from .token_tune import selected_labels, tune

__all__ = [
    "BlockPredictor",
    "LayerRecall",
    "Predictors",
    "PruningReport",
    "RecallReport",
    "ThresholdReport",
    "Thresholds",
    "check_removable",
    "computed_labels",
    "computed_share",
    "eliminate",
    "eliminating_layers",
    "prune_predictors",
    "recall_report",
    "refine_thresholds",
    "remove",
    "report",
    "score_by_gradient",
    "selected_labels",
    "selective_layers",
    "set_predictors",
    "set_thresholds",
    "train_predictors",
    "tune",
]
