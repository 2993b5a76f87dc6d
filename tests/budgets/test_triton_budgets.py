"""What Triton makes of its kernels stays within budget on every architecture, checked without a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter

import pytest

triton = pytest.importorskip("triton")

from peft_kernels import triton_kernels  # noqa: E402

from . import triton_calls, triton_offline  # noqa: E402
from .nvcc import Kernel  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # some eighty compilations, unless Triton has them in its cache
    pytest.mark.skipif(triton_kernels.common.INTERPRETING, reason="interpreted kernels cannot be compiled"),
]
EXPECTED_OPCODE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@pytest.fixture(scope="module")
def measured():
    return triton_offline.measure()


@pytest.fixture(scope="module")
def budgets():
    return triton_offline.load_budgets()


def all_kernels():
    """The names of all functions of the package that are launched."""
    modules = [
        importlib.import_module(f"{triton_kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize("architecture", triton_offline.ARCHITECTURES)
def test_every_kernel_is_measured(architecture):
    launches = triton_offline.recorded(triton_calls.BUDGETED, architecture)
    assert {launch.kernel.__name__ for launch in launches} == all_kernels()


def test_no_kernel_spills_or_uses_the_stack(measured):
    assert triton_offline.spills(measured) == []


def test_figures_are_within_budget(measured, budgets):
    if triton.__version__ != budgets["triton"]:
        pytest.skip(f"the budgets were measured with triton {budgets['triton']}; this is {triton.__version__}")
    grown = triton_offline.differences(measured, budgets)
    assert not grown, "beyond budget; `python -m tests.budgets update triton` if on purpose:\n" + "\n".join(grown)


def test_shared_memory_fits_into_the_architecture(measured):
    for architecture, kernels in measured.items():
        for name, kernel in kernels.items():
            assert kernel.shared <= triton_offline.SHARED_MEMORY[architecture], f"{name} on {architecture}"


def test_half_precision_products_run_on_tensor_cores(measured):
    for architecture, kernels in measured.items():
        used = {name: triton_offline.matrix_opcode(kernel) for name, kernel in kernels.items() if "bf16" in name}
        products = {name: opcode for name, opcode in used.items() if not name.startswith("sum_partials")}
        assert products == dict.fromkeys(products, EXPECTED_OPCODE[architecture])


def test_wide_loads_reach_shared_memory_without_registers(measured):
    # Rows of x are contiguous: 16 bytes at a time, straight into shared memory. Lost alignment hints show here first.
    for architecture, kernels in measured.items():
        for name, kernel in kernels.items():
            if name.startswith(("shrink", "matmul", "factor_grad", "grad_b")):
                assert any(opcode.startswith("LDGSTS") and "128" in opcode for opcode in kernel.opcodes), (
                    f"{name} on {architecture}"
                )


def test_the_largest_tiles_fit_into_cards_with_little_shared_memory():
    for launch in triton_offline.recorded(triton_calls.LARGEST, "sm_89"):
        assert launch.compile("sm_89").metadata.shared <= triton_offline.SHARED_MEMORY["sm_89"], launch.name


@pytest.mark.parametrize("call", triton_calls.COMPILED)
def test_sizes_without_wide_loads_compile(call):
    for launch in triton_offline.recorded({call: triton_calls.COMPILED[call]}, "sm_90"):
        assert launch.compile("sm_90").asm["cubin"], launch.name


def example(registers=40, shared=1024, instructions=180, opcode="HGMMA.64x64x16"):
    return Kernel(registers=registers, shared=shared, opcodes=Counter({opcode: 2, "IADD3": instructions - 2}))


def budget_for(kernel):
    return {"kernels": {"sm_90": {"k": triton_offline.budget_of(kernel)}}}


def test_a_kernel_within_its_budget_makes_no_difference():
    assert triton_offline.differences({"sm_90": {"k": example()}}, budget_for(example())) == []
    assert triton_offline.differences({"sm_90": {"k": example(registers=33)}}, budget_for(example())) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"registers": 41}, "sm_90 k: registers 48, budget 40"),
        ({"shared": 1025}, "sm_90 k: shared 1025, budget 1024"),
        ({"instructions": 201}, "sm_90 k: instructions 300, budget 200"),
        ({"opcode": "HMMA.16816.F32"}, "sm_90 k: uses HMMA, expected HGMMA"),
    ],
)
def test_a_figure_beyond_its_budget_is_named(change, line):
    assert triton_offline.differences({"sm_90": {"k": example(**change)}}, budget_for(example())) == [line]


def test_kernels_without_budget_and_budgets_without_kernel_are_named():
    assert triton_offline.differences({"sm_90": {"new": example()}}, budget_for(example())) == [
        "sm_90 new: no budget",
        "sm_90 k: no such kernel any more",
    ]


def test_spills_are_named():
    spilling = example(opcode="STL.64")
    assert triton_offline.spills({"sm_90": {"k": spilling, "fine": example()}}) == [
        "sm_90 k: 0 bytes of stack, 2 loads and stores of it"
    ]


def test_resource_usage_is_read():
    text = " Function shrink_kernel:\n  REG:242 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert triton_offline.parse_usage(text) == Kernel(registers=242, stack=24)
