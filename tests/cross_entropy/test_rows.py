"""`cross_entropy_rows_`: losses and gradients of every width and dtype, in place."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import backends
from peft_kernels.backends import DTYPES
from peft_kernels.reference import cross_entropy as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.places import compiled_cases, dtype_name, places_and_dtypes

OPERATOR = "cross_entropy_rows_"
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR))
WIDTHS = (1, 2, 15, 16, 33, 64, 257, 5003)  # V: less than a vector, whole ones, an odd rest, more than a block
INFINITY = float("inf")


def operands(rows, width, dtype, scale=4.0):
    logits = (scale * torch.randn(rows, width, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, width, (rows,))
    labels[1::3] = -1
    return logits, labels


def run(kernel, logits, labels, scale, device="cpu"):
    logits = logits.clone().to(device)
    return kernel(logits, labels.to(device), scale), logits


@EACH_PLACE
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_rows_against_the_exact_ones(place, dtype, rows, width):
    logits, labels = operands(rows, width, dtype)
    losses, grad = run(place.kernel(OPERATOR, dtype), logits, labels, 0.75, place.device)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    own = run(reference.cross_entropy_rows_, logits, labels, 0.75)
    exact = run(reference.cross_entropy_rows_, logits.double(), labels, 0.75)
    assert_accurate(losses, own[0], exact[0], "losses")
    assert_accurate(grad, own[1], exact[1], "gradient")
    without = (labels < 0).to(place.device)
    assert not losses[without].any() and not grad[without].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_definition_is_torchs(dtype):
    logits, labels = operands(9, 70, dtype)
    losses, grad = run(reference.cross_entropy_rows_, logits, labels, 1.0)
    wide = logits.to(losses.dtype).requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), wide)[0].to(dtype))


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(OPERATOR, dtypes=DTYPES[:3]))  # exact is float64
def test_a_large_spread_and_large_logits(place, dtype):
    logits, labels = operands(8, 300, dtype, scale=30.0)
    logits[3] += 1000.0
    logits[4] -= 1000.0
    losses, grad = run(place.kernel(OPERATOR, dtype), logits, labels, 1.0, place.device)
    own = run(reference.cross_entropy_rows_, logits, labels, 1.0)
    exact = run(reference.cross_entropy_rows_, logits.double(), labels, 1.0)
    assert_accurate(losses, own[0], exact[0], "losses")
    assert_accurate(grad, own[1], exact[1], "gradient")


@EACH_PLACE
@pytest.mark.parametrize("width", [5, 100])
def test_what_is_not_finite(place, dtype, width):
    logits, _ = operands(6, width, dtype)
    labels = torch.full((6,), 2)
    logits[0, 3], logits[1, 3], logits[2, 2], logits[3, 3] = float("nan"), INFINITY, INFINITY, -INFINITY
    logits[4] = -INFINITY
    losses, grad = run(place.kernel(OPERATOR, dtype), logits, labels, 1.0, place.device)
    expected = run(reference.cross_entropy_rows_, logits, labels, 1.0)
    torch.testing.assert_close(losses.cpu(), expected[0], equal_nan=True)
    assert torch.equal(grad.cpu().isnan(), expected[1].isnan())
    assert grad[5].isfinite().all() and not grad[3].isnan().any()


@EACH_PLACE
def test_scale_zero_leaves_zeros(place, dtype):
    logits, labels = operands(6, 40, dtype)
    logits[3, 1] = float("nan")
    losses, left = run(place.kernel(OPERATOR, dtype), logits, labels, 0.0, place.device)
    assert_same_bits(losses[:3], run(place.kernel(OPERATOR, dtype), logits, labels, 1.0, place.device)[0][:3])
    assert not left.any()


@EACH_PLACE
def test_rows_apart_from_each_other(place, dtype):
    logits, labels = operands(5, 37, dtype)
    surroundings = torch.full((5, 50), 7.0, dtype=dtype, device=place.device)
    view = surroundings[:, 6:43]
    view.copy_(logits)
    strided = torch.stack((labels, labels), 1).to(place.device)[:, 1]
    losses = place.kernel(OPERATOR, dtype)(view, strided, 1.0)
    expected = run(place.kernel(OPERATOR, dtype), logits, labels, 1.0, place.device)
    assert_same_bits(losses, expected[0])
    assert_same_bits(view, expected[1])
    assert (surroundings[:, :6] == 7).all() and (surroundings[:, 43:] == 7).all()


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("place", "dtype"), [case for case in places_and_dtypes(OPERATOR) if case.values[0].backend == "cpu"]
)
def test_same_bits_for_any_number_of_threads(place, dtype, restored_threads):
    logits, labels = operands(40, 5003, dtype)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(place.kernel(OPERATOR, dtype), logits, labels, 1.0))
    for losses, grad in results[1:]:
        assert_same_bits(losses, results[0][0])
        assert_same_bits(grad, results[0][1])


@pytest.mark.parametrize(("namespace", "device", "operator"), compiled_cases([(OPERATOR,)]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("rows", [4, 0])
def test_opcheck(namespace, device, operator, dtype, rows):
    logits, labels = operands(rows, 9, dtype)
    raw = getattr(getattr(torch.ops, namespace), operator).default
    torch.library.opcheck(raw, (logits.to(device), labels.to(device), 0.5))


BAD = [
    ({"logits": torch.ones(6)}, r"logits must be 2-D, got float32 \[6\]"),
    ({"logits": torch.ones(3, 4).int()}, r"logits must be float32, .*, got int32 \[3, 4\]"),
    ({"logits": torch.ones(3, 0)}, r"logits must be \[C, V >= 1\] with contiguous rows, got float32 \[3, 0\]"),
    ({"logits": torch.ones(4, 3).t()}, r"logits must be .* contiguous rows, got float32 \[3, 4\] on cpu with strides"),
    ({"logits": torch.ones(1, 4).expand(3, 4)}, r"logits must have rows apart from each other, got float32 \[3, 4\]"),
    ({"labels": torch.zeros(3).int()}, r"labels must be int64 \[3\], got int32 \[3\]"),
    ({"labels": torch.zeros(2).long()}, r"labels must be int64 \[3\], got int64 \[2\]"),
    ({"labels": torch.tensor([0, 4, 1])}, "labels must be less than V, 4, got 4 at position 1"),
    ({"scale": float("nan")}, "scale must be finite, got nan"),
    ({"scale": INFINITY}, "scale must be finite, got inf"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_the_compiled_operator_refuses_before_anything_changes(changes, message):
    arguments = {"logits": torch.ones(3, 4), "labels": torch.zeros(3).long(), "scale": 1.0, **changes}
    before = arguments["logits"].clone()
    with pytest.raises(RuntimeError, match=f"cross_entropy_rows_: {message}"):
        backends.kernel(OPERATOR, "cpu", torch.float32, "cpu")(*arguments.values())
    assert torch.equal(arguments["logits"], before)
