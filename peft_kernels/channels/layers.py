"""Linear layers seen alike: `nn.Linear`, and transformers' `Conv1D`, which keeps its weight transposed.

Whatever a layer stores, its weight is W `[N, K]` here: N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..nn.linear import is_transposed, type_name, weight_obstacle


def layer_obstacle(layer: nn.Module) -> str | None:
    """Why the layer is not a plain linear one, with a weight and perhaps a bias and nothing else; None when it is."""
    if not isinstance(layer, nn.Linear) and not is_transposed(layer):
        return f"it is a {type_name(layer)}, not a linear layer"
    reason = weight_obstacle(layer)
    if reason is not None:
        return reason
    if layer._modules or layer._buffers or not set(layer._parameters) <= {"weight", "bias"}:
        return "it holds more than weight and bias"
    if isinstance(layer, nn.Linear) and tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
        return f"its weight is {list(layer.weight.shape)}, not [{layer.out_features}, {layer.in_features}]"
    return None


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight W `[N, K]`, detached: the parameter's own memory, transposed where it is kept so."""
    weight = layer.get_parameter("weight").detach()
    return weight.t() if is_transposed(layer) else weight


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """N and K."""
    rows, columns = weight_of(layer).shape
    return rows, columns


def squared_norms(matrix: Tensor, dim: str) -> Tensor:
    """Sums of squares of a matrix's rows (`dim="output"`) or columns (`"input"`), in float64 on the CPU.

    A few rows at a time, so that no copy of the matrix in float64 is made.
    """
    rows = 512
    blocks = (matrix[first : first + rows].double().square() for first in range(0, matrix.shape[0], rows))
    if dim == "output":
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(block.sum(1).cpu() for block in blocks)])
    total = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for block in blocks:
        total += block.sum(0)
    return total.cpu()


def shared_parameters(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Parameters of the layers at `paths` that are also used elsewhere in the model: their names, and the other's.

    Elsewhere is another module, or the same one inside another: both may use the weight in their own way.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[object, dict[tuple[int, int, str], tuple[str, int, int]]] = {}
    for path, module in modules.items():
        owner = id(modules[path.rpartition(".")[0]])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                memory, first, end = _extent(parameter)
                place = (owner, id(module), name)
                uses.setdefault(memory, {}).setdefault(place, (f"{path}.{name}" if path else name, first, end))
    wanted = {f"{path}.{name}" for path in paths for name in ("weight", "bias")}
    found: dict[str, str] = {}
    for places in uses.values():
        for here in places.values():
            for other in places.values():
                if here is not other and here[0] in wanted and here[1] < other[2] and other[1] < here[2]:
                    found.setdefault(here[0], other[0])
    return found


def _extent(parameter: Tensor) -> tuple[object, int, int]:
    """What a parameter lies in, its first byte there and the one after its last."""
    if parameter.is_meta or type(parameter.data) is not Tensor or not parameter.untyped_storage().data_ptr():
        return id(parameter), 0, 1
    steps = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    first = parameter.data_ptr()
    end = first + (steps + 1) * parameter.element_size() * bool(parameter.numel())
    return (parameter.device, parameter.untyped_storage().data_ptr()), first, end
