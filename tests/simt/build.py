"""Builds the executor, and libraries of CUDA kernels that run in it, with the host compiler.

    library = build(KERNELS)         # path of the shared library, compiled where something changed
    load(KERNELS)                    # and loaded: torch.ops.peft_kernels_simt.<operator>
    set_seed(3)                      # the order of blocks, warps and lanes in every launch from now on

Object files are kept under build/simt by a hash of everything that goes into them. Run as a program, it builds the
project's own kernels and says how long that took.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
TORCH = Path(torch.__file__).parent
STABLE_ABI_TARGET = "0x020b000000000000"  # as in setup.py

KERNELS = (CSRC / "library.cpp", *sorted((CSRC / "cuda").glob("*.cu")))
"""The project's own schemas and kernels."""

_COMMON = (
    "-std=c++20",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    f"-ffile-prefix-map={ROOT}/=",
    f"-fdebug-prefix-map={ROOT}=.",
    f"-isystem{TORCH}/include",
)
_EXECUTOR = (*_COMMON, "-O3", "-Wall")
_KERNELS = (
    *_COMMON,
    "-O1",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-DPK_SIMT",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}",
    f"-I{HERE}/include",
    f"-I{CSRC}/cuda",
    f"-I{CSRC}",
    "-include",
    "before_every_source.h",
    # Calls before every access. What follows keeps accesses as they are written: a 16-byte struct stays one access,
    # a store that is overwritten stays, and types may be punned as nvcc lets them.
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra",
    "-fno-tree-dse",
    "-fno-strict-aliasing",
)
_RED_ZONE = 256  # bytes between static variables, so that one past the end of one is not in the next
_KEEP_SECONDS = 7 * 24 * 3600


class BuildFailed(RuntimeError):
    """The compiler's messages."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler; only gcc is known to instrument the way the executor needs."""
    found = os.environ.get("CXX") or "g++"
    return shutil.which(found)


def build(sources: Iterable[Path], name: str = "kernels") -> Path:
    """The shared library of these sources, compiled as far as they, a header or the flags have changed."""
    executor = _executor()
    sources = tuple(sources)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(_kernel_object, sources))
    flags = (str(executor), f"-Wl,-rpath,{executor.parent}", f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu")
    return _link(name, objects, flags)


@functools.cache
def load(sources: tuple[Path, ...] = KERNELS, name: str = "kernels") -> None:
    """Builds and loads; the operators are then in `torch.ops.peft_kernels_simt`."""
    torch.ops.load_library(str(build(sources, name)))


def set_seed(seed: int) -> None:
    """Chooses the order in which blocks, warps and lanes run; a launch with the same seed repeats it."""
    ctypes.CDLL(str(_executor())).simt_set_seed(ctypes.c_uint64(seed))


@functools.cache
def _executor() -> Path:
    sources = sorted((HERE / "executor").glob("*.cpp"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(_executor_object, sources))
    # Calls within the library stay there, although kernels may hold watched copies of the same inline functions.
    return _link("executor", objects, ("-Wl,-Bsymbolic",))


def _executor_object(source: Path) -> Path:
    out = CACHE / f"{source.stem}-{_key(source, _EXECUTOR)}.o"
    if not _kept(out):
        _compile([*_EXECUTOR, "-c", str(source)], out)
    return out


def _kernel_object(source: Path) -> Path:
    out = CACHE / f"{source.stem}-{_key(source, _KERNELS)}.o"
    if _kept(out):
        return out
    assembly = out.with_suffix(".s")
    _compile([*_KERNELS, "-S", "-x", "c++", str(source)], assembly)
    assembly.write_text(_with_red_zones(assembly.read_text()))
    _compile(["-c", str(assembly)], out)
    assembly.unlink()
    return out


def _kept(out: Path) -> bool:
    """Whether a file is there from an earlier build; if so, it counts as used today."""
    if out.exists():
        out.touch()
        return True
    for file in CACHE.glob("*"):
        if file.is_file() and time.time() - file.stat().st_mtime > _KEEP_SECONDS:
            file.unlink(missing_ok=True)
    return False


def _with_red_zones(assembly: str) -> str:
    """Puts unused bytes behind every static variable; the sizes of their symbols, which the executor reads, stay."""

    def local(match: re.Match[str]) -> str:
        symbol, size, alignment = match.groups()
        zero = f".zero\t{int(size) + _RED_ZONE}"
        kind = f"\t.type\t{symbol}, @object\n\t.size\t{symbol}, {size}\n"
        return f'\t.section\t.bss,"aw",@nobits\n\t.align\t{alignment}\n{kind}{symbol}:\n\t{zero}\n\t.text\n'

    assembly = re.sub(r"^\t\.comm\t(\w+),(\d+),(\d+)\n", local, assembly, flags=re.MULTILINE)
    # Variables of templates have sections of their own.
    section = r"^(\t\.section\t\.bss[^\n]*\n(?:\t[^\n]*\n)*?\w+:\n\t\.zero\t\d+\n)"
    return re.sub(section, rf"\1\t.zero\t{_RED_ZONE}\n", assembly, flags=re.MULTILINE)


def _key(source: Path, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    digest.update("\0".join((_version(), torch.__version__, *flags, str(_RED_ZONE))).encode())
    for file in (source, *_headers()):
        digest.update(f"{file}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _headers() -> tuple[Path, ...]:
    places = (HERE, CSRC / "cuda", CSRC / "common")
    return tuple(sorted(file for place in places for file in place.rglob("*") if file.suffix in (".h", ".cuh")))


@functools.cache
def _version() -> str:
    return subprocess.run([compiler() or "g++", "--version"], capture_output=True, text=True, check=True).stdout


def _link(name: str, objects: list[Path], flags: tuple[str, ...]) -> Path:
    key = hashlib.sha256("\0".join([*map(str, objects), *flags]).encode()).hexdigest()[:16]
    out = CACHE / f"lib{name}-{key}.so"
    if not _kept(out):
        _compile(["-shared", f"-Wl,-soname,{out.name}", *map(str, objects), *flags], out)
    return out


def _compile(arguments: list[str], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(f".{os.getpid()}{out.suffix}")
    result = subprocess.run(
        [compiler() or "g++", *arguments, "-o", str(temporary)], capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode != 0:
        raise BuildFailed(f"{' '.join(arguments)}\n{result.stderr}")
    temporary.replace(out)  # a second process may be building the same


if __name__ == "__main__":
    start = time.perf_counter()
    print(build(KERNELS), f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
