"""`causal_lm_loss` beside the model's own loss: values, gradients, memory, and the models that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_kernels as pk

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(tied: bool = False, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, use_cache=False, **settings)).train()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("chunk_size", [None, 7, 1])
def test_it_is_the_models_own_loss_with_its_gradients(tied: bool, chunk_size: int | None, tokens: Tensor) -> None:
    model = llama(tied)
    labels = tokens.clone()
    labels[0, :5] = -100
    labels[2] = -100
    expected = model(input_ids=tokens, labels=labels).loss
    wanted = gradients(model, expected)
    loss = pk.causal_lm_loss(model, tokens, labels, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_inputs_reach_the_decoder_and_sums_are_divided_by_the_number_given(tokens: Tensor) -> None:
    model = llama()
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    inputs = {"attention_mask": mask, "position_ids": torch.arange(5, 18)[None]}
    labels = tokens.masked_fill(mask == 0, -100)
    expected = model(input_ids=tokens, labels=labels, num_items_in_batch=40, **inputs).loss
    loss = pk.causal_lm_loss(model, tokens, labels, num_items_in_batch=40, **inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    embedded = model.get_input_embeddings()(tokens)
    again = pk.causal_lm_loss(model, None, labels, num_items_in_batch=40, inputs_embeds=embedded, **inputs)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)


def test_only_the_tokens_of_a_mask_count(tokens: Tensor) -> None:
    model = llama()
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 4:9] = True
    expected = model(input_ids=tokens, labels=tokens.masked_fill(~mask, -100)).loss
    torch.testing.assert_close(pk.causal_lm_loss(model, tokens, tokens, token_mask=mask), expected)
    other = pk.causal_lm_loss(model, tokens, torch.where(mask, tokens, 7), ignore_index=7, token_mask=mask)
    counted = tokens.masked_fill(~mask | (tokens == 7), -100)
    torch.testing.assert_close(other, model(input_ids=tokens, labels=counted).loss)


def test_tokens_count_by_their_weights(tokens: Tensor) -> None:
    model = llama()
    weights = torch.rand(tokens.shape).masked_fill(torch.rand(tokens.shape) < 0.3, 0.0)
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    losses = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    expected = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    wanted = gradients(model, expected)
    loss = pk.causal_lm_loss(model, tokens, tokens, token_weights=weights)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    summed = pk.causal_lm_loss(model, tokens, tokens, token_weights=weights, num_items_in_batch=5)
    torch.testing.assert_close(summed, expected * weights[:, 1:].sum() / 5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_in_the_decoder_get_the_gradients_of_the_models_loss(checkpointing: bool, tokens: Tensor) -> None:
    model = llama()
    pk.inject(model, pk.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name.lower():
                parameter.normal_(generator=torch.Generator().manual_seed(4))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = gradients(model, model(input_ids=tokens, labels=tokens).loss)
    found = gradients(model, pk.causal_lm_loss(model, tokens, tokens))
    assert len(found) == 2 * 7 * 3 and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_in_peft_is_taken_by_what_it_wraps(tokens: Tensor) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(ValueError, match=r"not a model of transformers; give its get_base_model\(\)"):
        pk.causal_lm_loss(model, tokens, tokens)
    wanted = gradients(model, model(input_ids=tokens, labels=tokens).loss)
    found = gradients(model, pk.causal_lm_loss(model.get_base_model(), tokens, tokens))
    assert len(found) == 2 * 2 * 3 and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_and_autocast_are_close(tokens: Tensor) -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected, loss = model(input_ids=tokens, labels=tokens).loss, pk.causal_lm_loss(model, tokens, tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    model = model.bfloat16()
    expected, loss = model(input_ids=tokens, labels=tokens).loss, pk.causal_lm_loss(model, tokens, tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


def test_eliminated_tokens_are_those_of_the_models_own_call(tokens: Tensor) -> None:
    model = llama()
    pk.inject(model, pk.TokenEliminationConfig(keep_ratio=0.5, layers=[1], block_size=2, score="norm"))
    expected, loss = model(input_ids=tokens, labels=tokens).loss, pk.causal_lm_loss(model, tokens, tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert pk.elimination.report(model).eliminating[0].calls == 2
    dense = pk.causal_lm_loss(model.eval(), tokens, tokens)
    assert abs((dense - loss).item()) > 1e-4


def test_a_loss_without_labels_is_as_the_models(tokens: Tensor) -> None:
    nothing = torch.full_like(tokens, -100)
    assert pk.causal_lm_loss(llama(), tokens, nothing).isnan()
    assert llama()(input_ids=tokens, labels=nothing).loss.isnan()


class LargestLogits(TorchDispatchMode):
    """How many elements the largest result has whose rows are as long as the vocabulary."""

    elements = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.shape[-1] == VOCABULARY:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_holds_all_logits() -> None:
    model = llama()
    pk.inject(model, pk.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.randint(0, VOCABULARY, (1, 640))
    with LargestLogits() as own:
        model(input_ids=tokens, labels=tokens).loss.backward()
    with LargestLogits() as chunked:
        pk.causal_lm_loss(model, tokens, tokens, chunk_size=100).backward()
    assert own.elements == 640 * VOCABULARY
    assert 32 * VOCABULARY < chunked.elements <= 100 * VOCABULARY


def gemma() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0))


def granite() -> nn.Module:
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1))


def adapted_head() -> nn.Module:
    model = llama()
    pk.inject(model, pk.LoraConfig(r=2, target_modules=["lm_head"]))
    return model


def hooked_head() -> nn.Module:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


class OddParameter(nn.Parameter):
    """As libraries of quantised or sharded weights have one."""


def odd_head() -> nn.Module:
    model = llama()
    model.lm_head.weight = OddParameter(model.lm_head.weight.detach())
    return model


def hooked_model() -> nn.Module:
    model = llama()
    model.register_forward_pre_hook(lambda module, args: None)
    return model


def other_forward() -> nn.Module:
    model = llama()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    return model


def other_loss() -> nn.Module:
    model = llama()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gemma, r"it changes its logits \(final_logit_softcapping=30.0\)"),
        (granite, r"it changes its logits \(logits_scaling=8.0\)"),
        (mixtral, r"it adds a loss of its routers \(output_router_logits\)"),
        (t5, "its decoder is not all that is before the output layer"),
        (adapted_head, "its output layer must be a plain nn.Linear, and it has a .*LoRALinear"),
        (odd_head, "its output layer cannot be read: its weight is a OddParameter, not a plain tensor"),
        (hooked_head, "its output layer's forward would be left out, but it has hooks"),
        (hooked_model, "its forward would be left out, but it has hooks"),
        (other_forward, "its forward would be left out, but its forward is replaced"),
        (other_loss, "its loss is <lambda>"),
        (lambda: llama().model, "its output layer must be a plain nn.Linear, and it has none"),
        (lambda: nn.Linear(2, 2), "it is a nn.Linear, not a model of transformers"),
        (lambda: torch.compile(llama()), "it is wrapped by torch.compile or DistributedDataParallel"),
    ],
)
def test_a_model_with_another_loss_is_refused_with_the_reason(make: Any, message: str, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="causal_lm_loss cannot take the place of this model's own loss: " + message):
        pk.causal_lm_loss(make(), tokens, tokens)


def test_a_scale_of_one_is_none(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.0))
    torch.testing.assert_close(
        pk.causal_lm_loss(model, tokens, tokens), model(input_ids=tokens, labels=tokens).loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["logits_to_keep", "return_dict", "shift_labels"])
def test_arguments_about_the_logits_are_refused(name: str, tokens: Tensor) -> None:
    with pytest.raises(TypeError, match=f"causal_lm_loss takes no {name}"):
        pk.causal_lm_loss(llama(), tokens, tokens, **{name: 1})


def test_labels_of_another_shape_are_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="labels"):
        pk.causal_lm_loss(llama(), tokens, tokens[:, 1:])
