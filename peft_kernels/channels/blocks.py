"""Whether a module is an attention block or an MLP, by the names and shapes of the layers in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..nn.linear import is_transposed
from .layers import layer_obstacle, sizes_of
from .units import Attention, Mlp, Span

_QUERY = ("q_proj", "query", "wq", "q")
_KEY = ("k_proj", "key", "wk", "k")
_VALUE = ("v_proj", "value", "wv", "v")
_FUSED = ("qkv_proj", "c_attn")
"""Queries, then keys, then values."""
_FUSED_SOMEHOW = ("query_key_value", "Wqkv", "wqkv", "qkv")
"""Models differ in how they lay these out: some interleave the heads."""
_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o")

_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("wi",), "wo"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
"""Names of the layers that make the channels, the gate first, and of the one that consumes them."""

_BOUND_ARGUMENTS = ("alibi", "position_bias", "position_biases")
"""Arguments of `forward` that hold something for each head by its number."""


@dataclass(frozen=True)
class NotUnderstood:
    """A block or layer that is neither an attention block nor an MLP that we know how to take apart.

    Attributes:
        path: where it sits in the model.
        reason: why it is not understood.
    """

    path: str
    reason: str


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if module._modules.get(name) is not None), None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def attention_in(path: str, module: nn.Module) -> Attention | NotUnderstood | None:
    """The attention block that `module` is; why not, when it looks like one; None when it does not."""
    parts = [_first(module, names) for names in (_QUERY, _KEY, _VALUE)]
    fused = _first(module, _FUSED)
    unknown = _first(module, _FUSED_SOMEHOW)
    if fused is None and unknown is None and sum(part is not None for part in parts) < 2:
        return None
    if fused is None and unknown is not None:
        return NotUnderstood(path, f"models lay {unknown} out in different ways")
    output = _first(module, _OUTPUT)
    inputs = [fused] if fused is not None else parts
    if output is None or None in inputs:
        missing = [role for role, name in zip("qkvo", (*parts, output), strict=True) if name is None]
        return NotUnderstood(path, f"no layer in it is known as {', '.join(missing)}")
    names = [name for name in (*inputs, output) if name is not None]
    reason = _layers_obstacle(module, names) or _other_layer(module, names)
    if reason is not None:
        return NotUnderstood(path, reason)
    shaped = _shaped_attention(path, module, names)
    if isinstance(shaped, str):
        return NotUnderstood(path, shaped)
    return replace(shaped, obstacle=_head_obstacle(shaped, module, names))


def _shaped_attention(path: str, module: nn.Module, names: list[str]) -> Attention | str:
    """The block by the sizes of its layers, or why they do not fit."""
    outputs = [sizes_of(module.get_submodule(name))[0] for name in names[:-1]]
    width = sizes_of(module.get_submodule(names[-1]))[1]
    head_dim = _head_dim(module, width)
    if head_dim is None:
        return "neither head_dim nor num_heads says how large a head is"
    if len(outputs) == 1:
        query, key, value = width, (outputs[0] - width) // 2, (outputs[0] - width) - (outputs[0] - width) // 2
        firsts = (0, query, query + key)
    else:
        query, key, value = outputs
        firsts = (0, 0, 0)
    if query != width or key != value or key <= 0 or width % head_dim or key % head_dim or query % key:
        sizes = ", ".join(f"{name} makes {size}" for name, size in zip(names, outputs, strict=False))
        return f"channels do not fit heads of {head_dim}: {sizes}, {names[-1]} takes {width}"
    heads, key_value_heads = width // head_dim, key // head_dim
    for name, size in (("num_heads", heads), ("num_key_value_groups", heads // key_value_heads)):
        said = getattr(module, name, size)
        if said != size:
            return f"it says {name}={said!r}, but its layers make it {size}"
    layers = [_join(path, name) for name in (names[:-1] * 3 if len(outputs) == 1 else names[:-1])]
    spans = [Span(*span) for span in zip(layers, firsts, (query, key, value), strict=True)]
    return Attention(path, spans[0], spans[1], spans[2], _join(path, names[-1]), heads, key_value_heads, head_dim)


def _head_dim(module: nn.Module, width: int) -> int | None:
    """Channels of a head, from the block's attributes, else from the configuration that it keeps."""
    config = getattr(module, "config", None)
    for source in (module, config):
        for name in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim"):
            size = getattr(source, name, None)
            if isinstance(size, int) and size > 0:
                return size
        for name in ("num_heads", "n_heads", "num_attention_heads"):
            heads = getattr(source, name, None)
            if isinstance(heads, int) and heads > 0 and width % heads == 0:
                return width // heads
    return None


