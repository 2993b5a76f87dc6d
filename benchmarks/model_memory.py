"""Memory of one training step: what autograd keeps for backward, and peaks.

On the CPU peaks are taken of each arm in a fresh process: an arm must not profit from another's heap. On a GPU the
allocator counts what lives, whoever else has a part of the heap, so there they are taken where the arms were timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.training.models import LoadedModel, load_model

from . import memory, model_arms
from .apart import run_apart
from .arm_families import family_of
from .cases import Record, failure
from .model_arms import ModelArm
from .suites import AnyModelCase

_WARMUP_STEPS = 2  # the first fills the optimizer's state, the second the libraries' caches
# Imported once by the server that forks the fresh processes, so in every arm alike.
_PRELOADED = ["benchmarks.model_memory", "peft", "transformers.models.llama.modeling_llama"]
_MEASURES = ("resident_bytes", "tensor_bytes")


def _saved_by(arm: ModelArm, batch: Tensor) -> dict[str, Any]:
    """Bytes that forward keeps for backward, storages counted once; without parameters, buffers and the batch.

    `bytes` up to the loss, `decoder_bytes` up to the last hidden state, without the vocabulary's logits.
    """
    decoder: Any = arm.model.get_decoder()  # type: ignore[operator]
    forwards = {
        "bytes": lambda: arm.loss(batch),
        "decoder_bytes": lambda: decoder(input_ids=batch).last_hidden_state,
    }
    resident = [*arm.resident_tensors(), batch]
    return {name: memory.saved_bytes(forward, resident)[0] for name, forward in forwards.items()}


def add_saved(records: dict[str, Record], arms: Sequence[ModelArm], batch: Tensor) -> None:
    """Adds `saved` to the record of every arm: see `_saved_by`, and both relative to the frozen model's."""
    taken = {arm.name: _saved_by(arm, batch) for arm in arms}
    frozen = taken.get(model_arms.FROZEN)
    for name, saved in taken.items():
        if frozen is not None and name != model_arms.FROZEN:
            saved["relative_to_frozen"] = {key: saved[key] / frozen[key] for key in frozen}
        records[name]["saved"] = saved


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
    _add_differences(records, case)


def add_peaks(records: dict[str, Record], arms: Sequence[ModelArm], batch: Tensor, case: AnyModelCase) -> None:
    """Adds `memory` to the records of `arms`, which have taken steps before: as `add_to`, with tensors alone.

    `tensor_bytes` is what the arm would need by itself: its parameters, buffers and optimizer state, plus the most that
    lived at once within the step. On a GPU the allocator rounds each tensor up to 512 bytes.
    """
    for arm in arms:
        try:
            peak = memory.peak_tensor_bytes(lambda arm=arm: arm.step(batch), batch.device)  # type: ignore[misc]
        except Exception as error:
            records[arm.name]["memory"] = failure(error)
            continue
        tensors = memory.tensor_bytes(arm.resident_tensors())
        records[arm.name]["memory"] = {"tensor_bytes": tensors + peak, "tensor_before_bytes": tensors}
    _add_differences(records, case)


def _add_differences(records: dict[str, Record], case: AnyModelCase) -> None:
    taken = {name: record["memory"] for name, record in records.items() if "tensor_bytes" in record.get("memory", {})}
    frozen = taken.pop(model_arms.FROZEN, None)
    if frozen is None:
        return
    measures = [key for key in _MEASURES if key in frozen]
    for memory_of_arm in taken.values():
        memory_of_arm["added"] = {key: memory_of_arm[key] - frozen[key] for key in measures}
    peft = family_of(case).peft(case)
    if peft in taken:
        base = dict(taken[peft]["added"])
        for memory_of_arm in taken.values():
            added = memory_of_arm["added"]
            added["relative_to_peft"] = {key: added[key] / base[key] if base[key] > 0 else None for key in measures}
