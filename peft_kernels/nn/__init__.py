"""Drop-in modules; each computes through `peft_kernels.ops` and holds no arithmetic of its own."""

from .lora import LoRALinear
from .quantized_sparse_delta import QuantizedSparseDeltaLinear
from .rosa import RoSALinear
from .sparse_delta import SparseDeltaLinear

__all__ = ["LoRALinear", "QuantizedSparseDeltaLinear", "RoSALinear", "SparseDeltaLinear"]
