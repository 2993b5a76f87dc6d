"""Trained slices as objects: taken from a model, switched in place, fused, served side by side, turned into LoRA.

    adapter = slices.take(model)                        # of a model after `inject` with an `S2FTConfig`
    adapter = slices.read(directory, base)              # or of what `save_adapter` wrote
    both = slices.fuse([math, code])
    switch = slices.Switch(base); switch.to(math); switch.to(code); switch.to(None)
    served = slices.serve(base, {"math": math, "code": code})
    slices.to_lora(both, directory)                     # an adapter that PEFT loads

`adapter.py` says what an adapter is, `files.py` reads them, `fusion.py` adds them up, `switching.py` writes them into a
model's weights, `serving.py` computes several at once, `lora.py` converts.
"""

from .adapter import SliceAdapter, SliceUpdate, take
from .files import read
from .fusion import fuse, overlap
from .lora import from_lora, to_lora
from .serving import Served, ServedConv1D, ServedLinear, serve
from .switching import Switch

__all__ = [
    "Served",
    "ServedConv1D",
    "ServedLinear",
    "SliceAdapter",
    "SliceUpdate",
    "Switch",
    "from_lora",
    "fuse",
    "overlap",
    "read",
    "serve",
    "take",
    "to_lora",
]
