"""The methods on dense tensors with sorts, in this directory's own words; and random deltas to compare on."""

from __future__ import annotations

import torch

from peft_kernels import deltas
from peft_kernels.deltas.trim import name_offset
from peft_kernels.reference.philox import dropout_mask

SHAPES = {"b": (33, 17), "a.weight": (50, 64), "norm": (77,), "none": (0, 5), "one": (), "deep": (3, 4, 5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(dtype):
    """What sums over values of `dtype` are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_dense(seed=0, density=1.0, dtype=torch.float32, shapes=SHAPES):
    """Dense tensors by name, zero but for a random part of the elements."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        kept = torch.rand(shape, generator=generator) < density
        result[name] = (values * kept).to(dtype)
    return result


def packed(dense, base_dtype=torch.bfloat16, **options):
    """The delta that holds what is not zero of dense tensors."""
    tensors = {}
    for name, tensor in dense.items():
        positions = tensor.reshape(-1).nonzero().view(-1)
        tensors[name] = (positions, tensor.reshape(-1)[positions])
    shapes = {name: tensor.shape for name, tensor in dense.items()}
    return deltas.from_tensors(tensors, shapes, base_dtype, **options)


def everywhere(dense, base_dtype=torch.bfloat16):
    """The same with a value at every position, zeros included."""
    entries = {}
    for name, tensor in dense.items():
        spec = deltas.Spec(tuple(tensor.shape), base_dtype, tensor.dtype)
        entries[name] = deltas.Entry(None, tensor.reshape(-1).clone(), spec)
    return deltas.SparseDelta(entries)


def flat(dense):
    """All tensors in one vector, in the order of names."""
    return torch.cat([dense[name].reshape(-1) for name in sorted(dense)])


def unflat(vector, like):
    """The vector as tensors of the shapes of `like`."""
    names = sorted(like)
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


def order_of(vector):
    """Positions by falling magnitude; equal ones by rising position."""
    return torch.sort(vector.double().abs(), descending=True, stable=True).indices


def keep_ranks(vector, first, last):
    """The vector with zeros outside ranks [first, last)."""
    result = torch.zeros_like(vector)
    kept = order_of(vector)[first:last]
    result[kept] = vector[kept]
    return result


def by_scope(dense, scope, function):
    """`function` of each row, of each tensor, or of everything as one vector."""
    if scope == "global":
        return unflat(function(flat(dense)), dense)
    if scope == "tensor":
        return {name: function(tensor.reshape(-1)).view(tensor.shape) for name, tensor in dense.items()}
    result = {}
    for name, tensor in dense.items():
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
        done = [function(row) for row in rows]
        result[name] = torch.stack(done).view(tensor.shape) if done else tensor
    return result


def trim(dense, density, scope, outliers=0.0):
    """The top without outliers."""

    def one(vector):
        kept = int(density * vector.numel())
        first = min(int(outliers * vector.numel()), vector.numel() - kept)
        return keep_ranks(vector, first, first + kept)

    return by_scope(dense, scope, one)


def breadcrumbs(dense, beta, gamma, scope="row"):
    """Without the largest gamma and the smallest beta."""

    def one(vector):
        return keep_ranks(vector, int(gamma * vector.numel()), vector.numel() - int(beta * vector.numel()))

    return by_scope(dense, scope, one)


def dare(dense, p, seed):
    """Dropped by the dropout masks of the tensors' rows, and rescaled."""
    result = {}
    for name, tensor in dense.items():
        columns = max(1, tensor.shape[-1]) if tensor.dim() else 1
        state = torch.tensor([seed, name_offset(name)])
        mask = dropout_mask(tensor.numel() // columns, columns, p, state).view(tensor.shape)
        work = wide(tensor.dtype)
        result[name] = torch.where(mask, (tensor.to(work) * (1 / (1 - p))).to(tensor.dtype), 0)
    return result


def add(parts, weights):
    """The weighted sum, left to right."""
    total = weights[0] * parts[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + weight * part
    return total


def ties(parts, weights):
    """Elect a sign, average what has it."""
    elected = torch.where(add(parts, weights) < 0, -1, 1)
    total = share = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        has_it = part.sign() == elected
        total = total + has_it * (weight * part)
        share = share + has_it.to(part.dtype) * weight
    return torch.where(share > 0, total / share, 0)


def unit(vector):
    """From its smallest number to its largest, as [0, 1]; 0 where all are equal."""
    low, high = vector.min(), vector.max()
    return (vector - low) / (high - low) if high > low else torch.zeros_like(vector)


def pcb(parts, density, weights, clamp):
    """Parameter competition balancing of flat vectors, by sorts."""
    count = parts[0].numel()
    if count == 0:
        return parts[0]
    total = add(parts, [1.0] * len(parts))
    above = below = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        rising = part.abs().sort().values
        low, high = rising[int(count * clamp)], rising[max(0, int(count * (1 - clamp) - 1))]
        magnitude = part.abs().clamp(low, high)
        score = torch.exp(len(parts) * unit(magnitude) ** 2) * torch.tanh(part * total)
        threshold = score.sort().values[min(count - 1, int(count * (1 - density)))]
        scale = unit(torch.maximum(score, threshold))
        above = above + weight * (part.sign() * magnitude * scale)
        below = below + scale
    return above / below.clamp(min=1e-12)
