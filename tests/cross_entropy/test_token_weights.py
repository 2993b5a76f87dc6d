"""`linear_cross_entropy` with a factor for each token, and with a number of tokens that is known beforehand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import peft_kernels
from peft_kernels import ops
from peft_kernels.ops import counted_labels

from ..support.accuracy import assert_accurate, assert_same_bits
from .test_linear_cross_entropy import AT, EACH_PLACE, IGNORED, NAMES, operands, with_gradients


def factors(labels, dtype=torch.float32):
    """Some zero, some negative."""
    weights = torch.randn(labels.shape, dtype=dtype) + 0.7
    weights[torch.rand(labels.shape) < 0.2] = 0.0
    return weights.to(labels.device)


def plain(hidden, weight, labels, token_weights, bias=None, softcap=None, shift=False, divided_by=None):
    """All logits, the loss of each token, the weighted mean."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if shift:
        logits, labels, token_weights = logits[:, :-1], labels[:, 1:], token_weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    weights = token_weights.flatten().to(losses.dtype)
    total = (losses * weights).sum()
    return total / ((labels.flatten() != IGNORED) * weights).sum() if divided_by is None else total / divided_by


@EACH_PLACE
@pytest.mark.parametrize(
    ("options", "biased"),
    [
        ({}, False),
        ({"chunk_size": 4, "shift": True}, True),
        ({"chunk_size": 4, "logit_softcap": 2.0, "num_items_in_batch": 9}, True),
    ],
    ids=["mean", "shift", "softcap"],
)
def test_the_weighted_loss_and_its_gradients_are_torchs(place, dtype, options, biased):
    hidden, weight, labels, bias = operands(dtype=dtype, device=place.device)
    weights = factors(labels)
    biases = (bias,) if biased else ()

    def ours(hidden, weight, bias=None):
        return ops.linear_cross_entropy(hidden, weight, labels, bias, token_weights=weights, **options)

    def theirs(hidden, weight, bias=None):
        return plain(
            hidden,
            weight,
            labels,
            weights,
            bias,
            options.get("logit_softcap"),
            options.get("shift", False),
            options.get("num_items_in_batch"),
        )

    with peft_kernels.use_backend(place.backend):
        found = with_gradients(ours, hidden, weight, *biases)
    own = with_gradients(theirs, hidden, weight, *biases)
    exact = with_gradients(theirs, hidden.double(), weight.double(), *(each.double() for each in biases))
    for name, *tensors in zip(NAMES, found, own, exact, strict=False):
        assert_accurate(*tensors, name)


def test_gradcheck():
    hidden, weight, labels, bias = operands((5,), 4, 7, torch.float64)
    weights = factors(labels, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    for options in ({}, {"logit_softcap": 1.5, "reduction": "sum"}):
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: ops.linear_cross_entropy(h, w, labels, b, token_weights=weights, **o), tensors
        )


@AT
def test_ones_are_the_mean_and_zeros_a_mask(place):
    hidden, weight, labels, _ = operands(device=place.device)
    mask = torch.rand(labels.shape, device=place.device) < 0.5
    with peft_kernels.use_backend(place.backend):
        masked, weighted = (
            with_gradients(lambda h, w, a=a: ops.linear_cross_entropy(h, w, labels, chunk_size=4, **a), hidden, weight)
            for a in ({"token_mask": mask}, {"token_weights": mask.float()})
        )
    for left, right in zip(weighted, masked, strict=True):
        assert_same_bits(left, right)


def test_rows_of_weight_zero_are_not_computed():
    hidden, weight, labels, _ = operands((40,), ignored=0.2)
    weights = factors(labels)
    hidden[weights == 0] = float("nan")
    loss, grad = with_gradients(
        lambda h: ops.linear_cross_entropy(h, weight, labels, token_weights=weights, chunk_size=8), hidden
    )
    assert loss.isfinite() and grad.isfinite().all() and not grad[weights == 0].any()


