"""What to adapt and how: configuration classes with the field names and defaults of Hugging Face PEFT."""

from .base import AdapterConfig
from .lora import LoraConfig
from .s2ft import S2FTConfig
from .sparse_delta import SparseDeltaConfig
from .token_elimination import TokenEliminationConfig

__all__ = ["AdapterConfig", "LoraConfig", "S2FTConfig", "SparseDeltaConfig", "TokenEliminationConfig"]
