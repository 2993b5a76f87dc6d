"""Factors of the gradients of `linear_cross_entropy`: the mean of nothing, float16's range, a loss scale.

Also what does not count and is not finite, and the loss inside transforms.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels import ops
from peft_kernels.ops import counted_labels

from .test_linear_cross_entropy import AT, IGNORED, operands, plain, with_gradients
from .test_token_weights import factors

READS = pytest.mark.parametrize("reads", [True, False])


@READS
@pytest.mark.parametrize("how", ["labels", "mask", "weights", "items"])
def test_the_mean_of_nothing_has_gradients_of_zero(reads, how, monkeypatch):
    hidden, weight, labels, bias = operands()
    options = {}
    if how == "mask":
        options["token_mask"] = torch.zeros(labels.shape, dtype=torch.bool)
    elif how == "weights":
        options["token_weights"] = torch.zeros(labels.shape)
    else:
        labels.fill_(IGNORED)
    if how == "items":
        options["num_items_in_batch"] = torch.tensor(7)
    if not reads:
        monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    loss, *grads = with_gradients(
        lambda h, w, b: ops.linear_cross_entropy(h, w, labels, b, chunk_size=4, **options), hidden, weight, bias
    )
    assert loss == 0 if how == "items" else loss.isnan()
    for grad, tensor in zip(grads, (hidden, weight, bias), strict=True):
        assert grad.shape == tensor.shape and not grad.any()  # a NaN is true


@READS
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_float16_gradients_of_many_rows_stay_in_range(reads, loss_scale, monkeypatch):
    """Their undivided sums, and the loss scale itself, are not in float16's range."""
    rows, features = 3000, 4
    hidden = torch.full((rows, features), 40.0).half()
    weight, labels = torch.zeros(5, features).half(), torch.zeros(rows, dtype=torch.int64)
    bias = torch.zeros(5).half()
    expected = [torch.full((5, features), 8.0), torch.full((5,), 0.2)]
    expected[0][0], expected[1][0] = -32.0, -0.8
    if not reads:
        monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    # As many more tokens, so that the result is in range.
    options = {"num_items_in_batch": rows * 2**16} if loss_scale > 1.0 else {}
    _, *found = with_gradients(
        lambda w, b: ops.linear_cross_entropy(hidden, w, labels, b, **options) * loss_scale, weight, bias
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right.half())


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes in which elementwise products are computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.mul.Tensor:
            self.dtypes.add(torch.result_type(*args))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_multiplies_in_float32(dtype, reduction):
    """A float32 factor without dimensions would be rounded to 16 bits on a GPU."""
    hidden, weight, labels, bias = (t.requires_grad_(t.is_floating_point()) for t in operands(dtype=dtype))
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
    with Products() as products:
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert products.dtypes == {torch.float32}
    assert all(grad.dtype == dtype for grad in grads)


@READS
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_label_need_not_be_finite(reads, softcap, weighted, value, monkeypatch):
    hidden, weight, labels, bias = operands((30,))
    labels[3] = IGNORED
    weights = factors(labels) if weighted else None

    def loss(h, w, b):
        options = {"token_weights": weights, "logit_softcap": softcap, "chunk_size": 7}
        return ops.linear_cross_entropy(h, w, labels, b, **options)

    expected = with_gradients(loss, hidden, weight, bias)
    hidden[labels == IGNORED] = value
    if not reads:
        monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    for left, right in zip(with_gradients(loss, hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(left, right)


@AT
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"reduction": "none"}], ids=str)
def test_vmap(place, options):
    hidden, weight, labels, bias = operands((3, 7), device=place.device)

    def loss(h, y):
        return ops.linear_cross_entropy(h, weight, y, bias, max_tokens=7, **options)

    expected = torch.stack([loss(h, y) for h, y in zip(hidden, labels, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(hidden, labels), expected)


def test_gradients_of_each_sample():
    hidden, weight, labels, _ = operands((3, 7))
    labels[1] = IGNORED
    labels[0, 0] = labels[2, 0] = 5
    found = torch.func.vmap(torch.func.grad(lambda w, h, y: ops.linear_cross_entropy(h, w, y)), in_dims=(None, 0, 0))(
        weight, hidden, labels
    )
    for i in (0, 2):
        expected = with_gradients(lambda w, i=i: plain(hidden[i], w, labels[i]), weight)[1]
        torch.testing.assert_close(found[i], expected)
    assert not found[1].any()


@pytest.mark.parametrize("wrong", [33, -1])
def test_a_label_out_of_range_is_refused_inside_transforms(wrong):
    hidden, weight, labels, _ = operands()
    labels[1, 2] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        torch.func.vmap(lambda h, y: ops.linear_cross_entropy(h, weight, y))(hidden, labels)
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        torch.func.grad(lambda h: ops.linear_cross_entropy(h, weight, labels))(hidden)
