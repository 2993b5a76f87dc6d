"""Sparse fine-tuning the plain way: whole matrices, masks, dense gradients, Python's sort.

`Reselector` is held to it. A net of linear layers with a ReLU between them; each layer has a frozen matrix, a matrix of
deltas and a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def net(weights: list[Tensor], x: Tensor) -> Tensor:
    """The net's output."""
    for number, weight in enumerate(weights):
        x = x @ weight.t()
        if number + 1 < len(weights):
            x = torch.relu(x)
    return x


def first_by(score: Tensor, positions: list[int], count: int) -> list[int]:
    """The `count` of `positions` with the largest score, the smaller position first among equals."""
    flat = score.flatten().tolist()
    return sorted(positions, key=lambda position: (-flat[position], position))[:count]


@dataclass
class Layer:
    """One layer's matrices, all of the weight's shape, and its rows' and columns' maxima."""

    frozen: Tensor
    mask: Tensor
    delta: Tensor = field(init=False)
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    candidates: list[int] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.delta, self.m, self.v = (torch.zeros_like(self.frozen) for _ in range(3))
        self.row = self.frozen.new_zeros(self.frozen.shape[0])
        self.column = self.frozen.new_zeros(self.frozen.shape[1])

    def active(self) -> list[int]:
        return self.mask.flatten().nonzero().flatten().tolist()

    def inactive(self) -> list[int]:
        return (~self.mask).flatten().nonzero().flatten().tolist()


@dataclass
class DenseSft:
    """The whole training. `optimizer` is "adamw", "sm3" or "sgd" (with momentum)."""

    layers: list[Layer]
    selection: str
    optimizer: str
    reselection_steps: int
    accumulation_steps: int
    initial_rate: float
    schedule: str
    total_steps: int
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = math.inf
    steps: int = 0
    moved: int = 0

    def weights(self) -> list[Tensor]:
        return [layer.frozen + layer.delta * layer.mask for layer in self.layers]

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over the microbatches, then a reselection when it is due."""
        in_cycle = self.steps % self.reselection_steps
        start = self.steps - in_cycle
        looking = in_cycle < self.accumulation_steps and start + self.accumulation_steps <= self.total_steps
        sums = [torch.zeros_like(layer.frozen) for layer in self.layers]
        for x, y in batches:
            weights = [weight.requires_grad_() for weight in self.weights()]
            ((net(weights, x) - y) ** 2).mean().div(len(batches)).backward()
            for layer, weight, total in zip(self.layers, weights, sums, strict=True):
                if looking and in_cycle == 0 and not layer.candidates and self.selection == "rigl":
                    layer.candidates = first_by(weight.grad.abs(), layer.inactive(), int(layer.mask.sum()))
                total += weight.grad
        norm = torch.stack([(total * layer.mask).norm() for layer, total in zip(self.layers, sums, strict=True)]).norm()
        clip = min(1.0, self.max_norm / (float(norm) + 1e-6))
        self.steps += 1
        for layer, total in zip(self.layers, sums, strict=True):
            total *= clip
            self.update(layer, total * layer.mask)
            if looking:
                layer.gradients.append(total)
        self.moved = 0
        if looking and self.steps - start == self.accumulation_steps:
            for layer in self.layers:
                self.reselect(layer)
                layer.candidates, layer.gradients = [], []

    def update(self, layer: Layer, g: Tensor) -> None:
        """One step of the optimizer on the entries in the mask."""
        if self.optimizer == "sgd":  # m = 0.9 m + g
            layer.m = 0.9 * layer.m + g
            change = self.lr * layer.m
        elif self.optimizer == "adamw":
            layer.m = self.beta1 * layer.m + (1 - self.beta1) * g
            layer.v = self.beta2 * layer.v + (1 - self.beta2) * g * g
            m, v = layer.m / (1 - self.beta1**self.steps), layer.v / (1 - self.beta2**self.steps)
            change = self.lr * m / (v.sqrt() + self.eps) + self.lr * self.weight_decay * layer.delta
        else:
            second = (torch.minimum(layer.row[:, None], layer.column[None, :]) + g * g) * layer.mask
            layer.row = torch.maximum(layer.row, second.amax(1))
            layer.column = torch.maximum(layer.column, second.amax(0))
            now = torch.where(second > 0, g / (second.sqrt() + self.eps), 0.0)
            layer.m = self.beta1 * layer.m + (1 - self.beta1) * now
            change = self.lr * layer.m + self.lr * self.weight_decay * layer.delta
        layer.delta = (layer.delta - change) * layer.mask

    def rate(self) -> float:
        if self.steps == self.accumulation_steps and self.selection in ("rigl", "sm3"):
            return 1.0
        t = self.steps / self.total_steps
        return self.initial_rate * (1 - t if self.schedule == "linear" else (1 + math.cos(math.pi * t)) / 2)

    def reselect(self, layer: Layer) -> None:
        active, inactive = layer.active(), layer.inactive()
        count = min(math.floor(self.rate() * len(active)), len(inactive))
        total = torch.stack(layer.gradients).sum(0)
        if self.selection == "rigl":
            grown = first_by(total.abs(), layer.candidates, count)
        elif self.selection == "sm3":
            grown = first_by(layer.row[:, None] * layer.column[None, :], inactive, count)
        elif self.selection == "magnitude":
            grown = first_by(layer.frozen.abs(), inactive, count)
        else:
            grown = []
        dropped = first_by(-layer.delta.abs(), active, len(grown))
        for position in dropped:
            for tensor in (layer.mask, layer.delta, layer.m, layer.v):
                tensor.view(-1)[position] = 0
        for position in grown:
            layer.mask.view(-1)[position] = True
            if self.selection == "rigl" and self.optimizer == "adamw":
                g = torch.stack(layer.gradients).flatten(1)[:, position]
                layer.m.view(-1)[position] = g.mean() * (1 - self.beta1**self.steps)
                layer.v.view(-1)[position] = (g * g).mean() * (1 - self.beta2**self.steps)
        self.moved += len(grown)
