"""The delta algebra: what fine-tuning changed, packed, as something to trim, merge, add and take away.

A `Delta` maps tensor names of a base model to sorted positions and numbers to add there. It is read and computed a
tensor at a time, so that whole chains need the memory of a few tensors, whatever the model:

    import peft_kernels as pk

    with pk.deltas.Checkpoint("base") as base, pk.deltas.Checkpoint("tuned") as tuned:
        delta = pk.deltas.trim(pk.deltas.extract(base, tuned), density=0.05)
        pk.deltas.save_delta(delta, "math.safetensors")
    merged = pk.deltas.ties([pk.deltas.DeltaFile("math.safetensors"), pk.deltas.DeltaFile("code.safetensors")])
    with pk.deltas.apply(model, merged):
        ...                                 # the merged model; afterwards the old bits are back

`delta.py` says what a delta is, `files.py` how it is stored, `trim.py` and `merge.py` hold the methods, `extract.py`
and `apply.py` the ways in and out; thresholds are counted, not sorted (`thresholds.py`).
"""

from .apply import AppliedDelta, apply, apply_to_checkpoint
from .checkpoint import Checkpoint
from .delta import ComputedDelta, Delta, Entry, SparseDelta, Spec, from_tensors
from .extract import extract, from_lora
from .files import DeltaFile, save_delta
from .merge import compose, linear, pcb, ties
from .trim import antidote, breadcrumbs, dare, graft, scaled, trim

__all__ = [
    "AppliedDelta",
    "Checkpoint",
    "ComputedDelta",
    "Delta",
    "DeltaFile",
    "Entry",
    "SparseDelta",
    "Spec",
    "antidote",
    "apply",
    "apply_to_checkpoint",
    "breadcrumbs",
    "compose",
    "dare",
    "extract",
    "from_lora",
    "from_tensors",
    "graft",
    "linear",
    "pcb",
    "save_delta",
    "scaled",
    "ties",
    "trim",
]
