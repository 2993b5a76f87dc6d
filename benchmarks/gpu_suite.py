"""What is measured on a GPU: layers of Llama-3-8B, and steps of a Llama of 1.5 billion random weights.

For one GPU of 80 GB. What most matters comes first: a section that runs out of time leaves its last cases out.
"""

from __future__ import annotations

from .harness import Plan
from .suites import (
    BF16,
    DELTA_METHODS,
    FP32,
    CallCase,
    DeltaCase,
    LayerCase,
    S2FTCase,
    S2FTModelCase,
    SparseCase,
    SparseModelCase,
    Suite,
    TokenCase,
    TokenModelCase,
)

_ATTENTION, _UP, _DOWN = (4096, 4096), (4096, 14336), (14336, 4096)
"""In- and out-features of Llama-3-8B's layers."""
_LAYERS = 32
_TOKENS = (16384, 4096)
_RANK = 16
_MODEL = "random:llama-1b"
"""Hidden size 2048, 16 layers, MLP 8192, vocabulary 128256.

Memory of the arms of slices, which are all alive while they take turns, in GB (10^9 bytes): 3.0 of shared weights;
full fine-tuning 1.9 of weights, 1.9 of gradients and 3.9 of moments, bfloat16; 1.9 of weights for the co-permuted arm
and 0.7 for each of the four others that write into theirs; 1.2 of slices, factors, originals and moments. Together 15.
The step that is taking its turn adds the logits of 8192 tokens in bfloat16, in float32 and with their gradients, 17 at
most, and what the decoder keeps, a token and layer 76 KB in the frozen model and 158 KB with LoRA: 21.
So 53 of 84. Sparse deltas need less: 1.9 of weights for each of three arms, and no full fine-tuning.

Token elimination has weights once and factors for seven arms, 0.2 GB each with moments. Of 16384 tokens the arms
without the chunked loss take 25 of logits, bfloat16, float32 and their gradients, and PEFT's layers in a dense decoder
would keep 41; ours keep less. An arm for which memory does not suffice is recorded as failed and costs the others
nothing.
"""


def _s2ft() -> tuple[S2FTCase, ...]:
    shares = (0.03, 0.05)
    sizes = [(M, *layer) for layer in (_DOWN, _ATTENTION) for M in _TOKENS]
    return (
        *(S2FTCase("layer", *size, share, BF16, r=_RANK) for size in sizes for share in shares),
        S2FTCase("switch", 0, *_DOWN, 0.03, BF16, layers=_LAYERS, r=_RANK),
        *(S2FTCase("gradient", *size, share, BF16) for size in sizes for share in shares),
        *(S2FTCase("adamw", 0, *layer, 0.03, BF16) for layer in (_DOWN, _ATTENTION)),
        *(S2FTCase("swiglu", M, *_DOWN, 0.03, BF16) for M in _TOKENS),
        # Output channels of up_proj.
        *(S2FTCase("layer", M, *_UP, 0.03, BF16, dim="output", r=_RANK) for M in _TOKENS),
        *(S2FTCase("gradient", M, *_UP, 0.03, BF16, dim="output") for M in _TOKENS),
        S2FTCase("adamw", 0, *_UP, 0.03, BF16, dim="output"),
    )


def _sparse() -> tuple[SparseCase, ...]:
    sizes = [(M, *layer) for layer in (_ATTENTION, _DOWN) for M in _TOKENS]
    return (
        *(SparseCase("layer", *size, 0.01, BF16) for size in sizes),
        *(SparseCase("gradient", *size, 0.01, BF16) for size in sizes),
        *(SparseCase(name, 0, *layer, 0.01, BF16) for layer in (_ATTENTION, _DOWN) for name in ("adamw", "write")),
    )


def _token() -> tuple[TokenCase, ...]:
    keep = 0.5
    return (
        *(TokenCase("linear", 16384, *_ATTENTION, share, BF16) for share in (keep, 0.25, 0.75)),
        *(TokenCase("linear", 16384, *layer, keep, BF16) for layer in (_UP, _DOWN)),
        *(TokenCase(name, M, 4096, 4096, keep, BF16) for name in ("norm", "scatter") for M in _TOKENS),
        *(TokenCase("scores", M, 4096, 1024, 1.0, BF16, 128) for M in _TOKENS[::-1]),
        *(TokenCase("loss", M, 4096, 128256, 1.0, BF16) for M in (8192, 4096)),
    )


def gpu() -> Suite:
    """The suite of a GPU."""
    brief = Plan(warmup=3, min_rounds=11, max_rounds=101, seconds=0.7)
    return Suite(
        name="gpu",
        device_type="cuda",
        layers=tuple(
            LayerCase(8192, *layer, r, BF16, p)
            for layer in (_ATTENTION, _UP, _DOWN)
            for r in (16, 64)
            for p in (0.0, 0.1)
        ),
        layer_plan=Plan(warmup=5, min_rounds=11, max_rounds=51, seconds=4.0),
        calls=tuple(CallCase(1, 64, 64, 16, p, iterations=100) for p in (0.0, 0.1)),
        call_plan=Plan(warmup=2, min_rounds=15, max_rounds=31, seconds=5.0),
        sparse=_sparse(),
        sparse_plan=brief,
        sparse_models=tuple(SparseModelCase(_MODEL, batch, 2048, None, 0.01, BF16) for batch in (4, 1)),
        s2ft=_s2ft(),
        s2ft_plan=brief,
        s2ft_models=tuple(S2FTModelCase(_MODEL, batch, 2048, 0.03, 0.05, _RANK, BF16) for batch in (4, 1)),
        tokens=_token(),
        token_plan=brief,
        token_models=tuple(TokenModelCase(_MODEL, 1, tokens, 0.5, _RANK, BF16) for tokens in (8192, 16384)),
        model_plan=Plan(warmup=3, min_rounds=9, max_rounds=41, seconds=10.0),
        backends=("reference", "triton", "cuda"),
        memory_of_model=True,
        deltas=tuple(DeltaCase("smollm2-135m", name, 0.05, FP32) for name in DELTA_METHODS),
        delta_plan=Plan(warmup=1, min_rounds=3, max_rounds=5, seconds=10.0),
    )
