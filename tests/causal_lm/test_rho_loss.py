"""`causal_lm_token_losses` and `rho_loss` against all of the model's logits: values, choice, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk

from .test_causal_lm_loss import VOCABULARY, LargestLogits, adapted_head, gemma, gradients, llama


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[0, :5] = -100
    labels[2, 7] = -100
    return labels


def own_losses(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label at the label's place, from all logits."""
    logits = model(input_ids=tokens).logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(labels), -1), (1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_of_tokens_are_those_of_all_logits(dtype: torch.dtype, tokens: Tensor, labels: Tensor) -> None:
    model = llama().to(dtype)
    losses = pk.causal_lm_token_losses(model, tokens, labels, chunk_size=7)
    expected = own_losses(model, tokens, labels).detach()
    assert losses.dtype == torch.float32 and losses.shape == labels.shape and not losses.requires_grad
    torch.testing.assert_close(losses, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
    counted = F.pad(labels[:, 1:] != -100, (1, 0))
    assert (losses[counted] > 0).all() and not losses[~counted].any()
    masked = pk.causal_lm_token_losses(model, tokens, labels, token_mask=counted & (tokens > 20))
    torch.testing.assert_close(masked, torch.where(tokens > 20, losses, 0.0))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("ratio", [0.05, 0.6, 1.0])
def test_the_loss_is_the_mean_of_the_selected_ones(tied: bool, ratio: float, tokens: Tensor, labels: Tensor) -> None:
    model = llama(tied)
    reference = torch.randperm(tokens.numel()).view(tokens.shape) * 30.0  # no rounding changes the choice
    losses = own_losses(model, tokens, labels)
    counted = F.pad(labels[:, 1:] != -100, (1, 0))
    number = -int(-ratio * counted.sum() // 1)
    excess = torch.where(counted, losses - reference, -torch.inf).flatten()
    expected = losses.flatten()[excess.topk(number).indices].mean()
    wanted = gradients(model, expected)
    loss = pk.rho_loss(model, tokens, labels, reference.half(), ratio, chunk_size=7)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    summed = pk.rho_loss(model, tokens, labels, reference, ratio, num_items_in_batch=50)
    torch.testing.assert_close(summed, expected * number / 50)


def test_the_parts_make_the_whole(tokens: Tensor, labels: Tensor) -> None:
    model, reference = llama(), llama(hidden_act="relu")
    references = pk.causal_lm_token_losses(reference, tokens, labels)
    losses = pk.causal_lm_token_losses(model, tokens, labels)
    mask = pk.select_excess_tokens(losses, references, 0.4, labels, shift=True)
    expected = pk.causal_lm_loss(model, tokens, labels, token_mask=mask)
    torch.testing.assert_close(pk.rho_loss(model, tokens, labels, references, 0.4), expected, rtol=0, atol=0)
    allowed = torch.rand(tokens.shape) < 0.5
    mask = pk.select_excess_tokens(losses, references, 0.4, labels, shift=True, token_mask=allowed)
    assert not (mask & ~allowed).any()
    expected = pk.causal_lm_loss(model, tokens, labels, token_mask=mask)
    found = pk.rho_loss(model, tokens, labels, references, 0.4, token_mask=allowed)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_decoder_is_called_once_with_its_inputs(tokens: Tensor, labels: Tensor) -> None:
    model = llama(attention_dropout=0.3)
    calls = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    mask = torch.ones_like(tokens)
    pk.rho_loss(model, tokens, labels, torch.zeros(tokens.shape), attention_mask=mask).backward()
    assert len(calls) == 1 and calls[0]["attention_mask"] is mask


def test_a_model_without_its_adapters_is_a_reference(tokens: Tensor) -> None:
    import peft

    base = llama().eval()
    expected = pk.causal_lm_token_losses(base, tokens, tokens)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for accelerated in (False, True):
        if accelerated:
            pk.accelerate(model)
        adapted = pk.causal_lm_token_losses(model.get_base_model(), tokens, tokens)
        with model.disable_adapter():
            without = pk.causal_lm_token_losses(model.get_base_model(), tokens, tokens)
        torch.testing.assert_close(without, expected)
        assert (adapted - expected).abs().max() > 1e-3
        loss = pk.rho_loss(model.get_base_model(), tokens, tokens, without, 0.5)
        assert len(gradients(model, loss)) == 2 * 3


def test_no_label_is_nan(tokens: Tensor) -> None:
    nothing = torch.full_like(tokens, -100)
    assert not pk.causal_lm_token_losses(llama(), tokens, nothing).any()
    assert pk.rho_loss(llama(), tokens, nothing, torch.zeros(tokens.shape)).isnan()


def test_no_tensor_holds_all_logits() -> None:
    model = llama()
    pk.inject(model, pk.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.randint(0, VOCABULARY, (1, 640))
    with LargestLogits() as chunked:
        references = pk.causal_lm_token_losses(model, tokens, tokens, chunk_size=100)
        pk.rho_loss(model, tokens, tokens, references, 0.6, chunk_size=100).backward()
    assert 32 * VOCABULARY < chunked.elements <= 100 * VOCABULARY


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 2}, ValueError, r"ratio must be in \[0, 1\], got 2"),
        (
            {"reference_losses": torch.ones(3, 12)},
            ValueError,
            r"reference_losses must be floating \[3, 13\], as labels",
        ),
        ({"reference_losses": torch.ones(3, 13).int()}, ValueError, r"got int32 \[3, 13\]"),
        ({"shift_labels": True}, TypeError, "takes no shift_labels, which is for the model's own forward"),
        ({"model": gemma()}, ValueError, "cannot take the place of this model's own loss: it changes its logits"),
        ({"model": adapted_head()}, ValueError, "its output layer must be a plain nn.Linear"),
    ],
)
def test_refused_before_anything_runs(
    changes: dict[str, Any], error: type[Exception], message: str, tokens: Tensor
) -> None:
    model = llama()
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the decoder was called"))
    arguments: dict[str, Any] = {"model": model, "input_ids": tokens, "labels": tokens}
    arguments |= {"reference_losses": torch.zeros(tokens.shape), "ratio": 0.6, **changes}
    with pytest.raises(error, match=f"rho_loss.*{message}"):
        pk.rho_loss(**arguments)
    if "model" in changes:
        with pytest.raises(
            error, match=f"causal_lm_token_losses {message}" if message.startswith("cannot") else message
        ):
            pk.causal_lm_token_losses(changes["model"], tokens, tokens)
