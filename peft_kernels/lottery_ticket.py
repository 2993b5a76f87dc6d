"""LT-SFT, sparse fine-tuning in two phases: train everything, keep the positions that changed most, start again there.

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ...                                     # phase 1: full fine-tuning of model
    positions = lottery_ticket_positions(model, before, density=0.01)
    rewind(model, before)
    for path, indices in positions.items():
        layer = nn.SparseDeltaLinear.from_linear(model.get_submodule(path), indices=indices)
        ...                                 # put it in place; phase 2: train its values

Source: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .nn.positions import index_dtype, number_of
from .planning import unwrapped

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS


@torch.no_grad()
def lottery_ticket_positions(
    model: nn.Module,
    before: Mapping[str, Tensor],
    *,
    density: float | None = None,
    num_deltas: int | None = None,
    layers: Iterable[str] | None = None,
    per_layer: bool = False,
) -> dict[str, Tensor]:
    """The positions whose weights have changed most, in each linear layer; the model is not changed.

    The `num_deltas` largest `|weight - before|` of all layers together, by an exact threshold: of equal changes the one
    in the earlier layer comes first, then the one at the smaller position. A change is formed in float32 (float64 for
    float64 weights). One layer's changes are held at a time.

    Args:
        model: after training, with plain `nn.Linear` layers.
        before: the weights before training by their names in `state_dict`; others in it do not matter.
        density: share of the entries of all these layers to choose, in (0, 1].
        num_deltas: or their number. One of the two.
        layers: paths of the layers; None means every `nn.Linear` whose weight is in `before`.
        per_layer: True chooses that share, or number, in each layer by itself.

    Returns:
        Sorted positions `n K + k` by path, on the weight's device, for `SparseDeltaLinear.from_linear`; a layer in
        which none is chosen is left out.

    Raises:
        ValueError: a number is out of range, a path names no `nn.Linear`, a weight is missing in `before` or has
            another shape, or a change is NaN.
    """
    weights = _weights(unwrapped(model), before, layers)
    sizes = {path: weight.numel() for path, (weight, _) in weights.items()}
    if per_layer:
        groups = [[path] for path in weights]
        counts = [number_of(sizes[path], density, num_deltas) for path in weights]
    else:
        groups = [list(weights)]
        counts = [number_of(sum(sizes.values()), density, num_deltas)]
    chosen: dict[str, Tensor] = {}
    for paths, count in zip(groups, counts, strict=True):
        chosen.update(_largest({path: weights[path] for path in paths}, count))
    return chosen


@torch.no_grad()
def rewind(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Gives the model's parameters and buffers the bits they had before, in place.

    Args:
        model: of any layers.
        before: tensors by their names in `state_dict`; what is not in it stays as it is.

    Raises:
        ValueError: a name is not the model's, or a tensor has another shape or dtype; nothing has changed then.
    """
    state = unwrapped(model).state_dict(keep_vars=True)
    for name, tensor in before.items():
        if name not in state:
            raise ValueError(f"before must hold the model's tensors only, but it has no {name}")
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise ValueError(
                f"before must hold {name} as {state[name].dtype} {list(state[name].shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    for name, tensor in before.items():
        state[name].copy_(tensor)


def _weights(
    model: nn.Module, before: Mapping[str, Tensor], layers: Iterable[str] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's weight now and before, by path."""
    modules = dict(model.named_modules())
    if layers is None:
        paths = [path for path, module in modules.items() if type(module) is nn.Linear and _weight(path) in before]
        if not paths:
            raise ValueError("before must hold the weight of an nn.Linear of the model, and holds none")
    else:
        paths = list(dict.fromkeys(layers))
    found = {}
    for path in paths:
        module = modules.get(path)
        if module is None or type(module) is not nn.Linear:
            kind = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"layers must be paths of nn.Linear layers, but {path!r} is {kind}")
        earlier = before.get(_weight(path))
        if earlier is None:
            raise ValueError(f"before must hold {_weight(path)}, the weight of a layer to choose in")
        if earlier.shape != module.weight.shape:
            raise ValueError(
                f"before must hold {_weight(path)} as {list(module.weight.shape)}, got {list(earlier.shape)}"
            )
        found[path] = (module.weight.detach(), earlier)
    return found


def _weight(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def _magnitudes(path: str, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """`|weight - before|` in `dtype` as integers `[numel]` of the same order: their bits, as none is negative."""
    weight, before = pair
    change = (weight.to(dtype) - before.to(weight.device, dtype)).abs().flatten()
    if bool(change.isnan().any()):
        raise ValueError(f"the change of {_weight(path)} is NaN somewhere")
    return change.view(torch.int64 if dtype == torch.float64 else torch.int32)


def _largest(weights: dict[str, tuple[Tensor, Tensor]], count: int) -> dict[str, Tensor]:
    """Sorted positions of the `count` largest changes by path, without the empty ones."""
    if count == 0:
        return {}
    wide = any(tensor.dtype == torch.float64 for pair in weights.values() for tensor in pair)
    dtype = torch.float64 if wide else torch.float32
    least, level = _threshold(weights, count, dtype)
    chosen = {}
    for path, pair in weights.items():
        magnitudes = _magnitudes(path, pair, dtype)
        above = (magnitudes > least).nonzero().view(-1)
        equal = (magnitudes == least).nonzero().view(-1)[:level]
        level -= equal.numel()
        positions = torch.cat((above, equal)).sort().values
        if positions.numel():
            chosen[path] = positions.to(index_dtype(magnitudes.numel()))
    return chosen


def _threshold(weights: dict[str, tuple[Tensor, Tensor]], count: int, dtype: torch.dtype) -> tuple[int, int]:
    """The `count`-th largest magnitude's bits, and how many of that magnitude are among the `count` largest.

    Found digit by digit, each by a histogram of the magnitudes that share the digits before it.
    """
    first = 8 * dtype.itemsize - _DIGIT_BITS
    prefix, wanted = 0, count
    for shift in range(first, -1, -_DIGIT_BITS):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        for path, pair in weights.items():
            digits = _magnitudes(path, pair, dtype) >> shift
            if shift < first:
                digits = digits[(digits >> _DIGIT_BITS) == prefix] & (_DIGITS - 1)
            histogram += torch.bincount(digits, minlength=_DIGITS).cpu()
        larger = histogram.sum() - histogram.cumsum(0)
        digit = int((larger < wanted).nonzero()[0])
        wanted -= int(larger[digit])
        prefix = (prefix << _DIGIT_BITS) + digit
    return prefix, wanted
