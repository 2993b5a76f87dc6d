"""Builds the compiled parts of peft-kernels with ninja.

Three shared libraries come out, next to the Python package:

    _C.so         operator schemas and CPU kernels           csrc/library.cpp, csrc/cpu/
    _C_cuda.so    CUDA kernels, whenever nvcc is found        csrc/cuda/
    _host.*.so    pybind11 module: build and CPU information  csrc/host/

The first two use libtorch's stable ABI: one build serves torch 2.11 and later, and the CUDA library builds against a
CPU-only torch too. Objects live in build/ninja, so that a second build compiles only what changed.

Environment variables:
    PEFT_KERNELS_SKIP_CUDA=1           leave _C_cuda out even where nvcc is found
    PEFT_KERNELS_CUDA_ARCHS="80;90a"   architectures to build for (default: all of DEFAULT_ARCHS that nvcc knows)
    CUDA_HOME, CXX, MAX_JOBS           toolkit directory, host compiler, parallel compilations
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "ninja"
MINIMUM_TORCH = (2, 11)
STABLE_ABI_TARGET = "0x020b000000000000"  # torch 2.11; the byte 0x0b is eleven
DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120")
GIB_PER_JOB = 1.5

# Instruction sets of the kernels in csrc/cpu; the best one the processor has is chosen at run time.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
AMX = (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
CAPABILITIES: dict[str, tuple[str, ...]] = {"baseline": (), "avx2": AVX2, "avx512": AVX512}
# Sources compiled once per instruction set. Sparse deltas have the same bits with and without fused multiply-add, and
# square roots that leave errno alone, which vectors need.
_SPARSE = ("-ffp-contract=off", "-fno-math-errno")
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "cross_entropy_kernels": CAPABILITIES,
    "delta_kernels": {name: (*flags, *_SPARSE) for name, flags in CAPABILITIES.items()},
    "lora_kernels": CAPABILITIES,
    "s2ft_kernels": CAPABILITIES,
    "sampled_kernels": {**CAPABILITIES, "avx512bf16": (*AVX512, "-mavx512bf16")},
    "sparse_kernels": {name: (*flags, *_SPARSE) for name, flags in CAPABILITIES.items()},
    "selection_kernels": CAPABILITIES,
    "sm3_kernels": {name: (*flags, *_SPARSE) for name, flags in CAPABILITIES.items()},
    "token_elimination_kernels": CAPABILITIES,
    "token_selection_kernels": CAPABILITIES,
}


class BuildError(SystemExit):
    """A missing piece, said in one paragraph instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\npeft-kernels cannot be built: {message}\n")


@dataclass
class Object:
    """One compilation: a source file, the rule that compiles it, and its own flags."""

    source: Path
    rule: str = "cxx"
    name: str = ""
    flags: tuple[str, ...] = ()


@dataclass
class SharedLibrary:
    """One product: its file name inside the package, the objects it is linked from, and the rule that links them."""

    name: str
    objects: list[Object]
    link_flags: list[str] = field(default_factory=list)
    rule: str = "link"


def torch_directory() -> Path:
    """Where torch is installed; its headers and libraries are all the build needs of it."""
    try:
        import torch
    except ImportError:
        raise BuildError(
            "torch does not import in this environment. Install torch >= 2.11 first, then run pip with "
            "--no-build-isolation (an isolated build would not see your torch)."
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MINIMUM_TORCH:
        raise BuildError(f"torch {torch.__version__} is too old; the stable ABI used here needs torch >= 2.11.")
    return Path(torch.__file__).parent


def host_compiler() -> str:
    """The C++ compiler, checked for C++20."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError(
            f"no C++ compiler found (looked for {compiler or 'g++, c++, clang++'}). "
            "Install one, for example `apt-get install g++`, or set CXX."
        )
    probe = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <concepts>\n",
        text=True,
        capture_output=True,
    )
    if probe.returncode != 0:
        raise BuildError(f"{compiler} does not compile C++20; g++ >= 11 or clang++ >= 14 is needed.\n{probe.stderr}")
    return compiler


def ninja_program() -> str:
    """The ninja executable: the PyPI package's, or the system's."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: `pip install ninja`.")
    return found


