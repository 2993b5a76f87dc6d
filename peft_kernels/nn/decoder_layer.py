"""What a Llama-like decoder layer computes, found by the names of its parts and confirmed by asking them.

    x = x + self_attn(input_layernorm(x));  x = x + mlp(post_attention_layernorm(x))

Names alone say little: Gemma 2 has norms behind its blocks, Granite scales what it adds. So a layer is asked with a few
random tokens, and so are its norms, its MLP and its attention, for whatever is to be computed in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .asking import TOKENS, in_evaluation, on_meta, random_like, undisturbed
from .linear import replaced_call, type_name
from .llama_attention import AttentionPart, attention_part, call_attention, causal_mask, rotations
from .swiglu_mlp import SwiGLUMLP, _agree, _question

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
GATED = ("gate_proj", "up_proj", "down_proj")
_EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class RMSNormPart:
    """A norm that is `x / sqrt(mean(x^2) + eps) (offset + weight)`.

    Attributes:
        kind: its class.
        eps: name of the attribute that holds eps.
        offset: 0 or 1.
    """

    kind: type[nn.Module]
    eps: str
    offset: float


@dataclass(frozen=True)
class GatedPart:
    """An MLP that is `down(silu(gate(x)) * up(x))`.

    Attributes:
        kind: its class.
        names: of its gate, up and down layers.
    """

    kind: type[nn.Module]
    names: tuple[str, str, str]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder layer; where one is not what this library computes by itself, why not.

    Attributes:
        first_norm: the norm before attention.
        second_norm: the norm before the MLP.
        attention: the attention.
        mlp: the MLP.
    """

    first_norm: RMSNormPart | str
    second_norm: RMSNormPart | str
    attention: AttentionPart | str
    mlp: GatedPart | str

    def reasons(self) -> dict[str, str]:
        """Why a part is left to its module, by the part's name."""
        parts = zip(PARTS, (self.first_norm, self.attention, self.second_norm, self.mlp), strict=True)
        return {name: part for name, part in parts if isinstance(part, str)}


def missing_parts(layer: nn.Module) -> list[str]:
    """The parts, by name, that a module lacks to be a Llama-like decoder layer."""
    return [name for name in PARTS if layer._modules.get(name) is None]


@torch.no_grad()
def decoder_layer_obstacle(layer: nn.Module) -> str | None:
    """Why a module is not a decoder layer whose halves can be computed for some tokens alone; None when it is.

    It is asked in evaluation and in training; its state and torch's generators are left as they were.
    """
    missing = missing_parts(layer)
    if missing:
        return f"it has no {' and no '.join(missing)}"
    reason = replaced_call(layer)
    if reason is not None:
        return reason
    if on_meta(layer):
        return "it is on the meta device, where it cannot be asked what it computes"
    try:
        return _composition_obstacle(layer)
    except Exception as error:
        return f"it cannot be asked what it computes: {error}"


@torch.no_grad()
def anatomy_of(layer: nn.Module) -> Anatomy:
    """The parts of a module that `decoder_layer_obstacle` found nothing against."""
    first, attention, second, mlp = (layer.get_submodule(name) for name in PARTS)
    return Anatomy(_asked(_norm_part, first), _asked(_norm_part, second), _asked(attention_part, attention), _mlp(mlp))


def _asked(question: Callable[[Any], Any], module: nn.Module) -> Any:
    reason = replaced_call(module)
    if reason is not None:
        return reason
    try:
        for training, mode in ((False, ""), (True, " in training")):
            with undisturbed(module, training):
                answer = question(module)
            if isinstance(answer, str):
                return answer + mode
    except Exception as error:
        return f"it cannot be asked what it computes: {error}"
    return answer


def _like(module: nn.Module) -> Tensor:
    """A parameter that says on which device and in which dtype hidden states come."""
    weight = module._parameters.get("weight")
    return next(module.parameters()) if weight is None else weight


