"""Which arms a case is measured with."""

from __future__ import annotations

from typing import Any

from .lora_arms import LORA
from .model_arms import ArmFamily
from .s2ft_arms import S2FT
from .sparse_delta_arms import SPARSE_DELTA
from .suites import AnyModelCase, ModelCase, S2FTModelCase, TokenModelCase
from .token_arms import TOKENS


def family_of(case: AnyModelCase) -> ArmFamily[Any]:
    """The family of adapters that `case` is about."""
    if isinstance(case, S2FTModelCase):
        return S2FT
    if isinstance(case, TokenModelCase):
        return TOKENS
    return LORA if isinstance(case, ModelCase) else SPARSE_DELTA
