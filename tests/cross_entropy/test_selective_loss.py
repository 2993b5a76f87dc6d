"""The loss on tokens chosen by their excess loss, against all logits, `topk` and torch's mean."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import peft_kernels
from peft_kernels import ops
from peft_kernels.ops import counted_labels
from peft_kernels.training.memory import peak_of_profile

from ..support.accuracy import assert_accurate
from .test_linear_cross_entropy import AT, EACH_PLACE, IGNORED, NAMES, operands, with_gradients

RATIOS = (0.1, 0.6, 1.0)


def token_losses(hidden, weight, labels, bias=None, softcap=None, shift=False):
    """The loss of each label at the label's place."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return F.pad(losses, (1, 0)) if shift else losses


def most_excess(losses, reference, ratio, labels, shift=False):
    """By `topk`, which says nothing of equal ones."""
    counts = labels != IGNORED
    if shift:
        counts[:, 0] = False
    number = math.ceil(round(ratio * int(counts.sum()), 6))
    excess = torch.where(counts, losses - reference, -math.inf).flatten()
    return torch.zeros_like(counts).flatten().index_fill(0, excess.topk(number).indices, True).view(labels.shape)


@EACH_PLACE
@pytest.mark.parametrize(
    ("ratio", "options"),
    [(0.6, {}), (0.3, {"chunk_size": 4, "shift": True}), (0.6, {"chunk_size": 5, "logit_softcap": 2.0})],
    ids=["mean", "shift", "softcap"],
)
def test_loss_and_gradients_are_torchs(place, dtype, ratio, options):
    hidden, weight, labels, bias = operands(dtype=dtype, device=place.device)
    softcap, shift = options.get("logit_softcap"), options.get("shift", False)
    # Far from each other, so that no rounding of a loss changes what is chosen.
    reference = torch.randperm(labels.numel(), device=place.device).view(labels.shape) * 50.0

    def theirs(hidden, weight, bias):
        losses = token_losses(hidden, weight, labels, bias, softcap, shift)
        return losses[most_excess(losses.detach(), reference, ratio, labels, shift)].mean()

    with peft_kernels.use_backend(place.backend):
        found = with_gradients(
            lambda h, w, b: ops.selective_cross_entropy(h, w, labels, reference, ratio, b, **options),
            hidden,
            weight,
            bias,
        )
    own = with_gradients(theirs, hidden, weight, bias)
    exact = with_gradients(theirs, hidden.double(), weight.double(), bias.double())
    for name, *tensors in zip(NAMES, found, own, exact, strict=True):
        assert_accurate(*tensors, name)


def test_gradcheck():
    hidden, weight, labels, bias = operands((6,), 4, 7, torch.float64)
    reference = torch.arange(6.0).mul(30)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.selective_cross_entropy(h, w, labels, reference, 0.5, b, logit_softcap=1.5), tensors
    )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_excess_is_selected(ratio, shift, dtype):
    _, _, labels, _ = operands((3, 41))
    losses, reference = torch.rand(3, 41).to(dtype), torch.randperm(123).view(3, 41).to(dtype)
    mask = ops.select_excess_tokens(losses, reference, ratio, labels, shift=shift)
    wide = torch.promote_types(dtype, torch.float32)
    expected = most_excess(losses.to(wide), reference.to(wide), ratio, labels, shift)
    assert mask.dtype == torch.bool and torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("tokens", "ratio", "number"), [(10, 0.7, 7), (10, 0.61, 7), (3, 0.1, 1), (5, 0, 0), (7, 1, 7)]
)
def test_how_many(tokens, ratio, number):
    losses = torch.rand(tokens)
    assert ops.select_excess_tokens(losses, torch.zeros(tokens), ratio).sum() == number
    padded = torch.cat((losses, torch.full((4,), 9.0)))
    labels = torch.tensor([1] * tokens + [IGNORED] * 4)
    mask = ops.select_excess_tokens(padded, torch.zeros(tokens + 4), ratio, labels)
    assert mask.sum() == number and not mask[tokens:].any()


