"""Deltas from checkpoints and from LoRA adapters; computed a tensor at a time."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from ..adapter_files import KEY_PREFIX, AdapterFiles, read_adapter
from ..config import LoraConfig
from ..ops import deltas as operators
from ..targets import pattern_value
from .checkpoint import Checkpoint
from .delta import ComputedDelta, Delta, Entry, Spec, dtype_name

_FACTOR = re.compile(re.escape(KEY_PREFIX) + r"(?P<path>.+)\.lora_(?P<which>[AB])\.weight")


def extract(
    base: Checkpoint, tuned: Checkpoint, *, dtype: torch.dtype | None = None, base_model: str | None = None
) -> Delta:
    """The delta `tuned - base`: every entry that differs. `trim` and `graft` keep the largest of these.

    Differences are formed and by default kept in float32, or float64 where a tensor is that. Applied to `base`, they
    give `tuned` up to the rounding of the difference: for 16-bit checkpoints that is rarely visible, for float32 ones
    it is the last bit or two.

    Args:
        base, tuned: checkpoints with the same tensors. They have to stay open as long as the delta is read.
        dtype: of the values instead, rounded once.
        base_model: what the delta is to be added to; by default base's name.

    Raises:
        ValueError: names or shapes differ, or an integer tensor does, which no delta can express. Reading an entry
            raises it for differences that are not finite.
    """
    _check_names(base, tuned)
    specs = {}
    for name in base:
        if base.shape(name) != tuned.shape(name):
            raise ValueError(
                f"{name} must have one shape in both checkpoints, got {list(base.shape(name))} and "
                f"{list(tuned.shape(name))}"
            )
        if base.is_floating(name) and tuned.is_floating(name):
            specs[name] = _difference_spec(base, tuned, name, dtype)
        elif base.dtype(name) != tuned.dtype(name) or not base.same_bytes(tuned, name):
            raise ValueError(f"{name} differs and is not floating point, so no delta can express the difference")

    def compute(name: str) -> Entry:
        spec = specs[name]
        work = torch.float64 if torch.float64 in (base.dtype(name), tuned.dtype(name)) else torch.float32
        difference = tuned.read(name).to(work).sub_(base.read(name).to(work)).view(-1)
        return _packed(difference, spec, name)

    return ComputedDelta(specs, compute, base_model or base.name, (f"extract({tuned.name} - {base.name})",))


def _difference_spec(base: Checkpoint, tuned: Checkpoint, name: str, dtype: torch.dtype | None) -> Spec:
    before, after = base.dtype(name), tuned.dtype(name)
    assert before is not None and after is not None
    exact = torch.float64 if torch.float64 in (before, after) else torch.float32
    return Spec(base.shape(name), before, dtype or exact)


def _packed(difference: Tensor, spec: Spec, name: str) -> Entry:
    """What of a flat difference is not zero, as an entry."""
    if difference.numel() and not all(torch.isfinite(bound) for bound in difference.aminmax()):
        raise ValueError(f"{name}: the difference must be finite, got NaN or infinity")
    values = difference.to(spec.values_dtype)
    everywhere = values.new_empty(0, dtype=torch.int32)
    indices, values = operators.compact(everywhere, values, values != 0, 1.0)
    return Entry(indices, values, spec)


def _check_names(base: Checkpoint, tuned: Checkpoint) -> None:
    only_base, only_tuned = sorted(set(base) - set(tuned)), sorted(set(tuned) - set(base))
    for names, here, there in ((only_base, base, tuned), (only_tuned, tuned, base)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"both checkpoints must have the same tensors; {names[0]}{more} of {here.path} "
                             f"not in {there.path}")  # fmt: skip


def from_lora(
    directory: str | os.PathLike[str],
    base: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> Delta:
    """The update `scaling lora_B lora_A` of a PEFT LoRA adapter as a delta; dense, so usually to be trimmed.

    Products are formed in float32, or in the factors' dtype where that is wider, at every reading of an entry.

    Args:
        directory: an adapter directory of PEFT's or of `save_adapter`; pickles are never read.
        base: the checkpoint that the adapter was trained on, for names, shapes and dtypes.
        dtype: of the values; by default that of the products.
        base_model: what the delta is to be added to; by default what the adapter says, else base's name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: the adapter is damaged, is not plain LoRA on linear layers, or does not fit `base`.
    """
    files = read_adapter(directory)
    config = LoraConfig.from_dict(files.config)
    if config.modules_to_save or config.bias != "none":
        raise ValueError(
            f"{files.directory} holds more than an update of weights (modules_to_save={config.modules_to_save}, "
            f"bias={config.bias!r}); merge it into the model and take the difference of the checkpoints"
        )
    factors = _factors(files)
    specs, scalings = {}, {}
    for path, (lora_a, lora_b) in factors.items():
        name = f"{path}.weight"
        if name not in base:
            raise ValueError(f"{files.directory} does not fit {base.path}, which has no {name}")
        rank = lora_a.shape[0]
        _check_factors(name, lora_a, lora_b, base.shape(name))
        scalings[name] = _scaling(config, path, rank)
        before = base.dtype(name)
        if before is None or not before.is_floating_point:
            raise ValueError(f"{name} must be floating point in {base.path}, got {before}")
        product = torch.promote_types(torch.promote_types(lora_a.dtype, lora_b.dtype), torch.float32)
        specs[name] = Spec(base.shape(name), before, dtype or product)

    def compute(name: str) -> Entry:
        lora_a, lora_b = factors[name.removesuffix(".weight")]
        work = torch.promote_types(torch.promote_types(lora_a.dtype, lora_b.dtype), torch.float32)
        update = (lora_b.to(work) @ lora_a.to(work)).mul_(scalings[name])
        return _packed(update.view(-1), specs[name], name)

    named = base_model or config.base_model_name_or_path or base.name
    return ComputedDelta(specs, compute, named, (f"from_lora(r={config.r}, lora_alpha={config.lora_alpha})",))


def _factors(files: AdapterFiles) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B by path of the layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in files.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise ValueError(f"{files.directory} holds {key}, which is no lora_A or lora_B of a linear layer")
        if not tensor.is_floating_point() or tensor.dim() != 2 or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{key} in {files.directory} must be a finite matrix, got {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}"
            )
        found.setdefault(match["path"], {})[match["which"]] = tensor
    for path, pair in found.items():
        if len(pair) != 2:
            raise ValueError(f"{files.directory} holds only one of lora_A and lora_B for {path}")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def _check_factors(name: str, lora_a: Tensor, lora_b: Tensor, shape: tuple[int, ...]) -> None:
    if (lora_b.shape[0], lora_a.shape[1]) != shape or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"{name} must be [{lora_b.shape[0]}, {lora_a.shape[1]}], as lora_B {list(lora_b.shape)} and lora_A "
            f"{list(lora_a.shape)} say, got {list(shape)}"
        )


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    """A layer's scaling; its rank comes from the factors, and must be the configuration's."""
    options = config.options(
        r=int(pattern_value({**config.rank_pattern}, path, config.r)),
        lora_alpha=pattern_value(config.alpha_pattern, path, config.lora_alpha),
    )
    if options.r != rank:
        raise ValueError(f"{path}: the configuration says rank {options.r}, lora_A has {rank}")
    return options.scaling
