"""How much memory a training step takes, calculated from the model's configuration: `peft-kernels plan`."""

from .activations import LayerBytes, layer_bytes, workspace_bytes
from .plan import Component, MemoryPlan, longest_sequence, plan_memory
from .settings import LOGITS, METHODS, StepSettings
from .shape import ModelShape

__all__ = [
    "LOGITS",
    "METHODS",
    "Component",
    "LayerBytes",
    "MemoryPlan",
    "ModelShape",
    "StepSettings",
    "layer_bytes",
    "longest_sequence",
    "plan_memory",
    "workspace_bytes",
]