def test_of_equal_ones_the_earlier_is_taken():
    losses = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    mask = ops.select_excess_tokens(losses, torch.zeros(2, 3), 0.5)
    assert mask.tolist() == [[True, True, False], [False, False, True]]
    assert (
        ops.select_excess_tokens(torch.zeros(400), torch.zeros(400), 0.25).nonzero().flatten().equal(torch.arange(100))
    )


def test_what_is_not_finite():
    losses = torch.tensor([1.0, math.inf, math.nan, 2.0, 3.0])
    reference = torch.tensor([math.inf, 0.0, 0.0, 0.0, 0.0])
    labels = torch.tensor([1, 1, 1, 1, IGNORED])
    chosen = [ops.select_excess_tokens(losses, reference, k / 4, labels).nonzero().flatten().tolist() for k in range(5)]
    # A NaN first; a counted token with an excess of minus infinity before one that does not count.
    assert chosen == [[], [2], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


def test_a_mask_leaves_tokens_out_of_the_choice():
    losses = torch.tensor([5.0, 4.0, 3.0, 2.0])
    allowed = torch.tensor([False, True, True, False])
    assert ops.select_excess_tokens(losses, torch.zeros(4), 0.5, token_mask=allowed).tolist() == [
        False,
        True,
        False,
        False,
    ]
    hidden, weight, labels, _ = operands((4,), ignored=0.0)
    reference = torch.tensor([-900.0, -500.0, 0.0, -700.0])
    loss = ops.selective_cross_entropy(hidden, weight, labels, reference, 0.5, token_mask=allowed)
    torch.testing.assert_close(loss, token_losses(hidden, weight, labels)[1])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), ()])
@pytest.mark.parametrize("shift", [False, True])
def test_nothing_to_select_from(shape, shift):
    mask = ops.select_excess_tokens(torch.ones(shape), torch.ones(shape), 0.5, shift=shift)
    assert mask.shape == shape and mask.dtype == torch.bool


@AT
def test_every_label_ignored(place):
    hidden, weight, labels, _ = operands(device=place.device)
    labels.fill_(IGNORED)
    reference = torch.zeros(labels.shape, device=place.device)
    assert not ops.select_excess_tokens(reference, reference, 1.0, labels).any()
    with peft_kernels.use_backend(place.backend):
        assert ops.selective_cross_entropy(hidden, weight, labels, reference).isnan()
        loss, grad = with_gradients(
            lambda h: ops.selective_cross_entropy(h, weight, labels, reference, num_items_in_batch=1), hidden
        )
    assert loss == 0 and not grad.any()


def test_the_whole_ratio_is_the_whole_loss():
    hidden, weight, labels, _ = operands()
    found, whole = (
        with_gradients(loss, hidden, weight)
        for loss in (
            lambda h, w: ops.selective_cross_entropy(h, w, labels, torch.rand(labels.shape), 1.0, shift=True),
            lambda h, w: ops.linear_cross_entropy(h, w, labels, shift=True),
        )
    )
    for left, right in zip(found, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_autocast():
    hidden, weight, labels, bias = operands()
    hidden.requires_grad_()
    reference = torch.rand(labels.shape)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.selective_cross_entropy(hidden, weight, labels, reference, 0.6, bias)
    expected = ops.selective_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), labels, reference, 0.6, bias.bfloat16()
    )
    assert torch.equal(loss, expected) and torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


def test_transforms():
    hidden, weight, labels, _ = operands()
    reference = torch.randperm(21).view(3, 7) * 50.0

    def loss(h):
        return ops.selective_cross_entropy(h, weight, labels, reference, 0.4, shift=True)

    torch.testing.assert_close(torch.func.grad(loss)(hidden), with_gradients(loss, hidden)[1])


