"""The readers of cuobjdump's text, on literal samples; names; occupancy."""

from __future__ import annotations

import pytest

from . import cuda_library, machine_code
from .kernel import Kernel, Measurement
from .main_loop import Instruction
from .occupancy import blocks, static_shared

TEXT = """
Fatbin elf code:
================
arch = sm_90a

.section .note.nv.tkinfo
	Tool Name: ptxas
	Tool Version: Cuda compilation tools, release 13.0, V13.0.88

.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: _Z3addPf(0x48)	register count: 28
.nv.info._Z3addPf
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82

	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x2 0x1
.nv.info._Z3subPf
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82
.nv.info._Z3mulPf
	<0x1>
	Attribute:	EIATTR_REQNTID
	Format:	EIFMT_SVAL
	Value:	0x40 0x1 0x1
.section .text

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z3addPf:
  REG:40 STACK:16 SHARED:3072 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z3subPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : _Z3addPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
                                                                  /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
        /*0020*/               @P1 STL [R1], R0 ;                 /* 0x0000000001007387 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                 /* 0x00000000ffffff984 */
        /*0040*/              @!P0 BRA 0x10 ;                     /* 0xfffffff800dc8947 */
        /*0050*/                   BRA.U UP0, 0x60 ;              /* 0x0000000100047547 */
		Function : _Z3subPf
        /*0000*/                   EXIT ;                         /* 0x000000000000794d */
"""


def test_a_kernel_is_put_together():
    kernels = machine_code.parse(TEXT, "sm_90a")
    opcodes = {"LDC": 1, "LDG.E.128": 1, "STL": 1, "BRA": 1, "BRA.U": 1}
    add = Kernel(registers=40, stack=24, static_shared=2048, threads=256, opcodes=opcodes)
    assert kernels == {"_Z3addPf": add, "_Z3subPf": Kernel(registers=8, opcodes={"EXIT": 1})}


def test_branches_carry_their_target():
    code = machine_code.parse_code(TEXT)["_Z3addPf"]
    assert code[-2:] == [Instruction(0x40, "BRA", 0x10), Instruction(0x50, "BRA.U", 0x60)]


def test_threads_are_those_of_bounds_and_of_exact_requests():
    assert machine_code.parse_threads(TEXT) == {"_Z3addPf": 256, "_Z3mulPf": 64}


def test_the_release_is_that_of_the_assembler():
    assert machine_code.parse_release(TEXT) == "13.0"
    assert machine_code.parse_release("") == "of unknown release"


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z3addPf", "add"),
        (
            "_ZN12peft_kernels44_GLOBAL__N__5763f17b_7_lora_cu_0810c024_599617accumulate_kernelIfN3c104HalfEEEvi",
            "accumulate_kernel<float, Half>",
        ),
        (
            "_ZN12peft_kernels12_GLOBAL__N_16kernelINS_4TileIN3c108BFloat16ELNS_5AlongE1ELi64EEELb1EEEvPFviE",
            "kernel<Tile<BFloat16, (Along)1, 64>, true>",
        ),
    ],
)
def test_kernel_names_are_bare(mangled, name):
    assert cuda_library.demangled([mangled]) == [name]


def test_a_second_kernel_of_a_name_is_kept():
    measured = Measurement("nvcc 13.0")
    for registers in (1, 2, 3):
        measured.add("k", "sm_100", Kernel(registers=registers))
    measured.add("k", "sm_90a", Kernel(registers=4))
    found = {name: {arch: kernel.registers for arch, kernel in k.items()} for name, k in measured.kernels.items()}
    assert found == {"k": {"sm_100": 1, "sm_90a": 4}, "k, again": {"sm_100": 2}, "k, again, again": {"sm_100": 3}}
    assert measured.architectures == ["sm_90a", "sm_100"]


def test_reserved_shared_memory_is_not_the_kernels():
    assert static_shared(3072, "sm_89") == 3072
    assert [static_shared(reported, "sm_90a") for reported in (3072, 1024, 0)] == [2048, 0, 0]


@pytest.mark.parametrize(
    ("kernel", "architecture", "expected"),
    [
        (Kernel(registers=128, threads=256), "sm_80", 2),  # 65536 registers / (128 x 256)
        (Kernel(registers=129, threads=256), "sm_80", 1),  # 136 are given out
        (Kernel(registers=32, threads=256), "sm_80", 8),  # 64 warps
        (Kernel(registers=32, threads=256), "sm_86", 6),  # 48 warps
        (Kernel(registers=32, threads=32), "sm_89", 24),  # blocks
        (Kernel(registers=168, threads=96), "sm_90a", 4),  # 12 warps, three in each quarter
        (Kernel(registers=255, threads=288), "sm_80", 0),  # 9 warps take the registers of 12
        (Kernel(registers=32, threads=128, static_shared=24 * 1024, dynamic_shared=8 * 1024), "sm_120", 3),
        (Kernel(registers=32, threads=128, dynamic_shared=99 * 1024), "sm_86", 1),
        (Kernel(registers=32, threads=128, dynamic_shared=100 * 1024), "sm_86", 0),
        (Kernel(registers=32), "sm_80", None),  # no launch bounds
        (Kernel(registers=32, threads=128), "sm_75", None),  # not in the table
    ],
)
def test_blocks_are_those_that_fit(kernel, architecture, expected):
    assert blocks(kernel, architecture) == expected
