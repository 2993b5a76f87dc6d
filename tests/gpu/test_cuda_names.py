"""The table of kernels that the sanitizer's tests run lacks none of the library's. Needs no GPU."""

from __future__ import annotations

import re

import pytest

from benchmarks.gpu_check import names

from . import cuda, s2ft, sparse_delta, token_elimination


@pytest.mark.skipif(not names.LIBRARY.exists(), reason="_C_cuda is not built")
def test_every_kernel_of_the_library_has_one_call():
    instances = [*cuda.INSTANCES, *sparse_delta.INSTANCES, *s2ft.INSTANCES, *token_elimination.INSTANCES]
    patterns = [*(instance.kernel for instance in instances), cuda.MASK_KERNEL]
    found = {name: [pattern for pattern in patterns if re.fullmatch(pattern, name)] for name in names.of_library()}
    assert {name: matches for name, matches in found.items() if len(matches) != 1} == {}
    assert {pattern for matches in found.values() for pattern in matches} == set(patterns)