def test_losses_of_tokens_are_weighted_at_the_labels_place():
    hidden, weight, labels, _ = operands()
    weights = factors(labels)
    outer = torch.randn(labels.shape)

    def ours(h):
        losses = ops.linear_cross_entropy(
            h, weight, labels, token_weights=weights, reduction="none", shift=True, chunk_size=4
        )
        assert losses.shape == labels.shape and not losses[:, 0].any()
        return (losses * outer).sum()

    def theirs(h):
        logits = F.linear(h, weight)[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(3, -1)
        return (losses * (weights * outer)[:, 1:]).sum()

    for left, right in zip(with_gradients(ours, hidden), with_gradients(theirs, hidden), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_are_cast(dtype):
    hidden, weight, labels, _ = operands()
    weights = factors(labels).bfloat16()  # exact in all the others, but for float16's range
    found = ops.linear_cross_entropy(hidden, weight, labels, token_weights=weights.to(dtype))
    expected = ops.linear_cross_entropy(hidden, weight, labels, token_weights=weights.to(dtype).float())
    assert_same_bits(found, expected)


def test_no_weight_is_nan_and_its_sum_zero():
    hidden, weight, labels, _ = operands()
    weights = torch.zeros(labels.shape)
    assert ops.linear_cross_entropy(hidden, weight, labels, token_weights=weights).isnan()
    loss, grad = with_gradients(
        lambda h: ops.linear_cross_entropy(h, weight, labels, token_weights=weights, reduction="sum"), hidden
    )
    assert loss == 0 and not grad.any()


def test_a_weight_that_is_not_finite_shows_only_where_it_counts():
    hidden, weight, labels, _ = operands()
    weights = torch.ones(labels.shape)
    labels[0, 0], weights[0, 0] = IGNORED, float("nan")
    assert ops.linear_cross_entropy(hidden, weight, labels, token_weights=weights).isfinite()
    labels[0, 0] = 3
    assert ops.linear_cross_entropy(hidden, weight, labels, token_weights=weights).isnan()


def test_transforms():
    hidden, weight, labels, _ = operands()
    weights = factors(labels)
    found = torch.func.grad(
        lambda h: ops.linear_cross_entropy(h, weight, labels, token_weights=weights, max_tokens=labels.numel())
    )(hidden)
    torch.testing.assert_close(found, with_gradients(lambda h: plain(h, weight, labels, weights), hidden)[1])


class ComputedRows(torch.utils._python_dispatch.TorchDispatchMode):
    """How many rows of logits were formed, 33 to a row."""

    rows = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten.mm.out, torch.ops.aten.mm.default) and result.shape[-1] == 33:
            self.rows += result.shape[0]
        return result


@pytest.mark.parametrize("weighted", [False, True])
def test_so_many_rows_are_computed_where_the_host_does_not_read(weighted, monkeypatch):
    hidden, weight, labels, bias = operands((4, 10))
    options = {"token_mask": torch.rand(labels.shape) < 0.4, "shift": True, "chunk_size": 6}
    if weighted:
        options["token_weights"] = factors(labels)

    def loss(h, w, b, **more):
        return ops.linear_cross_entropy(h, w, labels, b, **options, **more)

    expected = with_gradients(loss, hidden, weight, bias)
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    found = with_gradients(lambda h, w, b: loss(h, w, b, max_tokens=25), hidden, weight, bias)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    with ComputedRows() as counter, torch.no_grad():
        ops.linear_cross_entropy(hidden, weight, labels, **options, max_tokens=25)
    assert counter.rows == 25


@pytest.mark.parametrize("reads", [True, False])
def test_more_labels_than_said_raise(reads, monkeypatch):
    hidden, weight, labels, _ = operands((9,), ignored=0.0)
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: reads)
    message = "max_tokens must be at least the number of labels that count, .*got 8"
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.linear_cross_entropy(hidden, weight, labels, max_tokens=8)
    ops.linear_cross_entropy(hidden, weight, labels, max_tokens=9)


@pytest.mark.parametrize("reads", [True, False])
def test_no_tokens_at_most(reads, monkeypatch):
    hidden, weight, labels, _ = operands((9,), ignored=1.0)
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: reads)
    loss, grad = with_gradients(
        lambda h: ops.linear_cross_entropy(h, weight, labels, max_tokens=0, reduction="sum"), hidden
    )
    assert loss == 0 and grad.shape == hidden.shape and not grad.any()


CASES = [
    ({"token_weights": torch.ones(3, 7).int()}, TypeError, r"token_weights must be float32 or .*, got int32 \[3, 7\]"),
    ({"token_weights": torch.ones(3, 6)}, ValueError, r"token_weights must be \[3, 7\], got float32 \[3, 6\]"),
    ({"token_weights": torch.ones(3, 7, device="meta")}, ValueError, "token_weights must be on hidden's device, cpu"),
    ({"token_weights": torch.ones(3, 7, requires_grad=True)}, ValueError, "token_weights have no gradient, but ask"),
    ({"max_tokens": -1}, ValueError, "max_tokens must not be negative, got -1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(changes, error, message):
    hidden, weight, labels, _ = operands()
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(hidden, weight, labels, **changes)