@pytest.mark.parametrize("reads", [True, False])
def test_only_selected_rows_are_saved_and_multiplied_back(reads, monkeypatch):
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: reads)
    hidden, weight, labels, _ = operands((40,), ignored=0.25)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.selective_cross_entropy(hidden.requires_grad_(), weight, labels, torch.rand(40), 0.3)
    # The host counts what is selected; elsewhere it knows how many of all tokens that are at most.
    rows = math.ceil(0.3 * int((labels >= 0).sum()) - 1e-9) if reads else 12
    assert [list(tensor.shape) for tensor in saved] == [
        [rows, 12],
        [rows],
        [],
        [],
    ]  # the share of each, and whether any counts


def test_logits_are_never_held_whole():
    tokens, vocabulary, features = 512, 4096, 16
    hidden, weight, labels, _ = operands((tokens,), features, vocabulary, ignored=0.1)
    hidden.requires_grad_()
    reference = torch.rand(tokens)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.selective_cross_entropy(hidden, weight, labels, reference, 0.5, chunk_size=64).backward()
    chunk = 64 * vocabulary * 4
    assert chunk * 4 // 5 < peak_of_profile(profile) < chunk + 4 * weight.nbytes + 4 * hidden.nbytes + 128 * tokens


def test_the_same_rows_where_the_host_does_not_read(monkeypatch):
    hidden, weight, labels, bias = operands((4, 9))
    reference = torch.randperm(36).view(4, 9) * 50.0

    def loss(h, w, b):
        return ops.selective_cross_entropy(h, w, labels, reference, 0.5, b, shift=True)

    expected = with_gradients(loss, hidden, weight, bias)
    monkeypatch.setattr(counted_labels, "host_reads", lambda tensor: False)
    for left, right in zip(with_gradients(loss, hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(left, right)


SELECT = [
    ({"losses": torch.ones(4).int()}, TypeError, r"losses must be float32, .*, got int32 \[4\]"),
    ({"reference_losses": torch.ones(3)}, ValueError, r"reference_losses must be \[4\], as losses, got float32 \[3\]"),
    ({"reference_losses": torch.ones(4).long()}, TypeError, "reference_losses must be float32 or .*, got int64"),
    ({"reference_losses": torch.ones(4, device="meta")}, ValueError, "reference_losses must be on losses' device, cpu"),
    ({"labels": torch.ones(4)}, TypeError, r"labels must be int64, got float32 \[4\]"),
    ({"labels": torch.ones(2, 2).long()}, ValueError, r"labels must be \[4\], as losses, got int64 \[2, 2\]"),
    ({"token_mask": torch.ones(4)}, TypeError, r"token_mask must be bool, got float32 \[4\]"),
    ({"ratio": 1.5}, ValueError, r"ratio must be in \[0, 1\], got 1.5"),
    ({"ratio": math.nan}, ValueError, r"ratio must be in \[0, 1\], got nan"),
    ({"ratio": True}, TypeError, "ratio must be a number, got True"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SELECT)
def test_a_wrong_selection_is_refused(changes, error, message):
    arguments = {"losses": torch.ones(4), "reference_losses": torch.ones(4), "ratio": 0.5, **changes}
    with pytest.raises(error, match=f"select_excess_tokens: {message}"):
        ops.select_excess_tokens(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0.0, which leaves no token"),
        ({"ratio": "half"}, TypeError, "ratio must be a number, got 'half'"),
        ({"reference_losses": torch.ones(3, 6)}, ValueError, r"reference_losses must be \[3, 7\], as labels, got"),
        ({"reference_losses": torch.ones(3, 7).bool()}, TypeError, "reference_losses must be float32 or .*, got bool"),
    ],
)
def test_a_wrong_loss_is_refused(changes, error, message):
    hidden, weight, labels, _ = operands()
    with pytest.raises(error, match=f"selective_cross_entropy: {message}"):
        ops.selective_cross_entropy(hidden, weight, labels, **{"reference_losses": torch.ones(3, 7), **changes})
