"""A short text sample, to see what training changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .data import BlockStream

_CODE_PROMPT = 'def read_lines(path):\n    """'
_PROMPT_TOKENS = 32
_PARAMETERS_PER_THREAD = 250_000_000


def default_prompt(data: str | None, stream: BlockStream, tokenizer: Any) -> str:
    """What the sample continues: the head of a function for the default corpus, else the start of a block of data."""
    if data is None:
        return _CODE_PROMPT
    block = stream.held_out[0] if len(stream.held_out) else stream.block(0)
    return str(tokenizer.decode(block[:_PROMPT_TOKENS].tolist(), skip_special_tokens=True))


@contextmanager
def _decoding_threads(model: nn.Module) -> Iterator[None]:
    """As many threads as the arithmetic of one token can use; on a busy machine, waiting for more takes far longer."""
    before = torch.get_num_threads()
    useful = 1 + sum(parameter.numel() for parameter in model.parameters()) // _PARAMETERS_PER_THREAD
    torch.set_num_threads(min(before, useful))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def continuation(model: nn.Module, tokenizer: Any, prompt: str, tokens: int, device: torch.device) -> str:
    """The model's greedy continuation of `prompt`, at most `tokens` long; empty when none is asked for."""
    if tokens == 0:
        return ""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    model.eval()
    with torch.no_grad(), _decoding_threads(model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train()
    return str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True))
