"""What token elimination is compared with in a training step of a whole model with LoRA in every linear of the decoder.

    frozen model                               no adapter, all tokens
    ours, dense                                `pk.inject` with a LoraConfig, all tokens, the model's own loss
    ours, dense, chunked loss                  the same with `pk.causal_lm_loss`
    ours, dense, checkpointing                 "ours, dense" with each decoder layer recomputed in backward
    ours, kept by norm                         `pk.inject` with a TokenEliminationConfig on top, chunked loss
    ours, kept by attention                    the same with the default score
    plain PyTorch, kept by norm                PEFT's LoRA, `plain_tokens.py` in the layers, the model's own loss
    plain PyTorch over ours, kept by norm      the same over our LoRA with the chunked loss: what is left is what the
                                               kernels for rows bring

All have the same factors. Arms that keep by norm begin with the same selection, so their first losses must agree; so
must those of the dense arms. The base weights are shared. The optimizer is the fused AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import peft_kernels as pk

from .limits import Shape
from .lora_arms import set_adapter_values
from .model_arms import FROZEN, TARGETS, ArmFamily, ModelArm, bare_model
from .plain_tokens import PlainElimination
from .suites import TokenModelCase

DENSE = "ours, dense"
DENSE_CHUNKED = "ours, dense, chunked loss"
CHECKPOINTED = "ours, dense, checkpointing"
BY_NORM = "ours, kept by norm"
BY_ATTENTION = "ours, kept by attention"
PLAIN = "plain PyTorch, kept by norm"
PLAIN_OVER_OURS = "plain PyTorch over ours, kept by norm"
PLAIN_ARMS = (PLAIN, PLAIN_OVER_OURS)
_CHUNKED = (DENSE_CHUNKED, BY_NORM, BY_ATTENTION, PLAIN_OVER_OURS)
_SCORES = {BY_NORM: "norm", BY_ATTENTION: "attention"}


def arm_names(case: TokenModelCase) -> tuple[str, ...]:
    """The arms of a case."""
    return (FROZEN, DENSE, DENSE_CHUNKED, CHECKPOINTED, BY_NORM, BY_ATTENTION, PLAIN, PLAIN_OVER_OURS)


def same_loss(case: TokenModelCase, name: str) -> str | None:
    """The dense arm's for those without elimination, ours for those that keep by norm."""
    if name in PLAIN_ARMS:
        return BY_NORM
    return DENSE if name in (DENSE_CHUNKED, CHECKPOINTED) else None


def eliminating_layers(case: TokenModelCase, count: int) -> range:
    """Which of `count` decoder layers compute for kept tokens alone."""
    return range(case.dense_first, count - case.dense_last)


def _with_adapter(name: str, model: Any, case: TokenModelCase) -> Any:
    settings: dict[str, Any] = {"r": case.r, "lora_alpha": 2 * case.r, "target_modules": list(TARGETS)}
    if name != PLAIN:
        pk.inject(model, pk.LoraConfig(**settings))
        return model
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


def _eliminate(name: str, model: Any, case: TokenModelCase) -> None:
    if name in _SCORES:
        config = pk.TokenEliminationConfig(
            keep_ratio=case.keep,
            score=_SCORES[name],  # type: ignore[arg-type]
            block_size=case.block_size,
            dense_first=case.dense_first,
            dense_last=case.dense_last,
        )
        report = pk.inject(model, config)
        own = {layer.path: layer.own_parts for layer in report.eliminating if layer.own_parts}
        if len(report.eliminating) != len(eliminating_layers(case, len(report.layers))) or own:
            raise RuntimeError(f"this arm would not be what its name says:\n{report}")
    elif name in PLAIN_ARMS:
        layers = model.get_decoder().layers
        for index in eliminating_layers(case, len(layers)):
            layers[index] = PlainElimination(layers[index], case.keep, case.block_size)


def build(name: str, base: nn.Module, case: TokenModelCase) -> ModelArm:
    """The arm `name` over the parameters of `base`, which itself stays as it is."""
    model = bare_model(base)
    if name == FROZEN:
        return ModelArm(name, model.train(), None)
    model = _with_adapter(name, model, case)
    arm = ModelArm(name, model, None, chunked_loss=name in _CHUNKED)
    parameters = arm.trainable()
    set_adapter_values(parameters)
    if name == CHECKPOINTED:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    _eliminate(name, model, case)
    model.train()
    arm.optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-4, fused=True)
    return arm


def ideal_ratio(model: nn.Module, case: TokenModelCase) -> float:
    """Operations with elimination over operations without, selection left out.

    Linears with their adapters are for a share of the tokens, attention for the same share of both queries and keys:
    two products forward and five backward, of which one is formed again, each for half of all pairs. The output layer
    and the dense layers are for all tokens.
    """
    config: Any = model.config
    blocks = case.sequence_length // case.block_size
    kept = pk.ops.kept_tokens(case.sequence_length, case.keep, case.block_size) if blocks else case.sequence_length
    layers = eliminating_layers(case, config.num_hidden_layers)
    full = kept_only = 0.0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        adapted = name.rpartition(".")[2] in TARGETS
        costs = []
        for tokens in (case.sequence_length, kept if adapted and _layer_of(name) in layers else case.sequence_length):
            shape = Shape(tokens, module.in_features, module.out_features, case.r, module.weight.element_size())
            costs.append(shape.frozen_operations(True) + (shape.added_operations(True) if adapted else 0))
        full, kept_only = full + costs[0], kept_only + costs[1]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        per_pair = 7 * config.num_attention_heads * head
        full += per_pair * case.sequence_length**2
        kept_only += per_pair * (kept if index in layers else case.sequence_length) ** 2
    return kept_only / full


def _layer_of(path: str) -> int:
    """The number of the decoder layer that a module is in."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


TOKENS = ArmFamily(
    arm_names,
    build,
    ideal_ratio,
    lambda case: DENSE,
    same_loss,
    "torch.optim.AdamW(lr=1e-4, fused=True) on the adapter; none for the frozen model",
    bases=(BY_NORM,),
)
