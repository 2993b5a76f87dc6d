"""`linear_cross_entropy` under `torch.compile(fullgraph=True)`, and on a device that the host must not wait for."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels
from peft_kernels import ops
from peft_kernels.ops import counted_labels

from .test_linear_cross_entropy import operands, with_gradients

OPTIONS = (
    {},
    {"shift": True, "chunk_size": 4},
    {"logit_softcap": 2.0, "chunk_size": 9},
    {"reduction": "sum"},
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "options"),
    [*(("aot_eager", options) for options in OPTIONS), ("inductor", {"logit_softcap": 2.0, "chunk_size": 9})],
    ids=str,
)
def test_the_loss_equals_eager(backend, options):
    hidden, weight, labels, bias = operands((2, 6), 8, 11)

    def loss(h, w, b):
        return ops.linear_cross_entropy(h, w, labels, b, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for found, expected in zip(
        with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_weights_and_a_number_of_tokens():
    hidden, weight, labels, bias = operands((2, 6), 8, 11)
    weights = torch.rand(2, 6).masked_fill(torch.rand(2, 6) < 0.2, 0.0)

    def loss(h, w, b):
        return ops.linear_cross_entropy(h, w, labels, b, token_weights=weights, max_tokens=10, shift=True, chunk_size=4)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_the_loss_on_selected_tokens():
    hidden, weight, labels, bias = operands((2, 9), 8, 11)
    reference = torch.randperm(18).view(2, 9) * 50.0  # no rounding changes what is selected

    def loss(h, w, b):
        return ops.selective_cross_entropy(h, w, labels, reference, 0.4, b, shift=True, chunk_size=5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_lengths_with_as_many_chunks_share_a_graph():
    _, weight, _, _ = operands()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(h, labels):
        return ops.linear_cross_entropy(h, weight, labels, chunk_size=40)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for length in (66, 70, 79, 53):
        hidden, _, labels, _ = operands((length,))
        expected = with_gradients(lambda h, labels=labels: loss(h, labels), hidden)
        for left, right in zip(
            with_gradients(lambda h, labels=labels: compiled(h, labels), hidden), expected, strict=True
        ):
            torch.testing.assert_close(left, right)
    assert counter.frame_count == 1


def test_a_label_out_of_range_is_found_in_compiled_code():
    hidden, weight, labels, _ = operands()
    labels[1, 2] = 33
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 33\) or -100"):
        compiled(hidden, weight, labels)


READ = (*OPTIONS, {"token_mask": True}, {"token_weights": True, "max_tokens": 5}, {"num_items_in_batch": 7})


@pytest.mark.parametrize("options", READ, ids=str)
def test_nothing_is_read_back(options, monkeypatch):
    """On tensors without values, as they would be on a GPU: there rows without a label stay in the products."""
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    with FakeTensorMode(), peft_kernels.use_backend("cpu"):
        hidden, weight = torch.empty(2, 6, 8, requires_grad=True), torch.empty(11, 8, requires_grad=True)
        labels = torch.empty(2, 6, dtype=torch.int64)
        if "token_mask" in options:
            options = {"token_mask": labels > 3}
        if "token_weights" in options:
            options = {**options, "token_weights": torch.empty(2, 6)}
        loss = ops.linear_cross_entropy(hidden, weight, labels, **options)
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and [grad.shape for grad in grads] == [(2, 6, 8), (11, 8)]


def test_nothing_is_read_back_to_select_tokens(monkeypatch):
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    with FakeTensorMode(), peft_kernels.use_backend("cpu"):
        hidden, weight = torch.empty(2, 6, 8, requires_grad=True), torch.empty(11, 8, requires_grad=True)
        labels, reference = torch.empty(2, 6, dtype=torch.int64), torch.empty(2, 6)
        loss = ops.selective_cross_entropy(hidden, weight, labels, reference, 0.5, shift=True)
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and [grad.shape for grad in grads] == [(2, 6, 8), (11, 8)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_that_stay_in_the_products_change_nothing(options, monkeypatch):
    hidden, weight, labels, bias = operands((2, 6), 8, 11)

    def loss(h, w, b):
        return ops.linear_cross_entropy(h, w, labels, b, **options)

    expected = with_gradients(loss, hidden, weight, bias)
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    for left, right in zip(with_gradients(loss, hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(left, right)


def test_where_the_host_reads():
    assert counted_labels.host_reads(torch.ones(1)) and not counted_labels.host_reads(torch.ones(1, device="meta"))
