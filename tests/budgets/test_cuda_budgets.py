"""What nvcc makes of the CUDA kernels stays within budget on every architecture, checked without a GPU."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from . import nvcc

pytestmark = pytest.mark.slow  # one compilation per architecture

# Instructions a kernel must have been compiled to, as patterns of opcodes with their modifiers.
EXPECTED = {
    "accumulate_kernel": ("LDG.*128*", "STG.*128*", "LDS.*128*", "STS.*128*", "FFMA*"),
    "dropout_mask_kernel": ("STG.*128*", "IMAD.*"),
}
# Local memory, where spilled registers and arrays indexed at run time go.
FORBIDDEN = ("LDL*", "STL*")


@pytest.fixture(scope="module")
def measured():
    try:
        return nvcc.measure()
    except nvcc.ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def budgets():
    return nvcc.load_budgets()


def each(measured):
    """(description, kernel name, figures) of every kernel on every architecture."""
    for architecture, kernels in measured.items():
        for name, kernel in kernels.items():
            yield f"{name} on {architecture}", name, kernel


def present(kernel, pattern):
    return any(fnmatchcase(opcode, pattern) for opcode in kernel.opcodes)


def test_every_kernel_has_a_budget(measured, budgets):
    found = {architecture: sorted(kernels) for architecture, kernels in measured.items()}
    assert found == {architecture: sorted(kernels) for architecture, kernels in budgets["kernels"].items()}


def test_no_kernel_spills_or_uses_the_stack(measured):
    local = {what: (k.stack, k.spill_stores, k.spill_loads) for what, _, k in each(measured)}
    assert {what: sizes for what, sizes in local.items() if any(sizes)} == {}


def test_shared_memory_is_within_budget(measured, budgets):
    for architecture, kernels in budgets["kernels"].items():
        for name, budget in kernels.items():
            assert measured[architecture][name].shared <= budget["shared"], f"{name} on {architecture}"


def test_registers_are_within_budget(measured, budgets):
    release = nvcc.nvcc_release()
    if release != budgets["nvcc"]:
        pytest.skip(f"the budgets were measured with nvcc {budgets['nvcc']}; this is {release}")
    over = {
        f"{name} on {architecture}": f"{measured[architecture][name].registers}, allowed {budget['registers']}"
        for architecture, kernels in budgets["kernels"].items()
        for name, budget in kernels.items()
        if measured[architecture][name].registers > budget["registers"]
    }
    assert over == {}


def test_expected_instructions_are_there(measured):
    for what, name, kernel in each(measured):
        for pattern in EXPECTED[name.split("<")[0]]:
            assert present(kernel, pattern), f"{what} has no {pattern}"


def test_local_memory_instructions_are_absent(measured):
    for what, _, kernel in each(measured):
        for pattern in FORBIDDEN:
            assert not present(kernel, pattern), f"{what} has {pattern}"


def test_ptxas_figures_are_read():
    log = """
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_80'
ptxas info    : Function properties for _Z3addPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3subPf' for 'sm_80'
ptxas info    : Function properties for _Z3subPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""
    expected = nvcc.Kernel(registers=40, stack=16, spill_stores=12, spill_loads=8, shared=2048)
    assert nvcc.parse_ptxas(log) == {"_Z3addPf": expected, "_Z3subPf": nvcc.Kernel(registers=8)}


def test_opcodes_are_read():
    text = """
.section	.text._Z3addPf,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 STL [R1], R0 ;
.section	.text._Z3subPf,"ax",@progbits
        /*0000*/                   EXIT ;
"""
    opcodes = nvcc.parse_disassembly(text)
    assert opcodes == {"_Z3addPf": {"LDC": 1, "LDG.E.128": 1, "STL": 1}, "_Z3subPf": {"EXIT": 1}}


def test_kernel_names_are_bare():
    mangled = ["_ZN12peft_kernels44_GLOBAL__N__5763f17b_7_lora_cu_0810c024_599617accumulate_kernelIfN3c104HalfEEEvi"]
    assert nvcc.demangled([*mangled, "_Z3addPf"]) == ["accumulate_kernel<float, c10::Half>", "add"]
