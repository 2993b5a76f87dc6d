"""`linear_cross_entropy` against torch's loss of all logits: value, gradients, labels that do not count, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import ops
from peft_kernels.training.memory import peak_of_profile

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.places import places, places_and_dtypes

OPERATOR = "cross_entropy_rows_"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
AT = pytest.mark.parametrize("place", places(OPERATOR))
IGNORED = -100


def operands(shape=(3, 7), features=12, vocabulary=33, dtype=torch.float32, device="cpu", ignored=0.3):
    hidden = torch.randn(*shape, features, dtype=torch.float64).to(dtype).to(device)
    weight = (torch.randn(vocabulary, features, dtype=torch.float64) / features**0.5).to(dtype).to(device)
    bias = torch.randn(vocabulary, dtype=torch.float64).to(dtype).to(device)
    labels = torch.randint(0, vocabulary, shape)
    labels[torch.rand(shape) < ignored] = IGNORED
    return hidden, weight, labels.to(device), bias


def plain(hidden, weight, labels, bias=None, softcap=None, **options):
    """As transformers computes it."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), **options)


def with_gradients(loss, *tensors):
    """The loss and its gradient by each tensor."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return value.detach(), *torch.autograd.grad(value, wanted)


NAMES = ("loss", "hidden", "weight", "bias")


@EACH_PLACE
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize(
    ("reduction", "biased", "softcap"),
    [("mean", False, None), ("sum", True, None), ("mean", True, 2.0)],
)
def test_loss_and_gradients_are_torchs(place, dtype, chunk_size, reduction, biased, softcap):
    hidden, weight, labels, bias = operands(dtype=dtype, device=place.device)
    bias = bias if biased else None

    def ours(hidden, weight, bias=None):
        return ops.linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, chunk_size=chunk_size, logit_softcap=softcap
        )

    def theirs(hidden, weight, bias=None):
        return plain(hidden, weight, labels, bias, softcap, reduction=reduction)

    with peft_kernels.use_backend(place.backend):
        found = with_gradients(ours, hidden, weight, bias)
    own = with_gradients(theirs, hidden, weight, bias)
    exact = with_gradients(theirs, hidden.double(), weight.double(), None if bias is None else bias.double())
    for name, *tensors in zip(NAMES, found, own, exact, strict=False):
        assert_accurate(*tensors, name)
    assert found[0].dtype == own[0].dtype and found[0].dim() == 0


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=(torch.float64,)))
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_gradcheck(place, dtype, which):
    hidden, weight, labels, bias = operands((5,), 4, 7, dtype, place.device)
    tensors = [tensor.requires_grad_(i in which) for i, tensor in enumerate((hidden, weight, bias))]
    for options in ({}, {"logit_softcap": 1.5}, {"shift": True, "reduction": "sum"}, {"num_items_in_batch": 3}):
        with peft_kernels.use_backend(place.backend):
            assert torch.autograd.gradcheck(
                lambda h, w, b, o=options: ops.linear_cross_entropy(h, w, labels, b, chunk_size=2, **o), tensors
            )


@AT
def test_chunks_do_not_change_losses(place):
    hidden, weight, labels, bias = operands((50,), device=place.device)
    with peft_kernels.use_backend(place.backend), torch.no_grad():
        whole, *others = (
            ops.linear_cross_entropy(hidden, weight, labels, bias, chunk_size=size, reduction="none")
            for size in (None, 1, 7, 49)
        )
    for other in others:
        torch.testing.assert_close(other, whole)


@AT
def test_every_label_ignored(place):
    hidden, weight, labels, _ = operands(device=place.device)
    labels.fill_(IGNORED)
    hidden.requires_grad_()
    with peft_kernels.use_backend(place.backend):
        assert ops.linear_cross_entropy(hidden, weight, labels).isnan()
        loss = ops.linear_cross_entropy(hidden, weight, labels, reduction="sum")
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, hidden)
    assert grad.shape == hidden.shape and not grad.any()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("shift", [False, True])
def test_no_tokens(shape, shift):
    hidden, weight, labels, bias = (t.requires_grad_(t.is_floating_point()) for t in operands(shape))
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias, reduction="sum", shift=shift)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.item() == 0.0 and not any(grad.any() for grad in grads)
    assert [grad.shape for grad in grads] == [hidden.shape, weight.shape, bias.shape]


@AT
def test_shift_is_transformers(place):
    hidden, weight, labels, _ = operands(device=place.device)
    with peft_kernels.use_backend(place.backend):
        found = with_gradients(lambda h: ops.linear_cross_entropy(h, weight, labels, shift=True, chunk_size=5), hidden)
    own = with_gradients(lambda h: plain(h[:, :-1], weight, labels[:, 1:]), hidden)
    for name, left, right in zip(NAMES, found, own, strict=False):
        torch.testing.assert_close(left, right, msg=name)
    assert not found[1][:, -1].any()


def test_shift_does_not_copy_hidden():
    hidden, weight, labels, _ = operands((2, 600), 512, 8, ignored=0.0)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        ops.linear_cross_entropy(hidden, weight, labels, shift=True, chunk_size=100)
    assert peak_of_profile(profile) < hidden.nbytes // 4


@AT
@pytest.mark.parametrize("shift", [False, True])
def test_loss_on_selected_tokens(place, shift):
    hidden, weight, labels, _ = operands(device=place.device)
    mask = torch.rand(labels.shape, device=place.device) < 0.5
    chosen = torch.where(mask, labels, IGNORED)
    with peft_kernels.use_backend(place.backend):
        found, expected = (
            with_gradients(lambda h, a=a: ops.linear_cross_entropy(h, weight, shift=shift, **a), hidden)
            for a in ({"labels": labels, "token_mask": mask}, {"labels": chosen})
        )
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right)


def test_losses_of_tokens_choose_tokens():
    """Rho-1: losses without a gradient, a mask from them, the loss on what is selected."""
    hidden, weight, labels, _ = operands(ignored=0.2)
    with torch.no_grad():
        losses = ops.linear_cross_entropy(hidden, weight, labels, reduction="none")
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected.view(labels.shape))
    mask = losses >= losses[labels >= 0].median()
    loss = ops.linear_cross_entropy(hidden, weight, labels, token_mask=mask)
    torch.testing.assert_close(loss, losses[mask & (labels >= 0)].mean())


def test_losses_of_tokens_have_a_gradient_for_hidden():
    hidden, weight, labels, _ = operands()
    factors = torch.randn(labels.shape)
    found = with_gradients(
        lambda h: (ops.linear_cross_entropy(h, weight, labels, reduction="none", chunk_size=4) * factors).sum(), hidden
    )
    own = with_gradients(
        lambda h: (plain(h, weight, labels, reduction="none").view(labels.shape) * factors).sum(), hidden
    )
    for left, right in zip(found, own, strict=True):
        torch.testing.assert_close(left, right)


def test_ignore_index_may_be_a_token():
    hidden, weight, labels, _ = operands(ignored=0.0)
    labels[0] = 5
    loss = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=5)
    torch.testing.assert_close(loss, plain(hidden, weight, labels, ignore_index=5))


@pytest.mark.parametrize("items", [11, 11.0, torch.tensor(11), torch.tensor([[11]]), torch.tensor(11.0).double()])
def test_items_of_several_batches(items):
    hidden, weight, labels, _ = operands()
    loss = ops.linear_cross_entropy(hidden, weight, labels, num_items_in_batch=items)
    torch.testing.assert_close(loss, plain(hidden, weight, labels, reduction="sum") / 11)
    assert loss.shape == () and loss.dtype == torch.float32


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, labels, _ = (t.requires_grad_(t.is_floating_point()) for t in operands())
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for left, right in zip(torch.autograd.grad(2 * loss, (hidden, weight)), first, strict=True):
        torch.testing.assert_close(left, 2 * right)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    hidden, weight, labels, _ = operands()
    loss, grad = with_gradients(lambda h: ops.linear_cross_entropy(h, weight, labels), hidden)
    hidden.requires_grad_()
    found = checkpoint(ops.linear_cross_entropy, hidden, weight, labels, use_reentrant=reentrant)
    found.backward()
    assert_same_bits(found.detach(), loss)
    assert_same_bits(hidden.grad, grad)


def test_autocast():
    hidden, weight, labels, bias = operands()
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, labels, bias)
    expected = ops.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, bias.bfloat16())
    assert loss.dtype == torch.float32
    assert_same_bits(loss.detach(), expected.detach())
    assert torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


def test_transforms():
    hidden, weight, labels, _ = operands()
    found = torch.func.grad(lambda h: ops.linear_cross_entropy(h, weight, labels, reduction="sum"))(hidden)
    torch.testing.assert_close(found, with_gradients(lambda h: plain(h, weight, labels, reduction="sum"), hidden)[1])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_held_whole(trained, dtype):
    tokens, vocabulary, features = 512, 4096, 16
    hidden, weight, labels, _ = operands((tokens,), features, vocabulary, dtype, ignored=0.1)
    hidden.requires_grad_(trained)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = ops.linear_cross_entropy(hidden, weight, labels, chunk_size=64)
        if trained:
            loss.backward()
    chunk = 64 * vocabulary * dtype.itemsize
    # Eight chunks would be all; torch's product may lay weight out anew. Some rows are left out, so chunks are shorter.
    assert chunk * 4 // 5 < peak_of_profile(profile) < chunk + 4 * weight.nbytes + 4 * hidden.nbytes + 64 * tokens


def test_saved_are_only_gradients():
    hidden, weight, labels, _ = operands((40,), 12, 900, ignored=0.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.linear_cross_entropy(hidden.requires_grad_(), weight, labels, reduction="sum")
    assert [list(tensor.shape) for tensor in saved] == [[40, 12]]


def test_rows_without_a_label_are_not_computed():
    hidden, weight, labels, _ = operands((400,), 12, 900, ignored=0.9)
    hidden[labels < 0] = float("nan")
    loss, grad = with_gradients(lambda h: ops.linear_cross_entropy(h, weight, labels, chunk_size=8), hidden)
    assert loss.isfinite() and grad.isfinite().all() and not grad[labels < 0].any()


CASES = [
    ({"hidden": torch.Tensor.int}, TypeError, r"hidden must be \[..., H\], float32, .*, got int32 \[3, 7, 12\]"),
    ({"weight": torch.t}, ValueError, r"weight must be \[V >= 1, 12\], got float32 \[12, 33\]"),
    ({"weight": lambda t: t[:0]}, ValueError, r"weight must be \[V >= 1, 12\], got float32 \[0, 12\]"),
    ({"weight": torch.Tensor.half}, TypeError, r"weight must be float32, got float16 \[33, 12\]"),
    ({"weight": lambda t: t.to("meta")}, ValueError, "weight must be on hidden's device, cpu, got .* on meta"),
    ({"bias": lambda t: t[1:]}, ValueError, r"bias must be \[33\], got float32 \[32\]"),
    ({"bias": torch.Tensor.double}, TypeError, r"bias must be float32, got float64 \[33\]"),
    ({"labels": torch.Tensor.int}, TypeError, r"labels must be int64, got int32 \[3, 7\]"),
    ({"labels": torch.flatten}, ValueError, r"labels must be \[3, 7\], got int64 \[21\]"),
    ({"labels": lambda t: t.fill_(33)}, ValueError, r"labels must be in \[0, 33\) or -100, got 33"),
    ({"labels": lambda t: t.fill_(-1)}, ValueError, r"labels must be in \[0, 33\) or -100, got -1"),
    ({"token_mask": torch.ones(3, 7)}, TypeError, r"token_mask must be bool, got float32 \[3, 7\]"),
    ({"token_mask": torch.ones(3, 6).bool()}, ValueError, r"token_mask must be \[3, 7\], got bool \[3, 6\]"),
    ({"reduction": "median"}, ValueError, "reduction must be one of mean, sum, none, got 'median'"),
    ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, 'num_items_in_batch is for reduction "mean"'),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive and finite, got 0.0"),
    ({"logit_softcap": float("nan")}, ValueError, "logit_softcap must be positive and finite, got nan"),
    ({"logit_softcap": float("inf")}, ValueError, "logit_softcap must be positive and finite, got inf"),
    ({"logit_softcap": "x"}, TypeError, "logit_softcap must be a number, got 'x'"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1 row, got 0"),
    ({"chunk_size": 1.5}, TypeError, "chunk_size must be an integer, got 1.5"),
    ({"max_tokens": 1.5}, TypeError, "max_tokens must be an integer, got 1.5"),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch must hold one number, got float32 \[2\]"),
    ({"num_items_in_batch": "7"}, TypeError, "num_items_in_batch must be a number, got '7'"),
    ({"num_items_in_batch": torch.ones((), requires_grad=True)}, ValueError, "num_items_in_batch has no gradient"),
    (
        {"hidden": lambda t: t[0, 0], "labels": lambda t: t[0, 0], "shift": True},
        ValueError,
        r"hidden must be \[..., T, H\] with shift, got float32 \[12\]",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message_names_argument_expectation_and_what_came(changes, error, message):
    hidden, weight, labels, bias = operands()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(**arguments)


def test_losses_of_tokens_have_no_gradient_for_weight():
    hidden, weight, labels, _ = operands()
    with pytest.raises(ValueError, match='reduction "none" has no gradient for weight and bias, which ask for one'):
        ops.linear_cross_entropy(hidden, weight.requires_grad_(), labels, reduction="none")
