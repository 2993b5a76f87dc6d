"""Peak memory of one training step, each arm in a fresh process: an arm must not profit from another's heap."""

from __future__ import annotations

import tempfile

import torch

from peft_kernels.training.models import LoadedModel, load_model

from . import memory, model_arms
from .apart import run_apart
from .arm_families import family_of
from .cases import Record, failure
from .suites import ModelCase, SparseModelCase

AnyModelCase = ModelCase | SparseModelCase

_WARMUP_STEPS = 2  # the first fills the optimizer's state, the second the libraries' caches
# Imported once by the server that forks the fresh processes, so in every arm alike.
_PRELOADED = ["benchmarks.model_memory", "peft", "transformers.models.llama.modeling_llama"]
_MEASURES = ("resident_bytes", "tensor_bytes")


def measure_here(directory: str, name: str, case: AnyModelCase) -> dict[str, int]:
    """Peaks of one step of arm `name` in this process.

    Args:
        directory: a saved transformers model with its tokenizer.

    Returns:
        `resident_bytes`: VmHWM over the step. `tensor_bytes`: parameters, buffers and optimizer state plus the most
        bytes of tensors that lived at once within the step. `resident_before_bytes`, `tensor_before_bytes`: the same
        before the step.
    """
    loaded = load_model(directory, case.dtype, torch.device("cpu"))
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()  # the heap's own memory, not pages of the weight file
    batch = model_arms.batches(loaded.tokenizer, case, count=1)[0]
    arm = family_of(case).build(name, loaded.model, case)
    del loaded  # an arm that has weights of its own must not pay for those it replaced
    for _ in range(_WARMUP_STEPS):
        arm.step(batch)
    before, resident = memory.peak_resident_bytes(lambda: arm.step(batch))
    tensors = memory.tensor_bytes(arm.resident_tensors())
    peak = memory.peak_tensor_bytes(lambda: arm.step(batch))
    return {
        "resident_bytes": resident,
        "tensor_bytes": tensors + peak,
        "resident_before_bytes": before,
        "tensor_before_bytes": tensors,
    }


def add_to(records: dict[str, Record], case: AnyModelCase, source: LoadedModel) -> None:
    """Adds `memory` to the record of every arm that was timed, with what it adds above the frozen model's peak.

    `added.relative_to_peft` is that over what the family's PEFT arm adds. Linux only, CPU only.
    """
    with tempfile.TemporaryDirectory(prefix="peft-kernels-benchmark-") as directory:
        source.model.save_pretrained(directory)  # type: ignore[operator]
        source.tokenizer.save_pretrained(directory)
        for name, record in records.items():
            if record["status"] == "measured":
                try:
                    record["memory"] = run_apart(measure_here, directory, name, case, preload=_PRELOADED)
                except Exception as error:
                    record["memory"] = failure(error)
    taken = {name: record["memory"] for name, record in records.items() if "tensor_bytes" in record.get("memory", {})}
    frozen = taken.pop(model_arms.FROZEN, None)
    if frozen is None:
        return
    for memory_of_arm in taken.values():
        memory_of_arm["added"] = {key: memory_of_arm[key] - frozen[key] for key in _MEASURES}
    peft = family_of(case).peft(case)
    if peft in taken:
        base = dict(taken[peft]["added"])
        for memory_of_arm in taken.values():
            added = memory_of_arm["added"]
            added["relative_to_peft"] = {key: added[key] / base[key] if base[key] > 0 else None for key in _MEASURES}
