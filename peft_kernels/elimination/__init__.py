"""Selected tokens on a whole model: `inject` with a `TokenEliminationConfig` or a `TokenTuneConfig` begins it.

`remove` or `eject` ends it. The layers themselves are `nn.TokenElimination` and `nn.TokenTune`; this package says which
layers of a model become some, what they share, and what they did. It also moves the share that they keep, trains
predictors of scores, and finds thresholds.
"""

from .computed import computed_labels, computed_share
from .gradient import score_by_gradient
from .keep_schedule import KeepSchedule, set_keep_ratio
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
from .threshold_losses import LayerCost, ThresholdCosts, threshold_costs
from .threshold_refinement import ThresholdReport, refine_thresholds
from .thresholds import Thresholds, set_thresholds
from .token_tune import selected_labels, tune

__all__ = [
    "BlockPredictor",
    "KeepSchedule",
    "LayerCost",
    "LayerRecall",
    "Predictors",
    "PruningReport",
    "RecallReport",
    "ThresholdCosts",
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
    "set_keep_ratio",
    "set_predictors",
    "set_thresholds",
    "threshold_costs",
    "train_predictors",
    "tune",
]
