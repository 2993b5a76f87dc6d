"""The compiled libraries keep to libtorch's stable ABI, and `_C_cuda` holds machine code for every architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import peft_kernels
from peft_kernels import libraries

PACKAGE = Path(peft_kernels.__file__).parent
LIBRARIES = ("_C", "_C_cuda")
# A C++ symbol in a namespace of torch's, demangled. The stable interface is inline C++ over C functions, so that even
# `torch::stable::` must not be left to the loader.
UNSTABLE = re.compile(r"(?<![\w:])(?:c10|at|caffe2|torch)::")


def library(stem: str) -> Path:
    path = PACKAGE / f"{stem}.so"
    if not path.exists():
        pytest.skip(f"{stem} is not built")
    return path


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def undefined_symbols(path: Path) -> list[str]:
    """What the loader must find elsewhere, C++ names demangled, symbol versions removed."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, which comes with every C++ compiler")
    lines = output_of("nm", "-D", "-C", "--undefined-only", path).splitlines()
    return [line.split(maxsplit=1)[1].split("@")[0].strip() for line in lines]


def tool(name: str) -> Path:
    """A CUDA binary utility: on the path, or the one in Triton's wheel."""
    if found := shutil.which(name):
        return Path(found)
    triton = pytest.importorskip("triton", reason=f"needs {name}, of the CUDA toolkit or Triton's wheel")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        pytest.skip(f"needs {name}; neither on the path nor in Triton's wheel")
    return path


@pytest.mark.parametrize(
    ("symbol", "unstable"),
    [
        ("c10::detail::torchCheckFail(char const*, char const*, unsigned int, char const*)", True),
        ("at::_ops::empty_like::call(at::Tensor const&)", True),
        ("vtable for torch::autograd::Node", True),
        ("std::vector<c10::IValue>::~vector()", True),
        ("aoti_torch_get_data_ptr", False),
        ("torch_call_dispatcher", False),
        ("std::format::at(int)", False),
        ("memcpy", False),
    ],
)
def test_guard_tells_stable_from_unstable_symbols(symbol, unstable):
    assert bool(UNSTABLE.search(symbol)) == unstable


@pytest.mark.parametrize("stem", LIBRARIES)
def test_library_needs_only_stable_symbols_of_torch(stem):
    symbols = undefined_symbols(library(stem))
    assert any(re.fullmatch(r"(aoti_)?torch_library_impl", symbol) for symbol in symbols), "registers no operator"
    assert [symbol for symbol in symbols if UNSTABLE.search(symbol)] == []


@pytest.mark.parametrize("stem", LIBRARIES)
def test_library_is_free_of_python(stem):
    assert [name for name in undefined_symbols(library(stem)) if name.startswith(("Py", "_Py"))] == []


def test_host_module_needs_nothing_of_torch():
    if libraries.host is None:
        pytest.skip(f"no _host module: {libraries.missing['_host']}")
    symbols = undefined_symbols(Path(libraries.host.__file__))
    assert [name for name in symbols if UNSTABLE.search(name) or "torch" in name] == []


def test_cuda_library_leads_the_loader_to_the_stream_lookup():
    # Python loads libtorch_cuda for itself alone, so being in the process is not enough: only what a library names, or
    # what that names in turn, is searched. Every torch has a libtorch, and that of a CUDA build names libtorch_cuda.
    path = library("_C_cuda")
    assert "aoti_torch_get_current_cuda_stream" in undefined_symbols(path)
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, which comes with every C++ compiler")
    assert "libtorch.so" in re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", path))


def test_cuda_library_carries_its_own_runtime():
    path = library("_C_cuda")
    # One build must serve torch builds with any CUDA runtime; and its calls must reach its own runtime, not torch's.
    assert [name for name in undefined_symbols(path) if name.startswith(("cuda", "__cuda"))] == []
    exported = output_of("nm", "-D", "--defined-only", path)
    assert re.findall(r" (_{0,2}cuda\w+)", exported) == []


def test_cuda_library_has_machine_code_for_every_architecture_of_the_build():
    path = library("_C_cuda")
    if libraries.host is None:
        pytest.skip(f"no _host module to name the architectures: {libraries.missing['_host']}")
    named = re.search(r"CUDA architectures((?: \d+[af]?)+)", libraries.host.build_info)
    assert named is not None, f"the build information names no architecture: {libraries.host.build_info}"
    found = re.findall(r"\.sm_(\d+[af]?)\.cubin", output_of(tool("cuobjdump"), "--list-elf", path))
    assert sorted(set(found)) == sorted(named.group(1).split())


def test_cuda_library_has_ptx_for_architectures_to_come():
    path = library("_C_cuda")
    listing = output_of(tool("cuobjdump"), "--list-elf", "--list-ptx", path)
    number = {kind: [int(n) for n in re.findall(rf"\.sm_(\d+)[af]?\.{kind}", listing)] for kind in ("cubin", "ptx")}
    assert max(number["ptx"], default=0) == max(number["cubin"])


def test_sources_use_no_macro_that_the_oldest_torch_lacks():
    """Everything is compiled for torch 2.11, but here against the headers of the torch that is installed."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # 2.13; TORCH_ERROR_CODE_CHECK is in both
    sources = Path(__file__).parents[2] / "csrc"
    using = [
        f"{path.relative_to(sources)}: {macro}"
        for path in sources.rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
        for macro in newer
        if macro in path.read_text()
    ]
    assert using == []
