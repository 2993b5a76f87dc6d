"""One training step of a whole model: time relative to the frozen model, and what an adapter adds to peak memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.training.models import LoadedModel, load_model

from . import model_arms, model_memory
from .arm_families import family_of
from .cases import Progress, Record, failure, run_cases
from .harness import Arm, interleave, summarize
from .model_arms import ModelArm
from .served import as_if_recorded, served
from .suites import AnyModelCase, Suite

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest accepted relative difference of the first loss to that of the arm it must be equal to."""


def _build(base: nn.Module, case: AnyModelCase) -> tuple[list[ModelArm], dict[str, Record]]:
    """The arms that could be built, and a record for every arm."""
    arms: list[ModelArm] = []
    records: dict[str, Record] = {}
    family = family_of(case)
    for name in family.names(case):
        try:
            arm = family.build(name, base, case)
        except Exception as error:
            records[name] = failure(error)
            continue
        arms.append(arm)
        trainable = arm.trainable().values()
        records[name] = {
            "status": "ready",
            "trainable_parameters": sum(parameter.numel() for parameter in trainable),
            "adapter_dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trainable}),
        }
    return arms, records


def _check_losses(arms: Sequence[ModelArm], records: dict[str, Record], case: AnyModelCase, batch: Tensor) -> None:
    """Records every arm's first loss and marks as wrong an arm whose loss is not the one that its family says."""
    for arm in arms:
        try:
            records[arm.name]["first_loss"] = arm.forward_backward(batch).item()
        except Exception as error:  # such as too little memory, which costs the other arms nothing
            records[arm.name].update(failure(error))
        for parameter in arm.trainable().values():
            parameter.grad = None
    for name, record in records.items():
        if name == model_arms.FROZEN or "first_loss" not in record:
            continue
        same = family_of(case).same_loss(case, name)
        reference = None if same is None else records.get(same, {}).get("first_loss")
        if reference is None:
            continue
        difference = abs(record["first_loss"] - reference) / abs(reference)
        if not difference <= _TOLERANCE[case.dtype]:
            reason = f"first loss {record['first_loss']} is {difference:.1e} off {reference} of {same}"
            record.update(status="wrong", reason=reason)


def _first_steps(arm: ModelArm, record: Record, batch: Tensor) -> bool:
    """Whether the arm takes steps; its record gets the backends that served their operators.

    Two steps: what an optimizer has changed is written into the weights by the next one's forward.
    """
    try:
        with served() as backends:
            for _ in range(2):
                arm.step(batch)
    except Exception as error:
        record.update(failure(error))
        return False
    record["backends"] = backends
    return True


def measure(case: AnyModelCase, suite: Suite, base: nn.Module, tokens: Sequence[Tensor]) -> Record:
    """Seconds per step of every arm, interleaved in this process."""
    arms, records = _build(base, case)
    _check_losses(arms, records, case, tokens[0])
    ready = [arm for arm in arms if records[arm.name]["status"] == "ready"]

    def run(arm: ModelArm) -> Callable[[int], Tensor]:
        return lambda i: arm.step(tokens[i % len(tokens)])

    model_memory.add_saved(records, ready, tokens[0])
    ready = [arm for arm in ready if _first_steps(arm, records[arm.name], tokens[0])]
    timed = [Arm(arm.name, run(arm)) for arm in ready]
    family = family_of(case)
    bases = (model_arms.FROZEN, family.peft(case), *family.bases)
    times = summarize(interleave(timed, suite.model_plan, suite.device_type), bases)
    for arm in ready:
        records[arm.name].update(times[arm.name], status="measured")
    if suite.memory_of_model and suite.device_type != "cpu":
        model_memory.add_peaks(records, ready, tokens[0], case)
    return {"limits": {"ideal_ratio": family.ideal_ratio(base, case)}, "arms": records}


