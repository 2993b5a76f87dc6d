"""What a backward pass costs, tensor by tensor, found in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..planning import shortened, unwrapped


@dataclass(frozen=True)
class TensorCost:
    """A parameter's part in the backward pass.

    Attributes:
        level: where it is used first, counted from the model's input.
        weight_gradient: FLOPs of its own gradient, over all its uses.
    """

    level: int
    weight_gradient: int


@dataclass(frozen=True)
class BackwardFlops:
    """Backward FLOPs of a model for one batch.

    Levels are the model's operations in the order of the forward pass, where modules that read the same tensor (query,
    key and value; gate and up) share one. The gradient of a parameter of level l is its own product, and needs the
    gradients of the activations in all levels above l. So a set of parameters S costs

        sum over S of weight_gradient  +  sum over levels above the lowest of S of activation_gradients

    For a transformer whose layers follow each other this is what autograd does. Where branches run in parallel it is
    an upper bound.

    Attributes:
        tensors: by the parameter's name.
        activation_gradients: FLOPs of passing the gradient through each level to its input.
        uncounted: paths of modules with frozen parameters of a type whose FLOPs are not known; taken as 0.
    """

    tensors: Mapping[str, TensorCost]
    activation_gradients: tuple[int, ...]
    uncounted: tuple[str, ...] = ()

    def passing_to(self, level: int) -> int:
        """FLOPs of having the gradients of `level`'s outputs."""
        return sum(self.activation_gradients[level + 1 :])

    def of(self, names: Collection[str]) -> int:
        """FLOPs of the backward pass in which the parameters `names` train."""
        chosen = [self.tensors[name] for name in names]
        if not chosen:
            return 0
        return sum(cost.weight_gradient for cost in chosen) + self.passing_to(min(cost.level for cost in chosen))

    @property
    def full(self) -> int:
        """FLOPs of the backward pass in which all of them train."""
        return self.of(self.tensors.keys())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "tensors": {name: [cost.level, cost.weight_gradient] for name, cost in self.tensors.items()},
            "activation_gradients": list(self.activation_gradients),
            "uncounted": list(self.uncounted),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BackwardFlops:
        """What `to_dict` wrote."""
        tensors = {name: TensorCost(*numbers) for name, numbers in record["tensors"].items()}
        return cls(tensors, tuple(record["activation_gradients"]), tuple(record["uncounted"]))


