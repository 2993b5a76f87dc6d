"""Drop-in modules; each computes through `peft_kernels.ops` and holds no arithmetic of its own."""

from .lora import LoRALinear
from .quantized_sparse_delta import QuantizedSparseDeltaLinear
from .rosa import RoSALinear
from .row_sampling import RowSampling
from .s2ft import S2FTLinear
from .s2ft_conv1d import S2FTConv1D
from .sparse_delta import SparseDeltaLinear
from .swiglu_mlp import SwiGLUMLP
from .token_elimination import TokenElimination
from .token_tune import TokenTune
from .wta_crs import WTACRSLinear

__all__ = [
    "LoRALinear",
    "QuantizedSparseDeltaLinear",
    "RoSALinear",
    "RowSampling",
    "S2FTConv1D",
    "S2FTLinear",
    "SparseDeltaLinear",
    "SwiGLUMLP",
    "TokenElimination",
    "TokenTune",
    "WTACRSLinear",
]