class _Models:
    """The base models of a run, loaded when a case asks for one; only the last is kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.descriptions: dict[str, str] = {}
        self._key: tuple[str, torch.dtype] | None = None
        self._loaded: LoadedModel | None = None

    def get(self, case: AnyModelCase) -> LoadedModel:
        key = case.model, case.dtype
        if self._loaded is None or self._key != key:
            self._loaded = None  # frees the last model before the next one is loaded
            self._key, self._loaded = key, self._load(case)
            self.descriptions[case.model] = self._loaded.description
        return self._loaded

    def _load(self, case: AnyModelCase) -> LoadedModel:
        # A random model is made where it is used: on a GPU that takes a second, on the CPU a minute.
        with self.device if case.model.startswith("random:") else contextlib.nullcontext():
            return load_model(case.model, case.dtype, self.device)


def _run(suite: Suite, cases: Sequence[Any], progress: Progress) -> Record:
    # For every arm alike, and what `peft-kernels finetune` does: the frozen model gains as much as the others.
    keeps_memory = suite.device_type == "cpu" and pk.keep_freed_memory()
    models = _Models(torch.device(suite.device_type))

    def one(case: AnyModelCase) -> Record:
        source = models.get(case)
        tokens = [batch.to(models.device) for batch in model_arms.batches(source.tokenizer, case, count=4)]
        record = measure(case, suite, source.model, tokens)
        if suite.memory_of_model and suite.device_type == "cpu":
            model_memory.add_to(record["arms"], case, source)
        return record

    train_info: Record = {
        "models": models.descriptions,
        "optimizer": family_of(cases[0]).optimizer,
        "keep_freed_memory": keeps_memory,
    }
    with as_if_recorded(suite.device_type):
        return run_cases(cases, one, describe, progress, train_info)


def run_lora(suite: Suite, progress: Progress) -> Record:
    """All model cases of `suite` for LoRA."""
    return _run(suite, suite.models, progress)


def run_sparse_delta(suite: Suite, progress: Progress) -> Record:
    """All model cases of `suite` for sparse deltas."""
    return _run(suite, suite.sparse_models, progress)


def run_s2ft(suite: Suite, progress: Progress) -> Record:
    """All model cases of `suite` for slices."""
    return _run(suite, suite.s2ft_models, progress)


def run_token_elimination(suite: Suite, progress: Progress) -> Record:
    """All model cases of `suite` for token elimination."""
    return _run(suite, suite.token_models, progress)


def _label(record: Record) -> str:
    case = record["case"]
    size = f"{case['batch_size']} x {case['sequence_length']}"
    return f"{case['model']} {size} {adapter_of(case)} {case['dtype']}"


def adapter_of(case: Record) -> str:
    """The adapter of a case, in words."""
    if "down" in case:
        return f"down {case['down']:.0%}, o {case['o']:.0%}; LoRA r={case['r']}"
    if "keep" in case:
        return f"keep {case['keep']:g} in blocks of {case['block_size']}; LoRA r={case['r']}"
    if "dropout_p" in case:
        return f"r={case['r']}, dropout {case['dropout_p']}"
    return f"as many as r={case['r']}" if case["density"] is None else f"density {case['density']:.2%}"


def describe(record: Record) -> str:
    """One line: every arm's time per step and bytes kept for backward relative to the frozen model, and what it adds to
    the peak of memory."""
    parts = []
    for name, arm in record["arms"].items():
        if arm["status"] != "measured":
            parts.append(f"{name} {arm['status']}")
        elif name == model_arms.FROZEN:
            parts.append(f"{name} {arm['median_s']:.3f} s")
        else:
            added = arm.get("memory", {}).get("added")
            memory = f" ({added.get('resident_bytes', added['tensor_bytes']) / 1e6:+.0f} MB)" if added else ""
            saved = arm["saved"].get("relative_to_frozen", {}).get("bytes")
            kept = f", keeps {saved:.3f}" if saved else ""
            ratio = arm["relative_to"][model_arms.FROZEN]["median_of_ratios"]
            parts.append(f"{name} {ratio:.3f}{kept}{memory}")
    return f"{_label(record)}: " + ", ".join(parts)
