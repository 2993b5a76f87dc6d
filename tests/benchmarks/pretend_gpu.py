"""The GPU's suite, scaled down, on a device that is not there: `python -m tests.benchmarks.pretend_gpu FILE`.

A process of its own, as a device cannot be taken back. The cases are those of the suite with small sizes. Compiled
kernels are those of the CPU, under the names of the backends that a GPU has them on. Sections go to FILE as JSON.
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, model, operations, s2ft, sparse_delta, token_elimination
from benchmarks.cases import Progress, Record
from benchmarks.gpu_suite import gpu
from benchmarks.harness import Plan
from benchmarks.suites import Suite
from peft_kernels import backends
from peft_kernels.backends import Registration
from peft_kernels.nn import linear
from peft_kernels.ops._register import GPU_DTYPES
from peft_kernels.training.models import load_model

from . import pretend

SECTIONS: dict[str, Callable[[Suite, Progress], Record]] = {
    "s2ft": s2ft.run,
    "s2ft_model": model.run_s2ft,
    "sparse_delta": sparse_delta.run,
    "sparse_delta_model": model.run_sparse_delta,
    "token_elimination": token_elimination.run,
    "token_elimination_model": model.run_token_elimination,
}
TRITON = {"slice_grad", "gather_columns", "sampled_product", "gather_linear_scatter", "gather_linear_scatter_"}
ROWS = {16384: 24, 4096: 24, 14336: 96, 0: 0}
"""Sizes of the suite to those of the test."""


def small(suite: Suite) -> Suite:
    """The suite with every kind of case that it has, tiny, and once each."""
    quick = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)

    def sized(case: Any) -> Any:
        return replace(case, M=ROWS[case.M], K=ROWS[case.K], N=ROWS[case.N])

    def of_tokens(case: Any) -> Any:
        head = min(case.head, 12)
        return replace(case, M=24, K=ROWS.get(case.K, 24), N=96 if case.N > 4096 else 24, head=head, block_size=8)

    def shrunk(case: Any) -> Any:
        return replace(case, model="random:llama-tiny", batch_size=2, sequence_length=16)

    return replace(
        suite,
        device_type=pretend.DEVICE.type,
        s2ft=tuple(dict.fromkeys(replace(sized(case), layers=min(case.layers, 2)) for case in suite.s2ft)),
        sparse=tuple(dict.fromkeys(map(sized, suite.sparse))),
        s2ft_models=tuple(dict.fromkeys(replace(shrunk(case), down=0.1, o=0.3, r=4) for case in suite.s2ft_models)),
        sparse_models=tuple(dict.fromkeys(map(shrunk, suite.sparse_models))),
        tokens=tuple(dict.fromkeys(map(of_tokens, suite.tokens))),
        token_models=tuple(
            dict.fromkeys(
                replace(shrunk(case), block_size=4, dense_first=1, dense_last=0) for case in suite.token_models
            )
        ),
        token_plan=quick,
        s2ft_plan=quick,
        sparse_plan=quick,
        model_plan=quick,
    )


def _pretend_backends() -> None:
    kind = pretend.DEVICE.type
    backends._PREFERENCE[kind] = ("cuda", "triton", "reference")
    for operator in backends.operators():
        known = dict(backends._registrations[operator])
        reference = known["reference"]
        backends.register(operator, "reference", replace(reference, device_types=(*reference.device_types, kind)))
        compiled = Registration(getattr(torch.ops.peft_kernels, operator).default, (kind,), GPU_DTYPES)
        if "cuda" in known:
            backends.register(operator, "cuda", compiled)
        if operator in TRITON:
            backends.register(operator, "triton", compiled)


def _pretend_generators() -> None:
    original = torch.Generator

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return original("cpu")

    torch.Generator = Generator


def _pretend_parameters() -> None:
    """Weights of the device count as the plain parameters that they would be on a GPU."""

    def kind(value: Any) -> type:
        return torch.nn.Parameter if isinstance(value, pretend.PretendTensor) else builtins.type(value)

    linear.type = kind


def _load_by_way_of_the_cpu() -> None:
    """`torch.tensor` of Python's values, which building a model calls, makes no tensor of the device."""
    model._Models._load = lambda self, case: load_model(case.model, case.dtype, self.device)


def _count_inner_tensors() -> None:
    original = memory._dense

    def dense(tensors: Any) -> Iterator[torch.Tensor]:
        return (getattr(tensor, "on_cpu", tensor) for tensor in original(tensors))

    memory._dense = dense


def main(file: Path) -> None:
    """Runs the sections."""
    _pretend_backends()
    _pretend_generators()
    _pretend_parameters()
    _load_by_way_of_the_cpu()
    _count_inner_tensors()
    operations._FLUSHED_BYTES, operations.CACHE_BYTES = 2**10, 0
    suite = small(gpu())
    found: dict[str, Any] = {}
    with pretend.device() as device:
        try:
            torch.ones(2, device=device).add_(torch.ones(2))
        except RuntimeError as error:
            found["refused"] = str(error)
        for name, run in SECTIONS.items():
            progress = Progress(lambda text: print(text, flush=True), lambda _: None, lambda: 1.0)
            found[name] = run(suite, progress)
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
