"""A small net of `SparseDeltaLinear` layers that trains: for tests of reselection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels import Reselector, optim
from peft_kernels.nn import SparseDeltaLinear

SIZES = ((13, 11, 9), (11, 7, 5))
"""in_features, out_features and number of deltas of each layer."""
NUMBERS = {"lr": 0.01, "weight_decay": 0.1}


def small_net(dtype: torch.dtype = torch.float64, seed: int = 0, selection: str = "random") -> nn.Sequential:
    """Two layers with a ReLU between them; the same seed gives the same weights and positions."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for columns, rows, count in SIZES:
        linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5)
        modules += [
            SparseDeltaLinear.from_linear(linear, num_deltas=count, selection=selection, generator=generator),
            nn.ReLU(),
        ]
    return nn.Sequential(*modules[:-1])


def layers_of(model: nn.Module) -> list[SparseDeltaLinear]:
    return [module for module in model.modules() if isinstance(module, SparseDeltaLinear)]


def batches(steps: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets, one pair per backward pass."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[0][0], SIZES[-1][1]
    return [
        tuple(torch.randn(6, size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
        for _ in range(steps)
    ]


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of the optimizers that reselection works with, over the layers' values."""
    values = [layer.values for layer in layers_of(model)]
    if name == "fused AdamW":
        return torch.optim.AdamW(values, betas=(0.9, 0.99), fused=True, **NUMBERS)
    if name == "AdamW":
        return torch.optim.AdamW(values, betas=(0.9, 0.99), **NUMBERS)
    if name == "SparseAdamW":
        return optim.SparseAdamW(values, betas=(0.9, 0.99), **NUMBERS)
    if name == "SparseSM3":
        return optim.SparseSM3(values, beta=0.9, **NUMBERS)
    return torch.optim.SGD(values, lr=0.01, momentum=0.9)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    reselector: Reselector,
    parts: list[tuple[Tensor, Tensor]],
    max_norm: float | None = None,
) -> int:
    """Backward over the microbatches, a step of the optimizer, one of the reselector; how many entries moved."""
    for x, y in parts:
        ((model(x) - y) ** 2).mean().div(len(parts)).backward()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_([layer.values for layer in layers_of(model)], max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return reselector.step()