def _composition_obstacle(layer: nn.Module) -> str | None:
    first, attention, second, mlp = (layer.get_submodule(name) for name in PARTS)
    like = _like(first)
    if like.dim() != 1:
        return f"its input_layernorm has a weight of {like.dim()} dimensions"
    states = random_like((1, TOKENS, like.shape[0]), like)
    inputs = {
        "attention_mask": causal_mask(attention, like),
        "position_embeddings": rotations(attention, like),
        "position_ids": torch.arange(TOKENS, device=like.device)[None],
        "past_key_values": None,
        "use_cache": False,
    }
    # Large hidden states show the residual, small ones what is added to it, whatever is rounded.
    for training, x in ((False, states), (False, states * 0.01), (True, states * 0.01)):
        mode = " in training" if training else ""
        with undisturbed(layer, training):
            answer = type(layer).forward(layer, x.clone(), **inputs)
        if not isinstance(answer, Tensor):
            return f"it returns a {type(answer).__name__}, not a tensor"
        with undisturbed(layer, training):
            attended = call_attention(attention, first(x), **inputs)
            y = x + attended
            h = second(y)
            added = mlp(h)
            alone = mlp(h[:, ::3]) if x is states else None
        if not isinstance(added, Tensor):
            return f"its mlp returns a {type(added).__name__}, not a tensor"
        if not attended.any() or not added.any():
            return "its weights are zero, so that it cannot be asked what it computes"
        if not _agree(answer, y + added):
            return (
                f"a {type_name(layer)} does not compute x + self_attn(input_layernorm(x)), then x + "
                f"mlp(post_attention_layernorm(x)){mode}"
            )
        if alone is not None and not _agree(alone, added[:, ::3]):
            return "its mlp mixes tokens"
    return None


def _norm_part(norm: nn.Module) -> RMSNormPart | str:
    weight = norm._parameters.get("weight")
    if set(norm._parameters) != {"weight"} or norm._modules or norm._buffers or weight is None or weight.dim() != 1:
        return f"a {type_name(norm)} holds something else than the weight of an RMSNorm"
    eps = next((name for name in _EPSILONS if isinstance(getattr(norm, name, None), float)), None)
    if eps is None:
        return f"a {type_name(norm)} has no {' or '.join(_EPSILONS)}"
    # Rows of different sizes, so that eps counts in some.
    sizes = torch.logspace(1, -4, TOKENS, device=weight.device)[:, None]
    x = (random_like((TOKENS, weight.shape[0]), weight).float() * sizes).to(weight.dtype)
    answer = norm(x)
    for offset in (0.0, 1.0):
        wide = x.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + getattr(norm, eps)).rsqrt()
        expected = (expected * (weight.double() + offset)).to(x.dtype)
        if all(_agree(row, wanted) for row, wanted in zip(answer, expected, strict=True)):
            return RMSNormPart(type(norm), eps, offset)
    return f"a {type_name(norm)} does not compute x / sqrt(mean(x^2) + eps) weight"


def _mlp(mlp: nn.Module) -> GatedPart | str:
    if isinstance(mlp, SwiGLUMLP):  # which was asked when it took its place, and may leave it
        return GatedPart(mlp.replaced_type, mlp.roles)
    missing = [name for name in GATED if mlp._modules.get(name) is None]
    if missing:
        return f"a {type_name(mlp)} has no {' and no '.join(missing)}"
    return _asked(_gated_part, mlp)  # type: ignore[no-any-return]


def _gated_part(mlp: nn.Module) -> GatedPart | str:
    gate, up, down = (mlp.get_submodule(name) for name in GATED)
    weight = next(parameter for parameter in gate.parameters() if parameter.dim() == 2)
    with in_evaluation((gate, up, down)):  # these run either way, and may drop out channels of their own
        x = _question(gate, weight.new_empty(1, int(gate.in_features)))  # type: ignore[arg-type]
        expected, answer = down(F.silu(gate(x)) * up(x)), mlp(x)
    if not expected.any():
        return "its weights are zero, so that it cannot be asked what it computes"
    if not _agree(answer, expected):
        return f"a {type_name(mlp)} does not compute down(silu(gate(x)) * up(x))"
    return GatedPart(type(mlp), GATED)
