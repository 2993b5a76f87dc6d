"""Every method against its dense, sorting reference: the same bits, for packed and dense deltas, in memory or files."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import deltas

from ..support.accuracy import assert_same_bits
from ..support.places import dtype_name
from . import dense as plain
from .dense import DTYPES, everywhere, flat, packed, random_dense, unflat, wide

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SCOPES = pytest.mark.parametrize("scope", ["tensor", "global", "row"])


def in_file(delta, path):
    return deltas.DeltaFile(deltas.save_delta(delta, path))


def forms(tensors, tmp_path):
    """The same delta packed, with a value everywhere, and in a file."""
    return packed(tensors), everywhere(tensors), in_file(packed(tensors), tmp_path / "delta.safetensors")


def assert_delta(delta, expected, dtype=None):
    assert list(delta) == sorted(expected)
    for name, tensor in expected.items():
        entry = delta[name]
        entry.check(name)
        assert entry.values.dtype == (dtype or tensor.dtype)
        assert bool((entry.values != 0).all()), f"{name} holds zeros"
        assert_same_bits(entry.dense() + 0.0, tensor.to(entry.values.dtype) + 0.0, name)


@EVERY_DTYPE
@SCOPES
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_trim(tmp_path, dtype, scope, density):
    tensors = random_dense(density=density, dtype=dtype)
    for delta in forms(tensors, tmp_path):
        for kept, outliers in ((0.2, 0.0), (0.07, 0.05), (0.9, 0.3), (1.0, 0.0), (0.0, 0.0)):
            trimmed = deltas.trim(delta, kept, scope=scope, outliers=outliers)
            assert_delta(trimmed, plain.trim(tensors, kept, scope, outliers))


@SCOPES
def test_equal_magnitudes_go_by_position(scope):
    # A few magnitudes and both signs: nearly every threshold cuts through a tie, also between tensors.
    tensors = {name: (5 * tensor).round() for name, tensor in random_dense(seed=3).items()}
    for kept, outliers in ((0.2, 0.0), (0.1, 0.1), (0.33, 0.01)):
        assert_delta(deltas.trim(packed(tensors), kept, scope=scope, outliers=outliers),
                     plain.trim(tensors, kept, scope, outliers))  # fmt: skip


def test_graft_is_the_top_movement_of_the_whole_model():
    tensors = random_dense()
    assert_delta(deltas.graft(packed(tensors), 0.1), plain.trim(tensors, 0.1, "global"))


@EVERY_DTYPE
@SCOPES
def test_breadcrumbs(tmp_path, dtype, scope):
    tensors = random_dense(density=0.6, dtype=dtype)
    for delta in forms(tensors, tmp_path):
        for beta, gamma in ((0.5, 0.1), (0.0, 0.0), (0.8, 0.3), (1.0, 0.0)):
            masked = deltas.breadcrumbs(delta, beta=beta, gamma=gamma, scope=scope)
            assert_delta(masked, plain.breadcrumbs(tensors, beta, gamma, scope))


@EVERY_DTYPE
@pytest.mark.parametrize("p", [0.0, 0.5, 0.9])
def test_dare(tmp_path, dtype, p):
    tensors = random_dense(density=0.5, dtype=dtype)
    expected = plain.dare(tensors, p, seed=-5)
    assert_delta(deltas.dare(packed(tensors), p, seed=-5), expected)
    for delta in forms(tensors, tmp_path):
        for name, tensor in expected.items():
            assert_same_bits(deltas.dare(delta, p, seed=-5)[name].dense() + 0.0, tensor + 0.0)


def test_dares_mask_depends_on_seed_and_name_alone():
    tensors = random_dense()
    whole = deltas.dare(packed(tensors), 0.5, seed=1)
    alone = deltas.dare(packed({"b": tensors["b"]}), 0.5, seed=1)
    assert torch.equal(whole["b"].indices, alone["b"].indices)
    assert not torch.equal(whole["b"].indices, deltas.dare(packed(tensors), 0.5, seed=2)["b"].indices)
    renamed = packed({"c": tensors["b"]})
    assert not torch.equal(whole["b"].indices, deltas.dare(renamed, 0.5, seed=1)["c"].indices)


def several(count, density, dtype):
    tensors = [random_dense(seed, density, dtype) for seed in range(count)]
    return tensors, [packed(part) for part in tensors]


def merged(tensors, function):
    """`function` of the tensors of each name, in the dtype of sums."""
    return {
        name: function([part[name].to(wide(part[name].dtype)) for part in tensors]).to(tensors[0][name].dtype)
        for name in tensors[0]
    }


@EVERY_DTYPE
@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [0.3, -1.5, 2.0]])
def test_linear(dtype, density, weights):
    tensors, parts = several(len(weights), density, dtype)
    assert_delta(deltas.linear(parts, weights), merged(tensors, lambda columns: plain.add(columns, weights)))
    assert_delta(deltas.compose(parts), merged(tensors, lambda columns: plain.add(columns, [1.0] * len(columns))))


@EVERY_DTYPE
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 2.0, 1.0]])
def test_ties(tmp_path, dtype, scope, weights):
    tensors, parts = several(len(weights), 0.7, dtype)
    parts[0] = in_file(parts[0], tmp_path / "delta.safetensors")
    trimmed = [plain.trim(part, 0.2, scope) for part in tensors]
    expected = merged(trimmed, lambda columns: plain.ties(columns, weights))
    assert_delta(deltas.ties(parts, density=0.2, weights=weights, scope=scope), expected)
    untrimmed = merged(tensors, lambda columns: plain.ties(columns, weights))
    assert_delta(deltas.ties(parts, weights=weights), untrimmed)


def test_ties_elects_the_positive_sign_where_masses_are_equal():
    left, right = ({"w": torch.tensor([1.0, -2.0, 0.0])}, {"w": torch.tensor([-1.0, 2.0, -3.0])})
    assert_delta(deltas.ties([packed(left), packed(right)]), {"w": torch.tensor([1.0, 2.0, -3.0])})


def test_dare_then_ties():
    tensors, parts = several(2, 1.0, torch.float32)
    dropped = [plain.dare(part, 0.5, seed) for seed, part in enumerate(tensors)]
    expected = merged([plain.trim(part, 0.3, "tensor") for part in dropped], lambda c: plain.ties(c, [1.0, 1.0]))
    assert_delta(deltas.ties([deltas.dare(part, 0.5, seed=i) for i, part in enumerate(parts)], density=0.3), expected)


@EVERY_DTYPE
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize(("density", "given"), [(0.2, 1.0), (0.2, 0.3), (0.9, 1.0), (1.0, 0.05), (0.0, 1.0)])
def test_pcb(dtype, scope, density, given):
    weights, clamp = [1.0, 0.7], 0.01
    tensors, parts = several(2, given, dtype)

    def one(columns):
        return plain.pcb([column.to(wide(dtype)) for column in columns], density, weights, clamp)

    if scope == "global":
        expected = unflat(one([flat(part) for part in tensors]), tensors[0])
    else:
        expected = {
            name: one([part[name].reshape(-1) for part in tensors]).view(tensors[0][name].shape) for name in tensors[0]
        }
    result = deltas.pcb(parts, density=density, weights=weights, clamp=clamp, scope=scope)
    for name, tensor in expected.items():
        tensor = tensor.to(dtype)
        actual = result[name].dense()
        assert torch.equal(actual != 0, tensor != 0), f"{name}: other entries are kept"
        # exp and tanh are ours: a unit or two in the last place, which a score near the threshold magnifies.
        accuracy = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(actual, tensor, rtol=accuracy, atol=1e-6)


def test_pcb_of_files_equals_that_in_memory(tmp_path):
    _, parts = several(3, 0.4, torch.float32)
    files = [in_file(part, tmp_path / f"{i}.safetensors") for i, part in enumerate(parts)]
    left, right = (deltas.pcb(some, density=0.3) for some in (parts, files))
    for name in left:
        assert_same_bits(left[name].dense(), right[name].dense())


def test_pcb_of_mixed_dtypes():
    # One tensor in float64 makes the whole contest one of float64 keys.
    low, high = random_dense(0), random_dense(1)
    low["b"], high["norm"] = low["b"].double(), high["norm"].double()
    result = deltas.pcb([packed(low), packed(high)], density=0.3, clamp=0.01)
    columns = [flat({name: tensor.double() for name, tensor in part.items()}) for part in (low, high)]
    expected = unflat(plain.pcb(columns, 0.3, [1.0, 1.0], 0.01), low)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name].dense().double(), tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "method", [deltas.linear, deltas.ties, lambda parts: deltas.pcb(parts, density=0.5, clamp=0.0)]
)
def test_disjoint_tensors_and_empty_deltas(method):
    left, right = random_dense(0), random_dense(1)
    only_left, only_right = {"b": left["b"]}, {"norm": right["norm"]}
    result = method([packed(only_left), packed(only_right)])
    assert list(result) == ["b", "norm"]
    nothing = packed({name: torch.zeros_like(tensor) for name, tensor in left.items()})
    assert sum(entry.nnz for entry in method([nothing, nothing]).values()) == 0
    if method is not deltas.linear:
        return
    assert_delta(result, {**only_left, **only_right})


def test_opposite_deltas_cancel_to_nothing():
    delta = packed(random_dense())
    assert all(entry.nnz == 0 for entry in deltas.linear([delta, delta], [1.0, -1.0]).values())
    assert all(entry.nnz == 0 for entry in deltas.linear([delta, deltas.scaled(delta, -1.0)]).values())


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_same_bits_with_one_thread(scope):
    big = {"w": (700, 900), "v": (300_001,)}
    parts = [packed(random_dense(seed, 0.5, shapes=big)) for seed in range(2)]

    def results():
        yield deltas.ties(parts, density=0.1, scope=scope)
        yield deltas.pcb(parts, density=0.1, scope=scope)
        yield deltas.linear([deltas.dare(part, 0.5, seed=i) for i, part in enumerate(parts)])
        yield deltas.breadcrumbs(parts[0], beta=0.5, gamma=0.1)

    def entries():
        return [(entry.indices, entry.values) for delta in results() for entry in delta.values()]

    threads = torch.get_num_threads()
    several_threads = entries()
    try:
        torch.set_num_threads(1)
        one_thread = entries()
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(several_threads, one_thread, strict=True):
        assert_same_bits(left[0], right[0])
        assert_same_bits(left[1], right[1])


def test_history_and_base_model_are_carried_on():
    left = packed(random_dense(0), base_model="base", history=("made",))
    right = packed(random_dense(1))
    result = deltas.ties([deltas.dare(left, 0.5), right], density=0.2)
    assert result.base_model == "base"
    assert result.history == ("1: made", "1: dare(p=0.5, seed=0)", "1: trim(density=0.2, scope=tensor)",
                              "2: trim(density=0.2, scope=tensor)", "ties(weights=[1.0, 1.0])")  # fmt: skip
    with pytest.warns(UserWarning, match="different base models: base, other"):
        deltas.linear([left, packed(random_dense(1), base_model="other")])


DELTA = packed(random_dense())
BAD = {
    "density must be in": lambda: deltas.trim(DELTA, 1.5),
    "density must be in .* got nan": lambda: deltas.trim(DELTA, float("nan")),
    "outliers must be in": lambda: deltas.trim(DELTA, 0.5, outliers=-0.1),
    "scope must be one of": lambda: deltas.trim(DELTA, 0.5, scope="layer"),
    "scope must be one of tensor, global, got 'row'": lambda: deltas.ties([DELTA], density=0.5, scope="row"),
    "beta must be in": lambda: deltas.breadcrumbs(DELTA, beta=2.0, gamma=0.0),
    "gamma must be in": lambda: deltas.breadcrumbs(DELTA, beta=0.5, gamma=-1.0),
    r"p must be in \[0, 1\), got 1.0": lambda: deltas.dare(DELTA, 1.0),
    "deltas must be 1 to 64, got 0": lambda: deltas.linear([]),
    "deltas must be 1 to 64, got 65": lambda: deltas.ties([DELTA] * 65),
    "weights must be as many as deltas, 2, got 1": lambda: deltas.linear([DELTA, DELTA], [1.0]),
    "weights must be finite": lambda: deltas.linear([DELTA], [float("inf")]),
    "weights must be above 0": lambda: deltas.ties([DELTA, DELTA], weights=[1.0, 0.0]),
    "clamp must be in": lambda: deltas.pcb([DELTA], density=0.5, clamp=0.5),
    "factor must be finite": lambda: deltas.scaled(DELTA, float("nan")),
    r"b: deltas must have one shape, got \[33, 17\] and \[17, 33\]": lambda: deltas.linear(
        [DELTA, packed({"b": torch.ones(17, 33)})]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
