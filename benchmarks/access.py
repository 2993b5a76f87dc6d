"""The bound on a scattered write, measured: a C loop with the same accesses, compiled when it is asked for."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_SOURCE = Path(__file__).with_name("access.c")
_FUNCTIONS = {2: "write_16", 4: "write_32"}


def scattered_write() -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """A function of (weight, indices int32, original, values float32) that makes the accesses of `scatter_write_`.

    What it writes is not the sum. It uses as many threads as OpenMP gives it, those of torch in the same process.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler (cc or gcc) to build the loop with")
    directory = tempfile.TemporaryDirectory(prefix="peft-kernels-access-")
    library = Path(directory.name) / "access.so"
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    functions = ctypes.CDLL(str(library))
    directory.cleanup()  # the library stays mapped

    def write(weight: Tensor, indices: Tensor, original: Tensor, values: Tensor) -> None:
        function = getattr(functions, _FUNCTIONS[weight.element_size()])
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, indices, original, values)]
        function(*pointers, ctypes.c_int64(indices.numel()))

    return write