def pybind11_include() -> str:
    """The header directory of pybind11."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing: `pip install pybind11`.") from None
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        raise BuildError("Python.h is missing; install the Python headers (for example `apt-get install python3-dev`).")
    return str(pybind11.get_include())


def find_nvcc() -> str | None:
    """nvcc by CUDA_HOME, CUDA_PATH, PATH, then the usual place; None where there is none or it is not wanted."""
    if os.environ.get("PEFT_KERNELS_SKIP_CUDA") == "1":
        print("peft-kernels: PEFT_KERNELS_SKIP_CUDA=1, building without CUDA kernels")
        return None
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.exists():
                raise BuildError(f"{variable} is {home}, but there is no bin/nvcc in it. Unset it or correct it.")
            return str(nvcc)
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        print("peft-kernels: nvcc not found, building without CUDA kernels (set CUDA_HOME to build them)")
    return found


def cuda_architectures(nvcc: str) -> list[str]:
    """The architectures to build: the override, or those of DEFAULT_ARCHS that this nvcc knows."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True, check=True).stdout
    known = set(re.findall(r"sm_(\w+)", listing))
    wish = os.environ.get("PEFT_KERNELS_CUDA_ARCHS")
    if wish is None:
        return [arch for arch in DEFAULT_ARCHS if arch in known or arch.rstrip("a") in known]
    archs = [arch for arch in re.split(r"[;,\s]+", wish) if arch]
    unknown = [arch for arch in archs if arch not in known and arch.rstrip("af") not in known]
    if unknown or not archs:
        raise BuildError(
            f"PEFT_KERNELS_CUDA_ARCHS={wish!r}: {nvcc} does not know {', '.join(unknown) or 'an empty list'}; "
            f"it knows {', '.join(sorted(known))}."
        )
    return archs


def code_flags(archs: list[str]) -> list[str]:
    """Machine code for every architecture, and PTX of the last for GPUs yet to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    last = archs[-1]
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def parallel_jobs() -> int:
    """Compilations at a time: MAX_JOBS, or one per core as far as free memory goes."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(free / GIB_PER_JOB)))


