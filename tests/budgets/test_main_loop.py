"""Finding the main loop in a list of instructions, and its multiply-adds per byte of shared memory."""

from __future__ import annotations

from collections import Counter

import pytest

from .main_loop import Instruction, bytes_loaded, intensity, main_loop, multiply_adds, tile_intensity

HMMA, LDSM = "HMMA.16816.F32.BF16", "LDSM.16.M88.4"


def code(*opcodes):
    """Instructions 16 bytes apart; `("BRA", 2)` goes to the third."""
    items = [(item, None) if isinstance(item, str) else item for item in opcodes]
    return [Instruction(16 * i, op, None if to is None else 16 * to) for i, (op, to) in enumerate(items)]


def test_the_innermost_loop_is_taken():
    outer = code("MOV", "LDG.E", LDSM, HMMA, HMMA, ("BRA", 2), "STG.E", ("BRA", 1), "EXIT")
    assert main_loop(outer) == {LDSM: 1, HMMA: 2, "BRA": 1}


def test_of_two_loops_the_one_with_more_products_is_taken():
    two = code(LDSM, HMMA, ("BRA", 0), HMMA, HMMA, ("BRA", 3), "STS", ("BRA", 6))
    assert main_loop(two) == {HMMA: 2, "BRA": 1}


def test_a_branch_back_into_the_loop_is_no_loop_of_its_own():
    # The rarely taken path lies behind the loop, which it returns to: it encloses only some of the products.
    assert main_loop(code(LDSM, HMMA, HMMA, ("BRA", 0), "EXIT", "STS", ("BRA", 2))) == {LDSM: 1, HMMA: 2, "BRA": 1}


def test_unrolled_code_counts_as_a_whole():
    assert main_loop(code("MOV", LDSM, HMMA, ("BRA", 4), "EXIT")) == {"MOV": 1, LDSM: 1, HMMA: 1, "BRA": 1, "EXIT": 1}
    assert main_loop(code("FFMA", ("BRA", 0))) == {}


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDSM.16.M88.4", 512),
        ("LDSM.16.MT88.2", 256),
        ("LDSM.16.M88", 128),
        ("LDS", 128),
        ("LDS.U16", 64),
        ("LDS.U.64", 256),
        ("LDS.128", 512),
        ("LDG.E.128", 0),
        ("LDGSTS.E.BYPASS.128", 0),
    ],
)
def test_bytes_of_a_load(opcode, expected):
    assert bytes_loaded(opcode) == expected


def test_multiply_adds_of_an_instruction():
    assert [multiply_adds(op) for op in (HMMA, "HMMA.1688.F32.TF32", "FFMA")] == [2048, 1024, 0]


def test_fragments_of_a_warp_tile_reach_its_promise():
    # 64 x 32: per 16 of depth 4 x 4 products, 4 loads of the left operand and 2 of the right.
    loop = Counter({HMMA: 16, LDSM: 4, "LDSM.16.MT88.4": 2, "LDGSTS.E.128": 1})
    assert intensity(loop) == tile_intensity(64, 32) == 10.67


def test_loops_without_products_or_without_loads_have_no_intensity():
    assert intensity(Counter({LDSM: 1})) is None
    assert intensity(Counter({HMMA: 1})) is None
