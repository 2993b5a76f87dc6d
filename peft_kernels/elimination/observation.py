"""Watching the decoder layers of a model: what goes into each, and the scores of its blocks by queries and keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..nn.decoder_layer import AttentionPart, anatomy_of, missing_parts
from ..nn.selective_layer import SelectiveLayer
from ..nn.token_scores import attention_scores
from ..planning import unwrapped
from ..schedules.layers import transformer_layers
from .gradient import _in_evaluation
from .model import eliminating_layers

Batch: TypeAlias = Tensor | Mapping[str, Any]
"""Token ids int64 `[B, T]`, or what the model is called with."""

Visit: TypeAlias = Callable[[int, Tensor, Mapping[str, Any]], None]
"""Called with a layer's index, its hidden states `[B, T, H]` and its other arguments by name."""


class _Seen(Exception):
    """All layers that are watched have been seen: the rest of the model need not run."""


def arguments(batch: Batch) -> dict[str, Any]:
    """What the model is called with for a batch.

    Raises:
        TypeError: it is neither a tensor of token ids nor a mapping.
    """
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or batch.is_floating_point():
            raise TypeError(f"a batch must be token ids [B, T] or a mapping, got {batch.dtype} {list(batch.shape)}")
        return {"input_ids": batch, "use_cache": False}
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be token ids [B, T] or a mapping, got {type(batch).__name__}")
    return {**batch, "use_cache": False}


@contextmanager
def all_tokens(model: nn.Module) -> Iterator[None]:
    """With the model in evaluation, without a graph, and no layer eliminating tokens."""
    shared = {id(s): s for s in (layer.elimination.selections for layer in eliminating_layers(model).values())}
    with _in_evaluation(model), torch.no_grad():
        before = {key: selections.suspended for key, selections in shared.items()}
        try:
            for selections in shared.values():
                selections.suspended = True
            yield
        finally:
            for key, selections in shared.items():
                selections.suspended = before[key]


def named_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder layer's arguments behind the hidden states, by name."""
    if isinstance(layer, SelectiveLayer):
        return layer.elimination.named(args, kwargs)
    names = tuple(inspect.signature(type(layer).forward).parameters)[2:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def observe(model: nn.Module, layers: Mapping[int, nn.Module], batch: Batch, visit: Visit) -> None:
    """Runs a model on a batch, dense and in evaluation, as far as the last of some decoder layers.

    Args:
        model: not wrapped.
        layers: by index.
        batch: see `Batch`.
        visit: see `Visit`.

    Raises:
        ValueError: the last layer is not called.
    """
    call = arguments(batch)
    last = max(layers)
    with ExitStack() as stack:
        stack.enter_context(all_tokens(model))
        for index, layer in layers.items():

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                values = dict(kwargs)
                hidden = args[0] if args else values.pop("hidden_states")
                visit(index, hidden, named_inputs(module, args[1:], values))
                if index == last:
                    raise _Seen

            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        try:
            model(**call)
        except _Seen:
            return
    raise ValueError("model must call its decoder layers, and the last one that is watched was not called")


class LayerObserver:
    """Calls a model for what goes into its decoder layers.

    Args:
        model: a causal language model with Llama-like decoder layers; it may eliminate tokens, which it then does not.
        layers: indices of the layers to watch; None watches all.

    Raises:
        TypeError, ValueError: there are no such layers, or they have no queries and keys that this library knows.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int] | None = None) -> None:
        self.model = unwrapped(model)
        every = list(transformer_layers(self.model).values())
        wanted = range(len(every)) if layers is None else sorted(set(layers))
        if not wanted:
            raise ValueError("layers must name at least one decoder layer, got none")
        self.layers: dict[int, nn.Module] = {}
        self._parts: dict[int, AttentionPart] = {}
        for index in wanted:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(every):
                raise ValueError(f"layers must be indices of the model's {len(every)} decoder layers, got {index!r}")
            self.layers[index] = every[index]
            self._parts[index] = _attention_part(index, every[index])

    @property
    def hidden_size(self) -> int:
        """H."""
        norm = next(iter(self.layers.values())).get_submodule("input_layernorm")
        return int(norm.weight.shape[0])  # type: ignore[index, union-attr, arg-type]

    def observe(self, batch: Batch, visit: Visit) -> None:
        """Runs the model on a batch as far as the last layer that is watched; see `observe`."""
        observe(self.model, self.layers, batch, visit)

    def true_scores(self, index: int, hidden: Tensor, inputs: Mapping[str, Any], block_size: int) -> Tensor:
        """What score="attention" gives the blocks, float32 or float64 `[B, T // block_size]`.

        Raises:
            ValueError: the sequences are shorter than two blocks, or the layer gets no tables for rotation.
        """
        if hidden.shape[1] < 2 * block_size:
            raise ValueError(
                f"batches must hold sequences of at least two blocks of {block_size} tokens, got {hidden.shape[1]}"
            )
        if inputs.get("position_embeddings") is None:
            raise ValueError(f"decoder layer {index} must get position_embeddings, and gets none")
        layer = self.layers[index]
        h = layer.get_submodule("input_layernorm")(hidden)
        return attention_scores(layer.get_submodule("self_attn"), self._parts[index], h, inputs, block_size)


def _attention_part(index: int, layer: nn.Module) -> AttentionPart:
    missing = missing_parts(layer)
    if missing:
        raise ValueError(f"decoder layer {index} has no {' and no '.join(missing)}")
    part = layer.elimination.anatomy.attention if isinstance(layer, SelectiveLayer) else anatomy_of(layer).attention
    if not isinstance(part, AttentionPart):
        raise ValueError(f"decoder layer {index} has no queries and keys to score blocks by: {part}")
    return part