def mlp_in(path: str, module: nn.Module) -> Mlp | NotUnderstood | None:
    """The MLP that `module` holds; why not, when it looks like one; None when it does not."""
    for inputs, output in _MLPS:
        names = [*inputs, output]
        if all(module._modules.get(name) is not None for name in names):
            break
    else:
        parameters = [name for inputs, output in _MLPS for name in (*inputs, output) if name in module._parameters]
        return NotUnderstood(path, f"{parameters[0]} is a parameter of its own, not a layer") if parameters else None
    reason = _layers_obstacle(module, names) or _other_layer(module, names, direct=True)
    if reason is not None:
        return NotUnderstood(path, reason)
    made = [sizes_of(module.get_submodule(name))[0] for name in inputs]
    channels = sizes_of(module.get_submodule(output))[1]
    fused = inputs == ("gate_up_proj",)
    if made != [2 * channels if fused else channels] * len(inputs):
        sizes = ", ".join(f"{name} makes {size}" for name, size in zip(inputs, made, strict=True))
        return NotUnderstood(path, f"channels do not fit: {sizes}, {output} takes {channels}")
    layers = [_join(path, name) for name in inputs]
    gate = Span(layers[0], 0, channels) if fused or len(inputs) == 2 else None
    up = Span(layers[-1], channels if fused else 0, channels)
    obstacle = _channel_obstacle(module, names, channels)
    return Mlp(path, gate, up, _join(path, output), channels, obstacle)


def _layers_obstacle(module: nn.Module, names: list[str]) -> str | None:
    for name in names:
        reason = layer_obstacle(module.get_submodule(name))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _other_layer(module: nn.Module, names: list[str], direct: bool = False) -> str | None:
    """A linear layer in the block that has no known part in it."""
    for name, layer in module.named_children() if direct else module.named_modules():
        if name and name not in names and _is_linear(layer):
            return f"the part of its layer {name} is not known"
    return None


def _others(module: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a block besides those of its layers."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.rpartition(".")[0] not in names:
            yield name, tensor


def _head_obstacle(block: Attention, module: nn.Module, names: list[str]) -> str | None:
    """Why the heads of a block cannot change places: something in it goes by their numbers."""
    buffers = {name for name, _ in module.named_buffers()}
    counts = {block.heads, block.key_value_heads}
    per_head = counts | {count * block.head_dim for count in counts}
    for name, tensor in _others(module, names):
        if name in buffers:  # frequencies of rotary embeddings and causal masks go by channel and position
            bound = tensor.numel() in per_head - {1} and not name.endswith("inv_freq")
        else:  # a norm that all heads share has its parameters in a module of its own, not in one of a list
            shared = "." in name and not any(part.isdigit() for part in name.split("."))
            bound = tensor.numel() > 1 and not (shared and tuple(tensor.shape) == (block.head_dim,))
        if bound:
            return f"{_join(block.path, name)} {list(tensor.shape)} may belong to heads by their numbers"
    for name in inspect.signature(module.forward).parameters:
        if name in _BOUND_ARGUMENTS:
            return f"{block.path or 'the model'} takes {name}, which belongs to heads by their numbers"
    if getattr(getattr(module, "config", None), "num_kv_shared_layers", None):
        return f"{block.path or 'the model'} may share keys and values with other layers (num_kv_shared_layers)"
    return None


def _channel_obstacle(module: nn.Module, names: list[str], channels: int) -> str | None:
    """Why the channels of an MLP cannot change places: something between its layers goes by their numbers."""
    for name, tensor in _others(module, names):
        # A block such as attention beside the layers of the MLP has nothing to do with its channels.
        part = module._modules.get(name.partition(".")[0])
        beside = part is not None and any(_is_linear(inner) for inner in part.modules())
        if not beside and tensor.dim() and tensor.shape[-1] == channels and channels > 1:
            return f"{name} {list(tensor.shape)} may belong to channels by their numbers"
    return None
