"""What each suite measures: shapes, dtypes, dropout and how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .harness import Plan

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class LayerCase:
    """One LoRA linear: M tokens, K in_features, N out_features, rank r."""

    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    dropout_p: float


@dataclass(frozen=True)
class ModelCase:
    """One training step of a whole model: every linear of the decoder carries an adapter of rank r."""

    model: str
    batch_size: int
    sequence_length: int
    r: int
    dtype: torch.dtype
    dropout_p: float


@dataclass(frozen=True)
class SparseModelCase:
    """The same with a sparse delta in every linear of the decoder, as many entries in all as LoRA of rank r has
    parameters, or a share of each weight's; one of the two."""

    model: str
    batch_size: int
    sequence_length: int
    r: int | None
    density: float | None
    dtype: torch.dtype


@dataclass(frozen=True)
class S2FTModelCase:
    """The same with slices: a share `down` of the MLPs' channels and a share `o` of the heads train, counted over all
    layers, as the input channels of down_proj and o_proj; beside LoRA of rank r in every linear of the decoder."""

    model: str
    batch_size: int
    sequence_length: int
    down: float
    o: float
    r: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TokenModelCase:
    """The same with LoRA of rank r, where decoder layers compute for a share `keep` of the tokens alone, in blocks.

    Attributes:
        dense_first, dense_last: decoder layers at both ends that compute for all.
    """

    model: str
    batch_size: int
    sequence_length: int
    keep: float
    r: int
    dtype: torch.dtype
    block_size: int = 64
    dense_first: int = 2
    dense_last: int = 1


AnyModelCase = ModelCase | SparseModelCase | S2FTModelCase | TokenModelCase


@dataclass(frozen=True)
class SparseCase:
    """One operation on a weight `[N, K]` of which `density` trains, with M tokens: "write", "adamw", "gradient" or
    "layer", see `benchmarks/sparse_delta.py`."""

    operation: str
    M: int
    K: int
    N: int
    density: float
    dtype: torch.dtype


@dataclass(frozen=True)
class S2FTCase:
    """One operation on weights `[N, K]`: "gradient", "adamw", "swiglu", "layer" or "switch", see `benchmarks/s2ft.py`.

    Attributes:
        M: tokens; 0 where an operation sees none.
        ratio: share of the channels that train.
        dim: whether those are "input" or "output" channels.
        layers: how many weights, where it takes a whole model.
        r: rank of the LoRA adapter that "layer" and "switch" are compared with, or None.
    """

    operation: str
    M: int
    K: int
    N: int
    ratio: float
    dtype: torch.dtype
    dim: Literal["input", "output"] = "input"
    layers: int = 1
    r: int | None = None

    @property
    def channels(self) -> int:
        """How many channels of each weight train."""
        return max(1, round(self.ratio * (self.K if self.dim == "input" else self.N)))


@dataclass(frozen=True)
class TokenCase:
    """One operation of token elimination: "norm", "scatter", "linear", "scores" or "loss", see
    `benchmarks/token_elimination.py`.

    Attributes:
        M: tokens, of one sequence.
        K: features that go in: hidden size; of "scores" those of all queries.
        N: features that come out: of "linear" and, as the vocabulary, of "loss"; of "scores" those of all keys.
        keep: share of the blocks that is kept; 1 where an operation sees all tokens.
        head: size of a head, of "scores"; else 0.
    """

    operation: str
    M: int
    K: int
    N: int
    keep: float
    dtype: torch.dtype
    head: int = 0
    block_size: int = 64


@dataclass(frozen=True)
class CallCase:
    """Call overhead: one layer so small that only the host's work takes time."""

    M: int
    K: int
    N: int
    r: int
    dropout_p: float
    iterations: int


@dataclass(frozen=True)
class DeltaCase:
    """Two deltas of one model merged by a method of `peft_kernels.deltas`, from files to a file.

    Attributes:
        model: whose tensors: "smollm2-135m" or "tiny".
        method: "dare", "ties", "breadcrumbs" or "pcb".
        density: fraction of elements that the deltas change.
        dtype: of their values.
    """

    model: str
    method: str
    density: float
    dtype: torch.dtype


DELTA_METHODS = ("dare", "ties", "breadcrumbs", "pcb")


