"""The operators under `torch.compile`, `opcheck`, and without a device that the host could wait for."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import peft_kernels
from peft_kernels import ops
from peft_kernels.ops import token_selection
from peft_kernels.reference import token_selection as reference

from ..support.places import compiled_cases

LENGTHS = (66, 90, 129, 33)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls(operator, device):
    q, k = torch.randn(2, 4, 21, 8, device=device), torch.randn(2, 2, 21, 8, device=device)
    starts = torch.arange(21, dtype=torch.int32, device=device).expand(2, -1).contiguous() // 7 * 7
    scores = torch.randn(2, 5, device=device)
    return {
        "block_scores": [(q, k, 4, None), (q.half(), k.half(), 4, starts), (q[:, :, :3], k[:, :, :3], 4, None)],
        "select_tokens": [(scores, 21, 3, 4, None), (scores, 20, 0, 4, scores[0, 0].clone())],
    }[operator]


@pytest.mark.parametrize(
    ("namespace", "device", "operator"), compiled_cases((name,) for name in ("block_scores", "select_tokens"))
)
def test_opcheck(namespace, device, operator):
    for arguments in calls(operator, device):
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, arguments)


def rows_kept(q, k, keep, threshold=None):
    scores = ops.block_scores(q, k, 16)
    positions, counts = ops.select_tokens(scores, keep, 16, threshold, tokens=q.shape[2])
    return ops.flat_rows(positions, q.shape[2]), counts


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_one_graph_for_every_length(keep):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rows_kept, fullgraph=True, dynamic=True, backend=counter)
    counts = set()  # dynamo may start over once in the first call, to make a constant of keep
    for length in LENGTHS:
        q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
        eager = rows_kept(q, k, keep)
        for found, expected in zip(compiled(q, k, keep), eager, strict=True):
            assert torch.equal(found, expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_scores_of_tokens_compile():
    scores, limit = torch.randn(2, 70), torch.tensor(0.5)
    compiled = torch.compile(ops.select_tokens, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(scores, 0.5, 8, limit), ops.select_tokens(scores, 0.5, 8, limit), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.5, "tensor"])
def test_nothing_is_read_back(backend, keep, threshold):
    """On tensors without values, of which any read raises, as it would in the capture of a CUDA graph."""
    with FakeTensorMode(), peft_kernels.use_backend(backend):
        q, k = torch.empty(2, 4, 100, 8), torch.empty(2, 2, 100, 8)
        limit = torch.empty(()) if threshold == "tensor" else threshold
        rows, counts = rows_kept(q, k, keep, limit)
        assert rows.shape == (2 * ops.kept_tokens(100, keep, 16),) and counts.shape == (2,)
        by_token = ops.select_tokens(torch.empty(2, 100), keep, 16, limit)[0]
        assert by_token.shape == (2, ops.kept_tokens(100, keep, 16))
        with pytest.raises(DataDependentOutputException):
            bool(counts.sum() > 0)  # a read that this would find


FORBIDDEN = {"item", "tolist", "nonzero", "masked_select", "cpu", "numpy", "unique", "bincount"}


@pytest.mark.parametrize("module", [token_selection, reference])
def test_the_code_calls_nothing_that_would_wait(module):
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not called & FORBIDDEN
