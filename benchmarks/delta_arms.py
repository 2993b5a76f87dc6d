"""What is compared when deltas are merged: ours, and the usual way with whole dense vectors and full sorts.

Both read the same two deltas from safetensors files and write the merged one: ours packed, an entry at a time; the
dense way a tensor of every shape, after concatenating each delta to one float32 vector, as MergeLM does, and finding
thresholds by sorting, as mergekit and the authors' codes do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_kernels import backends, deltas
from peft_kernels.deltas import Delta, DeltaFile
from peft_kernels.deltas.trim import name_offset

from .suites import DeltaCase

OURS, DENSE = "ours", "dense, sorted"
DROP, KEEP, SEED = 0.9, 0.2, 1
BETA, GAMMA = 0.85, 0.01
COUNT = 2

Shapes = dict[str, tuple[int, ...]]


def shapes(model: str) -> Shapes:
    """Tensor names and shapes of a model, in sorted order."""
    sizes = {"smollm2-135m": (49152, 576, 192, 1536, 30), "tiny": (300, 40, 16, 96, 2)}
    vocabulary, hidden, key_value, mlp, layers = sizes[model]
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            found[f"{layer}.{name}.weight"] = shape
    return dict(sorted(found.items()))


def _random(name: str, shape: tuple[int, ...], case: DeltaCase, seed: int) -> Tensor:
    """Changes of about 1e-3, zero but for the case's density."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + name_offset(name) % 2**31)
    values = torch.randn(shape, generator=generator) * 1e-3
    if case.density < 1.0:
        values *= torch.rand(shape, generator=generator) < case.density
    return values.to(case.dtype)


def make_inputs(folder: Path, case: DeltaCase) -> None:
    """Writes the deltas, each packed and dense."""
    for i in range(COUNT):
        dense = {name: _random(name, shape, case, i) for name, shape in shapes(case.model).items()}
        save_file(dense, folder / f"dense-{i}.safetensors")
        packed = {}
        for name, values in dense.items():
            flat = values.view(-1)
            positions = flat.nonzero().view(-1)
            packed[name] = (positions, flat[positions])
        delta = deltas.from_tensors(packed, {name: values.shape for name, values in dense.items()}, case.dtype)
        deltas.save_delta(delta, folder / f"packed-{i}.safetensors")


def ours(folder: Path, case: DeltaCase) -> Path:
    """Merges the packed deltas; returns the file that was written."""
    parts: list[Delta] = [DeltaFile(folder / f"packed-{i}.safetensors") for i in range(COUNT)]
    methods: dict[str, Callable[[], Delta]] = {
        "dare": lambda: deltas.linear([deltas.dare(part, DROP, seed=SEED + i) for i, part in enumerate(parts)]),
        "ties": lambda: deltas.ties(parts, density=KEEP, scope="global"),
        "breadcrumbs": lambda: deltas.linear([deltas.breadcrumbs(part, beta=BETA, gamma=GAMMA) for part in parts]),
        "pcb": lambda: deltas.pcb(parts, density=KEEP),
    }
    return deltas.save_delta(methods[case.method](), folder / "ours.safetensors")


def dense(folder: Path, case: DeltaCase, draw_masks: bool = True, device: str = "cpu") -> Path:
    """Merges the dense deltas; returns the file that was written.

    Args:
        folder: where they are.
        case: the method.
        draw_masks: DARE's masks from torch's generator, as everyone does; else those of `peft_kernels`, so that the
            result can be compared.
        device: where the merging is done.
    """
    loaded = [load_file(folder / f"dense-{i}.safetensors", device) for i in range(COUNT)]
    order = shapes(case.model)
    if case.method == "breadcrumbs":
        merged = {name: _breadcrumbs([tensors[name].float() for tensors in loaded]) for name in order}
    else:
        vectors = torch.stack([torch.cat([tensors[name].float().view(-1) for name in order]) for tensors in loaded])
        del loaded
        whole = {
            "dare": lambda: _dare(vectors, None if draw_masks else order),
            "ties": lambda: _ties(vectors),
            "pcb": lambda: _pcb(vectors),
        }[case.method]()
        sizes = [torch.Size(shape).numel() for shape in order.values()]
        merged = {name: part.view(order[name]).clone() for name, part in zip(order, whole.split(sizes), strict=True)}
    path = folder / "dense.safetensors"
    save_file({name: tensor.to("cpu", case.dtype) for name, tensor in merged.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # as ours does
    return path


def _dare(vectors: Tensor, order: Shapes | None) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        if order is None:
            mask = torch.bernoulli(torch.full_like(vector, 1 - DROP))
        else:
            mask = torch.cat([_kept(name, shape, SEED + i) for name, shape in order.items()]).to(vector.device)
        total += vector * mask * (1 / (1 - DROP))
    return total


def _kept(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    draw = backends.kernel("dropout_mask", "cpu", torch.float32)
    state = torch.tensor([seed, name_offset(name)])
    kept: Tensor = draw(torch.Size(shape[:-1]).numel(), shape[-1], DROP, state)
    return kept.view(-1).float()


def _ties(vectors: Tensor) -> Tensor:
    count = int(KEEP * vectors.shape[1])
    for vector in vectors:
        largest = torch.argsort(vector.abs(), descending=True, stable=True)[:count]
        mask = torch.zeros_like(vector)
        mask[largest] = 1
        vector *= mask
    positive = vectors.sum(dim=0) >= 0
    agree = torch.where(positive, vectors > 0, vectors < 0)
    return (vectors * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _breadcrumbs(tensors: list[Tensor]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        columns = tensor.shape[-1]
        order = torch.sort(tensor.abs(), dim=-1, descending=True, stable=True).indices
        kept = order[..., int(GAMMA * columns) : columns - int(BETA * columns)]
        total += tensor * torch.zeros_like(tensor).scatter_(-1, kept, 1.0)
    return total


def _quantiles(rows: Tensor, low: float, high: float) -> Tensor:
    count = rows.shape[1]
    rising = torch.sort(rows, dim=1).values
    lowest, highest = min(count - 1, int(count * low)), max(0, int(count * (1 - high) - 1))
    return rows.clamp(rising[:, lowest : lowest + 1], rising[:, highest : highest + 1])


def _unit(rows: Tensor) -> Tensor:
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    return (rows - low) / (high - low)


def _pcb(vectors: Tensor) -> Tensor:
    magnitudes = _quantiles(vectors.abs(), 1e-4, 1e-4)
    scores = torch.exp(len(vectors) * _unit(magnitudes) ** 2) * torch.tanh(vectors * vectors.sum(dim=0))
    scale = _unit(_quantiles(scores, 1 - KEEP, 0.0))
    return (vectors.sign() * magnitudes * scale).sum(dim=0) / scale.sum(dim=0).clamp(min=1e-12)