@dataclass(frozen=True)
class Suite:
    """A named set of cases for one device type, with a plan per benchmark.

    Attributes:
        backends: backends measured apart from the default one, by layers of LoRA and by gradients.
        memory_of_model: whether the model's peak memory is taken too, on a CPU in one process per arm.
    """

    name: str
    device_type: str
    layers: tuple[LayerCase, ...]
    layer_plan: Plan
    calls: tuple[CallCase, ...]
    call_plan: Plan
    models: tuple[ModelCase, ...] = ()
    sparse: tuple[SparseCase, ...] = ()
    sparse_plan: Plan = Plan()  # noqa: RUF009  (frozen, shared on purpose)
    sparse_models: tuple[SparseModelCase, ...] = ()
    s2ft: tuple[S2FTCase, ...] = ()
    s2ft_plan: Plan = Plan()  # noqa: RUF009  (frozen, shared on purpose)
    s2ft_models: tuple[S2FTModelCase, ...] = ()
    tokens: tuple[TokenCase, ...] = ()
    token_plan: Plan = Plan()  # noqa: RUF009  (frozen, shared on purpose)
    token_models: tuple[TokenModelCase, ...] = ()
    model_plan: Plan = Plan()  # noqa: RUF009  (frozen, shared on purpose)
    backends: tuple[str, ...] = ()
    memory_of_model: bool = False
    deltas: tuple[DeltaCase, ...] = ()
    delta_plan: Plan = Plan()  # noqa: RUF009


def _sparse(M: int, K: int, N: int, operations: dict[str, tuple[float, ...]]) -> tuple[SparseCase, ...]:
    return tuple(
        SparseCase(operation, M, K, N, density, dtype)
        for operation, densities in operations.items()
        for dtype in (BF16, FP32)
        for density in densities
    )


def _s2ft() -> tuple[S2FTCase, ...]:
    both = (BF16, FP32)
    # Llama-3-8B's down_proj, scaled down by 4 and by 2, and whole with fewer tokens.
    scaled = [
        S2FTCase("gradient", M, K, N, ratio, dtype)
        for M, K, N in ((1024, 3584, 1024), (2048, 7168, 2048))
        for dtype in both
        for ratio in (0.01, 0.03, 0.1)
    ]
    whole = [S2FTCase("gradient", 1024, 14336, 4096, 0.03, dtype) for dtype in both]
    up = [S2FTCase("gradient", 2048, 2048, 7168, 0.03, dtype, dim="output") for dtype in both]
    # The same MLP, and that of SmolLM2-135M at batch 2 x 256.
    mlps = ((512, 1536, 576), (2048, 7168, 2048))
    return (
        *(*scaled, *whole, *up),
        *(S2FTCase("adamw", 0, K, N, 0.03, dtype) for _, K, N in mlps for dtype in both),
        *(S2FTCase("swiglu", M, K, N, 0.03, dtype) for M, K, N in mlps for dtype in both),
        *(S2FTCase("layer", M, K, N, 0.03, dtype) for M, K, N in mlps for dtype in both),
        *(S2FTCase("layer", M, N, K, 0.03, dtype, dim="output") for M, K, N in mlps for dtype in both),
        *(S2FTCase("switch", 0, 1536, 576, 0.03, dtype, layers=30, r=16) for dtype in both),
    )


def _tokens() -> tuple[TokenCase, ...]:
    both = (BF16, FP32)
    # Hidden size and MLP of SmolLM2-135M at its 2048 tokens, and of Llama-3.2-1B.
    hidden = ((2048, 576), (2048, 2048))
    linears = ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048), (1024, 2048, 8192))
    scores = ((2048, 576, 192, 64), (2048, 2048, 512, 64))
    heads = ((2048, 576, 49152), (512, 2048, 128256))
    return (
        *(TokenCase("linear", *size, keep, dtype) for size in linears for dtype in both for keep in (0.5, 0.25)),
        *(TokenCase(name, M, K, K, 0.5, dtype) for name in ("norm", "scatter") for M, K in hidden for dtype in both),
        *(TokenCase("scores", M, K, N, 1.0, dtype, head) for M, K, N, head in scores for dtype in both),
        *(TokenCase("loss", *size, 1.0, dtype) for size in heads for dtype in both),
    )


