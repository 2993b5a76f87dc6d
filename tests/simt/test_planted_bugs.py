"""Every planted bug is found under every seed, with kind, kernel, and source line; its corrected twin runs clean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import build

SOURCES = ("planted_memory.cu", "planted_order.cu")
SEEDS = range(6)


@dataclass(frozen=True)
class Bug:
    """A case, the kinds of violation it may be reported as, and its operands."""

    name: str
    kinds: tuple[str, ...]
    inputs: int = 64
    shape: tuple[int, ...] = (64,)
    dtype: torch.dtype = torch.float32

    def operands(self) -> tuple[Tensor, Tensor]:
        output = torch.zeros(self.shape, dtype=self.dtype)
        return torch.randn(self.inputs), output[:, : self.inputs] if output.dim() > 1 else output


RACE, GLOBAL_RACE = ("race on shared memory",), ("race on global memory",)
GLOBAL_READ, GLOBAL_WRITE = ("out-of-bounds global read",), ("out-of-bounds global write",)
SHARED_WRITE, UNINITIALISED = ("out-of-bounds shared write",), ("read of uninitialised shared memory",)
NOT_WAITED, MISALIGNED = ("copy not waited for",), ("misaligned access",)
BARRIER, WARP = ("divergent barrier",), ("divergent warp operation",)

BUGS = (
    Bug("store_past_the_end", GLOBAL_WRITE),
    Bug("load_past_the_end", GLOBAL_READ),
    Bug("store_into_the_gap", GLOBAL_WRITE, inputs=10, shape=(5, 12)),
    Bug("vector_over_the_edge", GLOBAL_READ, inputs=62),
    Bug("misaligned_vector", MISALIGNED),
    Bug("null_pointer", GLOBAL_READ),
    Bug("static_shared_past_the_end", SHARED_WRITE),
    Bug("template_shared_before_the_start", SHARED_WRITE),
    Bug("dynamic_shared_past_the_end", SHARED_WRITE),
    Bug("uninitialised_shared", UNINITIALISED),
    Bug("shared_of_the_last_block", UNINITIALISED),
    Bug("write_to_input", ("write to a read-only operand",)),
    Bug("memcpy_past_the_end", GLOBAL_READ),
    Bug("memset_past_the_end", SHARED_WRITE),
    Bug("memcpy_of_uninitialised", UNINITIALISED),
    Bug("struct_past_the_end", GLOBAL_READ),
    Bug("missing_barrier", RACE),
    Bug("missing_second_barrier", RACE),
    Bug("missing_syncwarp", RACE),
    Bug("syncwarp_instead_of_barrier", RACE),
    Bug("shuffle_instead_of_syncwarp", RACE),
    Bug("write_after_read", RACE),
    Bug("order_by_a_flag", RACE),
    Bug("two_blocks_one_element", GLOBAL_RACE),
    Bug("two_threads_one_element", GLOBAL_RACE),
    Bug("read_of_another_blocks_result", GLOBAL_RACE),
    Bug("read_hidden_by_a_read", GLOBAL_RACE),
    Bug("plain_write_beside_atomics", GLOBAL_RACE, dtype=torch.int32),
    Bug("plain_read_after_atomics", RACE, dtype=torch.int32),
    Bug("copy_not_waited_for", NOT_WAITED, inputs=128),
    Bug("too_few_groups_waited_for", NOT_WAITED, inputs=256),
    Bug("copy_never_waited_for", NOT_WAITED, inputs=128),
    # By the order of the two threads, the copy is still in flight or just written.
    Bug("missing_barrier_after_wait", NOT_WAITED + RACE, inputs=128),
    Bug("copy_over_readers", RACE, inputs=128),
    Bug("matrix_load_without_barrier", RACE),
    Bug("matrix_load_of_a_copy", NOT_WAITED, inputs=128),
    Bug("misaligned_matrix_row", MISALIGNED),
    Bug("matrix_product_in_a_branch", WARP),
    Bug("uses_what_is_not_listed", GLOBAL_READ),
    Bug("misaligned_copy", MISALIGNED),
    Bug("copy_past_the_end", GLOBAL_READ, inputs=63),
    Bug("barrier_in_a_branch", BARRIER),
    Bug("barrier_after_a_return", BARRIER),
    Bug("barriers_in_two_branches", BARRIER),
    Bug("barrier_beside_a_shuffle", BARRIER + WARP),
    Bug("shuffle_in_a_branch", WARP),
    Bug("shuffles_in_two_branches", WARP),
    Bug("mask_without_the_caller", WARP),
    Bug("shuffle_from_outside_the_mask", WARP),
    Bug("lanes_in_a_circle", WARP),
    Bug("lock_held_by_another_block", BARRIER, dtype=torch.int32),
)
EACH_BUG = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


def marked_places(name: str) -> set[str]:
    """`file:line` of the comments that say where a bug must be reported."""
    places = set()
    for source in SOURCES:
        path = Path("tests/simt/kernels") / source
        for number, line in enumerate((build.ROOT / path).read_text().splitlines(), 1):
            if line.endswith(f"// BUG: {name}"):
                places.add(f"{path}:{number}")
    return places


@EACH_BUG
def test_found_with_kind_kernel_and_line(cases, bug):
    for seed in SEEDS:
        build.set_seed(seed)
        with pytest.raises(RuntimeError) as raised:
            getattr(cases, bug.name)(*bug.operands(), 1)
        message = str(raised.value)
        found = re.match(r"(\w+): ([\w -]+) in (\w+), block \(\d+, 0, 0\), thread \d+, at ([\w./-]+:\d+)", message)
        assert found, message
        operation, kind, kernel, place = found.groups()
        assert operation == bug.name and kernel == f"{bug.name}_kernel"
        assert kind in bug.kinds, message
        assert place in marked_places(bug.name), message
        assert f"seed {seed}" in message


@EACH_BUG
def test_corrected_twin_runs_clean(cases, bug):
    for seed in SEEDS:
        build.set_seed(seed)
        getattr(cases, bug.name)(*bug.operands(), 0)


def test_every_planted_bug_is_tested():
    text = "".join((build.HERE / "kernels" / source).read_text() for source in SOURCES)
    planted = set(re.findall(r"^CASE\((\w+),", text, re.MULTILINE)) - {"sum_of_atomics"}
    assert planted == {bug.name for bug in BUGS} == set(re.findall(r"// BUG: (\w+)$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((8,), (1,)),
        ((4,), (2,)),
        ((3, 2), (3, 1)),
        ((2, 3), (1, 3)),  # transposed
        ((3, 4), (0, 1)),  # expanded
        ((2, 3), (3, 2)),  # interleaved: the second row starts within the first
        ((3, 3), (1, 1)),  # overlapping
        ((2, 2, 2), (8, 3, 1)),
        ((1, 2), (100, 2)),  # the stride of a single row means nothing
        ((0, 3), (3, 1)),
    ],
)
def test_an_operand_is_exactly_its_elements(cases, sizes, strides):
    memory = torch.arange(32.0)
    view = memory.as_strided(sizes, strides)
    elements = set(view.flatten().int().tolist())
    for offset in range(-2, 16):
        out = torch.zeros(1)
        if offset in elements:
            cases.load_at(view, out, offset)
            assert out.item() == offset
        else:
            with pytest.raises(RuntimeError, match="out-of-bounds global read"):
                cases.load_at(view, out, offset)


def test_messages_say_how_far_outside_and_of_what(cases):
    with pytest.raises(
        RuntimeError, match=r"4 bytes 0 bytes past the end of operand 'output' \(float32 \[64\] on cpu\)"
    ):
        cases.store_past_the_end(torch.zeros(64), torch.zeros(64), 1)
    with pytest.raises(RuntimeError, match=r"at byte 40 of operand 'output' .* between its elements"):
        cases.store_into_the_gap(torch.zeros(10), torch.zeros(5, 12)[:, :10], 1)
    with pytest.raises(RuntimeError, match=r"0 bytes past the end of tile \(128 bytes\)"):
        cases.static_shared_past_the_end(torch.zeros(64), torch.zeros(64), 1)


def test_a_race_names_both_lines(cases):
    first, second = sorted(marked_places("missing_barrier"))
    with pytest.raises(RuntimeError, match=r"not ordered after the (read|write) by thread") as raised:
        cases.missing_barrier(torch.zeros(64), torch.zeros(64), 1)
    assert first in str(raised.value) and second in str(raised.value)


def test_helpers_are_named_with_their_callers(cases):
    with pytest.raises(RuntimeError, match=r"\(fill_template_tile\)[^\n]*\n  called from [^\n]*_kernel\)"):
        cases.template_shared_before_the_start(torch.zeros(64), torch.zeros(64), 1)


def test_a_violation_leaves_the_executor_usable(cases):
    for name in ("copy_not_waited_for", "barrier_in_a_branch"):
        with pytest.raises(RuntimeError):
            getattr(cases, name)(torch.zeros(128), torch.zeros(64), 1)
        getattr(cases, name)(torch.zeros(128), torch.zeros(64), 0)


def bits_under_seeds(cases, variant: int) -> set[int]:
    values = torch.randn(256, generator=torch.Generator().manual_seed(1))
    bits = set()
    for seed in SEEDS:
        build.set_seed(seed)
        out = torch.zeros(1)
        cases.sum_of_atomics(values, out, variant)
        bits.add(int(out.view(torch.int32).item()))
    return bits


def test_a_sum_by_atomics_has_other_bits_under_other_seeds(cases):
    assert len(bits_under_seeds(cases, 1)) > 1
    assert len(bits_under_seeds(cases, 0)) == 1
