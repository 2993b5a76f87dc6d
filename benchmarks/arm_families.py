"""Which arms a case is measured with."""

from __future__ import annotations

from typing import Any

from .lora_arms import LORA
from .model_arms import ArmFamily
from .sparse_delta_arms import SPARSE_DELTA
from .suites import ModelCase, SparseModelCase


def family_of(case: ModelCase | SparseModelCase) -> ArmFamily[Any]:
    """The family of adapters that `case` is about."""
    return LORA if isinstance(case, ModelCase) else SPARSE_DELTA