def _cpu() -> Suite:
    square = [LayerCase(1024, 2048, 2048, 16, dtype, p) for dtype in (FP32, BF16) for p in (0.0, 0.05)]
    # The shapes of SmolLM2-135M at batch 2 x 256: its MLP's two directions and its key and value projections.
    small = [LayerCase(512, K, N, 16, BF16, p) for K, N in ((576, 1536), (1536, 576), (576, 192)) for p in (0.0, 0.05)]
    return Suite(
        name="cpu",
        device_type="cpu",
        layers=(*square, *small, LayerCase(1024, 2048, 2048, 64, FP32, 0.05)),
        layer_plan=Plan(warmup=3, min_rounds=15, max_rounds=101, seconds=8.0),
        calls=tuple(CallCase(1, 64, 64, 16, p, iterations=200) for p in (0.0, 0.05)),
        call_plan=Plan(warmup=2, min_rounds=31, max_rounds=61, seconds=10.0),
        models=tuple(ModelCase("smollm2", 2, 256, 16, dtype, p) for dtype in (BF16, FP32) for p in (0.0, 0.05)),
        sparse=(
            *_sparse(1024, 2048, 2048, dict.fromkeys(("write", "adamw", "layer"), (0.005, 0.05))),
            *_sparse(1024, 2048, 2048, {"gradient": (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)}),
            *_sparse(512, 576, 1536, {"gradient": (0.005, 0.05)}),
        ),
        sparse_plan=Plan(warmup=20, min_rounds=31, max_rounds=301, seconds=2.0),
        sparse_models=(
            SparseModelCase("smollm2", 2, 256, 16, None, BF16),
            SparseModelCase("smollm2", 2, 256, None, 0.005, BF16),
        ),
        s2ft=_s2ft(),
        s2ft_plan=Plan(warmup=5, min_rounds=21, max_rounds=201, seconds=3.0),
        s2ft_models=(S2FTModelCase("smollm2", 2, 256, 0.03, 0.05, 16, BF16),),
        tokens=_tokens(),
        token_plan=Plan(warmup=3, min_rounds=9, max_rounds=201, seconds=3.0),
        token_models=(TokenModelCase("smollm2", 1, 2048, 0.5, 16, BF16),),
        model_plan=Plan(warmup=2, min_rounds=11, max_rounds=15, seconds=120.0),
        memory_of_model=True,
        deltas=tuple(DeltaCase("smollm2-135m", name, d, FP32) for d in (1.0, 0.05) for name in DELTA_METHODS),
        delta_plan=Plan(warmup=1, min_rounds=3, max_rounds=5, seconds=60.0),
    )


def _smoke() -> Suite:
    quick = Plan(warmup=1, min_rounds=2, max_rounds=2, seconds=0.0)
    return Suite(
        name="smoke",
        device_type="cpu",
        layers=(LayerCase(32, 48, 40, 4, FP32, 0.1), LayerCase(32, 48, 40, 4, BF16, 0.0)),
        layer_plan=quick,
        calls=(CallCase(1, 64, 64, 4, 0.0, iterations=2),),
        call_plan=quick,
        models=(ModelCase("random:llama-tiny", 2, 16, 4, BF16, 0.05),),
        sparse=_sparse(32, 48, 40, dict.fromkeys(("write", "adamw", "layer", "gradient"), (0.05,))),
        sparse_plan=quick,
        sparse_models=(
            SparseModelCase("random:llama-tiny", 2, 16, 2, None, BF16),
            SparseModelCase("random:llama-tiny", 2, 16, None, 0.05, FP32),
        ),
        s2ft=(
            *(S2FTCase(name, 32, 48, 40, 0.1, BF16) for name in ("gradient", "adamw", "swiglu", "layer")),
            *(S2FTCase(name, 32, 48, 40, 0.1, FP32, dim="output") for name in ("gradient", "adamw", "layer")),
            S2FTCase("switch", 0, 48, 40, 0.1, BF16, layers=2, r=4),
        ),
        s2ft_plan=quick,
        s2ft_models=(S2FTModelCase("random:llama-tiny", 2, 16, 0.1, 0.3, 4, FP32),),
        tokens=(
            *(TokenCase(name, 32, 48, 48, 0.5, BF16, block_size=8) for name in ("norm", "scatter", "linear")),
            TokenCase("linear", 32, 48, 40, 0.25, FP32, block_size=8),
            TokenCase("scores", 36, 64, 32, 1.0, FP32, head=16, block_size=8),
            TokenCase("loss", 32, 48, 100, 1.0, BF16),
        ),
        token_plan=quick,
        token_models=(TokenModelCase("random:llama-tiny", 2, 32, 0.5, 4, FP32, 8, 1, 0),),
        model_plan=quick,
        backends=("reference", "triton"),
        memory_of_model=True,
        deltas=tuple(DeltaCase("tiny", name, d, FP32) for d in (1.0, 0.05) for name in DELTA_METHODS),
        delta_plan=quick,
    )


SUITES = {"cpu": _cpu, "smoke": _smoke}
"""Those of a CPU; that of a GPU is in `gpu_suite.py`."""