@torch.enable_grad()
def profile_backward_flops(model: nn.Module, sample_batch: Any, names: Collection[str] | None = None) -> BackwardFlops:
    """Counts the FLOPs of a backward pass by running one forward pass and looking at shapes.

    With M rows of activations, a multiplication and an addition being 2 FLOPs:

    | module | weight gradient | bias gradient | activation gradient |
    | --- | --- | --- | --- |
    | nn.Linear and transformers' Conv1D, K to N | 2 M N K | M N | 2 M N K |
    | nn.Embedding of width K | M K | | 0 |
    | LayerNorm of width K | 2 M K | M K | 8 M K |
    | RMSNorm of width K | 2 M K | | 6 M K |

    Products of two activations with a gradient count in full, whatever a mask leaves out: attention scores
    `[T, S]` of one head of width d cost 2 T S d for each of the gradients of query, key, probabilities and value. They
    are found where they go through `scaled_dot_product_attention`, `matmul`, `bmm` or `baddbmm`. Activation functions,
    residual sums, softmax and loss are not counted, nor are attention kernels of other libraries.

    The model is run in evaluation mode and left as it was; no random number of torch's is used up.

    Args:
        model: on the device of the batch; parameters to be counted require a gradient.
        sample_batch: what one call takes: a mapping of keyword arguments, a sequence of positional ones or a tensor.
            The share of a tensor in the whole depends on the sequence's length, hardly on the number of sequences.
        names: parameters to count; None for all that require a gradient.

    Raises:
        ValueError: a parameter to be counted is in a module of another type, or the batch does not reach it.
    """
    model = unwrapped(model)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)}
    recorder = _Recorder(model, {id(parameter): name for name, parameter in wanted.items()})
    modes = {module: module.training for module in model.modules()}
    handles = [m.register_forward_hook(recorder.ran, with_kwargs=True) for m in modes if _own(m) or _is_bare_norm(m)]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.random.fork_rng(devices=sorted(devices)), _Products(recorder):
            if isinstance(sample_batch, Mapping):
                model(**sample_batch)
            elif isinstance(sample_batch, Sequence):
                model(*sample_batch)
            else:
                model(sample_batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if recorder.unknown:
        raise ValueError(
            "FLOPs are known of nn.Linear, nn.Embedding, norms and transformers' Conv1D; freeze with "
            "requires_grad_(False) what is in other modules: " + shortened(sorted(recorder.unknown), ", ")
        )
    unreached = [name for name in wanted if name not in recorder.first]
    if unreached:
        raise ValueError(
            "sample_batch must reach every parameter that may train; freeze what it does not reach, or give another: "
            + shortened(unreached, ", ")
        )
    tensors = {name: TensorCost(recorder.first[name], recorder.products[name]) for name in wanted}
    return BackwardFlops(tensors, tuple(recorder.levels), tuple(sorted(recorder.uncounted)))


def _own(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


class _Recorder:
    """Levels and costs, in the order of the forward pass."""

    def __init__(self, model: nn.Module, names: dict[int, str]) -> None:
        self.names = names
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.levels: list[int] = []
        self.first: dict[str, int] = {}
        self.products: dict[str, int] = {}
        self.unknown: set[str] = set()
        self.uncounted: set[str] = set()
        # Level by the tensor that its modules read. The version tells apart what was changed in place.
        self._readers: dict[int, tuple[ReferenceType[Tensor], int, int]] = {}

    def ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Takes a module's call down."""
        path = self.paths[id(module)]
        own = {name: self.names.get(id(module._parameters[name])) for name in _own(module)}
        count = next((count for is_kind, count in _COSTS if is_kind(module)), None)
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if count is None or inputs is None:
            counted = {f"{path}.{name}" for name, known in own.items() if known is not None}
            self.unknown |= counted
            self.uncounted |= set() if counted else {path}
            return
        result = output if isinstance(output, Tensor) else output[0]
        gradients, activations = count(module, inputs, result)
        level = self._level(inputs)
        self.levels[level] += activations
        for name, known in own.items():
            if known is not None:
                self.first[known] = min(level, self.first.get(known, level))
                self.products[known] = self.products.get(known, 0) + gradients[name]

    def product(self, flops: int) -> None:
        """Takes a product of activations down, which is a level of its own."""
        if flops:
            self.levels.append(flops)

    def _level(self, inputs: Any) -> int:
        seen = self._readers.get(id(inputs))
        version = int(inputs._version)
        if seen is not None and seen[0]() is inputs and seen[1] == version:
            return seen[2]
        self.levels.append(0)
        self._readers[id(inputs)] = (ref(inputs), version, len(self.levels) - 1)
        return len(self.levels) - 1


class _Products(TorchFunctionMode):
    """Watches for products of two activations."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.recorder.product(_attention(given["query"], given["key"], given["value"]))
        elif func in _MATMULS:
            first, second = _MATMULS[func](args, kwargs)
            inner = first.shape[-1]
            self.recorder.product(2 * result.numel() * inner * (first.requires_grad + second.requires_grad))
        return result


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Gradients of query, key, probabilities and value: four products at most."""
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    asked = query.requires_grad or key.requires_grad
    widths = query.shape[-1] * (query.requires_grad + key.requires_grad) + value.shape[-1] * (
        asked + value.requires_grad
    )
    return 2 * scores * widths


def _two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first, second = (*args, *kwargs.values())[:2]
    return first, second


def _last_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
    return given["batch1"], given["batch2"]


_MATMULS: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    torch.matmul: _two,
    torch.bmm: _two,
    Tensor.matmul: _two,
    Tensor.bmm: _two,
    Tensor.__matmul__: _two,
    torch.baddbmm: _last_two,
    Tensor.baddbmm: _last_two,
}

_Cost = tuple[dict[str, int], int]


def _linear(module: nn.Module, inputs: Tensor, output: Tensor) -> _Cost:
    product = 2 * inputs.numel() * output.shape[-1]
    return {"weight": product, "bias": output.numel()}, product


def _embedding(module: nn.Module, inputs: Tensor, output: Tensor) -> _Cost:
    return {"weight": output.numel()}, 0


def _norm(module: nn.Module, inputs: Tensor, output: Tensor) -> _Cost:
    # dx of an RMSNorm: g w, (g w) x, its sum, x times that, a difference, times the scale. A LayerNorm has a mean more.
    work = 6 if "rms" in type(module).__name__.lower() else 8
    return {"weight": 2 * output.numel(), "bias": output.numel()}, work * output.numel()


def _is_conv1d(module: nn.Module) -> bool:
    # By name: transformers need not be installed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and set(_own(module)) <= {"weight", "bias"}


def _is_bare_norm(module: nn.Module) -> bool:
    """A norm without parameters, and not a module around one."""
    return _is_norm(module) and not module._modules


_COSTS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, Tensor, Tensor], _Cost]], ...] = (
    (lambda module: isinstance(module, nn.Linear) and set(_own(module)) <= {"weight", "bias"}, _linear),
    (_is_conv1d, _linear),
    (lambda module: isinstance(module, nn.Embedding), _embedding),
    (_is_norm, _norm),
)