def cpu_library(torch_dir: Path) -> SharedLibrary:
    operators = (
        "cross_entropy.cpp",
        "delta_competition.cpp",
        "delta_magnitudes.cpp",
        "delta_random_mask.cpp",
        "deltas.cpp",
        "lora.cpp",
        "lora_products.cpp",
        "outer_product_topk.cpp",
        "product_above.cpp",
        "s2ft.cpp",
        "sampled_product.cpp",
        "slice_exchange.cpp",
        "slice_grad.cpp",
        "sorted_sets.cpp",
        "sparse_delta.cpp",
        "sparse_sm3.cpp",
        "token_elimination.cpp",
        "token_linear.cpp",
        "token_selection.cpp",
    )
    objects = [Object(SOURCES / "library.cpp"), *(Object(SOURCES / "cpu" / source) for source in operators)]
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    for stem, capabilities in KERNELS.items():
        for capability, flags in capabilities.items():
            if on_x86 or capability == "baseline":
                objects.append(
                    Object(
                        SOURCES / "cpu" / f"{stem}.cpp",
                        name=f"{stem}_{capability}",
                        flags=(*flags, f"-DPK_CAPABILITY={capability}"),
                    )
                )
    if on_x86:
        tiles = ("block_scores_amx.cpp", "lora_amx.cpp", "gemm_amx.cpp", "sampled_amx.cpp", "slice_tiles_amx.cpp")
        objects += [Object(SOURCES / "cpu" / source, flags=AMX) for source in tiles]
    return SharedLibrary("_C.so", objects, [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu"])


def cuda_library(torch_dir: Path) -> SharedLibrary:
    # nvcc links, as it alone knows where its static runtime is. The stream lookup lives in libtorch_cuda, which torch
    # loads privately; libtorch, which depends on it in CUDA builds, brings it into reach without a name that a CPU
    # build would miss. --no-as-needed keeps it although nothing here is defined in it directly.
    flags = ["-nodlink", f"-L{torch_dir / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
    objects = [Object(source, rule="nvcc") for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    return SharedLibrary("_C_cuda.so", objects, flags, rule="link_cuda")


def host_module(build_info: str) -> SharedLibrary:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    flags = (
        f"-I{pybind11_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        f"'-DPK_BUILD_INFO=\"{build_info}\"'",
    )
    return SharedLibrary(f"_host{suffix}", [Object(SOURCES / "host" / "module.cpp", flags=flags)])


def compiler_version(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=True).stdout
    lines = [line for line in text.splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), lines[0])
    return re.sub(r"[^\w .+()-]", "", release).strip()


def write_ninja(
    libraries: list[SharedLibrary], compiler: str, torch_dir: Path, nvcc: str | None, codes: list[str]
) -> None:
    """Writes build.ninja; unchanged text keeps its time stamp, so that a no-op build is one."""
    from io import StringIO

    from ninja import ninja_syntax

    text = StringIO()
    writer = ninja_syntax.Writer(text, width=120)
    torch_flags = f"-isystem {torch_dir / 'include'} -DTORCH_TARGET_VERSION={STABLE_ABI_TARGET}"
    prefix_map = f"-ffile-prefix-map={ROOT}/="  # error messages name sources, not the directory of the build
    # The last two for gcc's own intrinsics.
    warnings = "-Wall -Wno-unused-function -Wno-uninitialized -Wno-maybe-uninitialized"
    writer.variable("cxxflags", f"-std=c++20 -O3 -fPIC -fvisibility=hidden {prefix_map} {warnings} {torch_flags}")
    writer.rule(
        "cxx",
        f"{compiler} -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    writer.rule("link", f"{compiler} -shared $in -o $out $flags", description="link $out")
    if nvcc is not None:
        nvccflags = (
            f"-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,{prefix_map} "
            f"-DUSE_CUDA {torch_flags} "
            f"-I{SOURCES / 'cuda'} -ccbin {compiler} {' '.join(codes)}"
        )
        writer.rule(
            "nvcc",
            f"{nvcc} -MD -MF $out.d {nvccflags} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        writer.rule(
            "link_cuda", f"{nvcc} -shared -cudart static -ccbin {compiler} $in -o $out $flags", description="link $out"
        )
    for library in libraries:
        stem = library.name.split(".")[0]
        outputs = []
        for item in library.objects:
            out = f"{stem}/{item.name or item.source.stem}.o"
            writer.build(out, item.rule, str(item.source), variables={"flags": " ".join(item.flags)})
            outputs.append(out)
        writer.build(library.name, library.rule, outputs, variables={"flags": " ".join(library.link_flags)})
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "build.ninja"
    if not path.exists() or path.read_text() != text.getvalue():
        path.write_text(text.getvalue())


class NinjaBuild(build_ext):
    """Builds all libraries in one ninja run and puts them into the package."""

    def run(self) -> None:
        torch_dir, compiler, ninja, nvcc = torch_directory(), host_compiler(), ninja_program(), find_nvcc()
        archs = cuda_architectures(nvcc) if nvcc else []
        info = compiler_version(compiler)
        if nvcc:
            info += f"; nvcc {compiler_version(nvcc)}; CUDA architectures {' '.join(archs)}"
        libraries = [cpu_library(torch_dir), host_module(info)]
        if nvcc:
            libraries.append(cuda_library(torch_dir))
        codes = code_flags(archs) if archs else []
        write_ninja(libraries, compiler, torch_dir, nvcc, codes)
        command = [ninja, "-C", str(BUILD), "-j", str(parallel_jobs())]
        if subprocess.run(command).returncode != 0:
            raise BuildError(f"a compilation failed; its message is above. To repeat it: {' '.join(command)}")
        package = ROOT / "peft_kernels" if self.inplace else Path(self.build_lib) / "peft_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            self._install(BUILD / library.name, package / library.name)
        if not nvcc:
            (package / "_C_cuda.so").unlink(missing_ok=True)

    @staticmethod
    def _install(built: Path, target: Path) -> None:
        # A rename, not a copy over the file: a running process keeps the library it has mapped.
        temporary = target.with_suffix(".new")
        shutil.copy2(built, temporary)
        temporary.replace(target)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "peft_kernels"
        return [str(path) for path in package.glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if sys.platform != "linux":
    raise BuildError(f"Linux is needed, this is {sys.platform}.")

setup(
    # The extension only tells setuptools that wheels of this package belong to one platform.
    ext_modules=[Extension("peft_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
