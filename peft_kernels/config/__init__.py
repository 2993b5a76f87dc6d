"""What to adapt and how: configuration classes with the field names and defaults of Hugging Face PEFT."""

from .base import AdapterConfig
from .lora import LoraConfig
from .s2ft import S2FTConfig
from .sparse_delta import SparseDeltaConfig
from .token_elimination import TokenEliminationConfig
from .token_layers import TokenConfig
from .token_tune import TokenTuneConfig
from .wta_crs import WTACRSConfig

__all__ = [
    "AdapterConfig",
    "LoraConfig",
    "S2FTConfig",
    "SparseDeltaConfig",
    "TokenConfig",
    "TokenEliminationConfig",
    "TokenTuneConfig",
    "WTACRSConfig",
]
