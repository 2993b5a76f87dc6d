"""A small transformer in plain PyTorch, data, optimizers, and the loop that every test here runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import peft_kernels as pk

VOCABULARY, WIDTH, LENGTH = 23, 8, 6


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 12, bias=bias), nn.Linear(WIDTH, 12, bias=bias)
        self.down_proj = nn.Linear(12, WIDTH, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(bias), Mlp(bias)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Net(nn.Module):
    def __init__(self, layers=4, bias=False):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(bias) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(self.norm(x)))


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def batches(count):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (count, 2, LENGTH), generator=generator)


SAMPLE = batches(1)[0]

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "SparseAdamW": lambda parameters: pk.optim.SparseAdamW(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, initial_accumulator_value=0.2),
}


def loss_of(model, tokens):
    logits = model(tokens)
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def backward(model, tokens):
    loss_of(model, tokens).backward()


def run(model, optimizer, schedule, first, last, parts=2):
    """Steps `first` to `last`, each of two accumulated passes; returns what trained in each, as the schedule says.

    Dropout's seed is the step's number, so that a step does not depend on how the run came there.
    """
    data = batches(last * parts)
    trained = []
    for step in range(first, last):
        torch.manual_seed(100 + step)
        for tokens in data[step * parts : (step + 1) * parts]:
            backward(model, tokens)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        trained.append(set(schedule.training))
        optimizer.zero_grad()
        schedule.step()
    return trained


def run_plainly(model, make_optimizer, managed, trained, clip_to=None, parts=2):
    """What `run` has to do, in plain words: each parameter has an optimizer of its own.

    A parameter of `managed` gets a new one when it starts, and loses it when it stops. Nothing is frozen: gradients
    that are not to be used are thrown away before the step. `clip_to` names whose gradients clipping sees.
    """
    data = batches(len(trained) * parts)
    parameters = dict(model.named_parameters())
    optimizers = {name: make_optimizer([parameter]) for name, parameter in parameters.items() if name not in managed}
    for step, names in enumerate(trained):
        torch.manual_seed(100 + step)
        for name in managed:
            if name not in names:
                optimizers.pop(name, None)
            elif name not in optimizers:
                optimizers[name] = make_optimizer([parameters[name]])
        for tokens in data[step * parts : (step + 1) * parts]:
            backward(model, tokens)
        seen = clip_to(step) if clip_to else optimizers
        nn.utils.clip_grad_norm_([parameter for name, parameter in parameters.items() if name in seen], 5.0)
        for optimizer in optimizers.values():
            optimizer.step()
        for parameter in parameters.values():
            parameter.grad = None
    return optimizers


def assert_same_parameters(model, other):
    from ..support.accuracy import assert_same_bits

    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter, expected[name], name)


def assert_state_is_that_of_what_trains(model, optimizer, schedule):
    """Frozen parameters have no gradient and no state; those that train have what the optimizer keeps."""
    names = dict(model.named_parameters())
    for name in schedule.frozen:
        assert not names[name].requires_grad and names[name].grad is None
        assert names[name] not in optimizer.state
    for name in schedule.training:
        assert names[name].requires_grad
