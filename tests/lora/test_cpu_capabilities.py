"""Every set of CPU kernels this processor can run, not only the one it would choose: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels import libraries

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {
    "baseline": (),
    "avx2": ("avx2",),
    "avx512": ("avx512f", "avx512_bf16"),
    "amx": ("avx512f", "avx512_bf16", "amx_bf16"),
}
# Exact results over ranks, sizes, strides and dtypes, the accuracy of each rank, and the masks.
CHOSEN = "cpu-cpu and (exact or test_ranks or same_bits_on_every or every_size_of_gate)"
SHRINK = "torch.ops.peft_kernels.lora_shrink(torch.ones(2, 3), torch.ones(1, 3), 1.0, 0.0, None)"
MASK = "torch.ops.peft_kernels.dropout_mask(1, 8, 0.5, torch.zeros(2, dtype=torch.int64))"
SAMPLED = "torch.ops.peft_kernels.sampled_product(*[torch.ones(1, 2)] * 2, torch.zeros(1).int(), torch.float32)"

pytestmark = pytest.mark.skipif(
    libraries.missing["_C"] is not None or libraries.host is None, reason="the compiled library is not built"
)


def run(capability, *command):
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def supported(capability):
    features = libraries.host.cpu_features() if libraries.host else {}
    return all(features.get(feature) for feature in NEEDS[capability])


@pytest.mark.parametrize("capability", NEEDS)
def test_kernels_of_every_capability(capability):
    if not supported(capability):
        pytest.skip(f"this processor has no {capability}")
    if capability == os.environ.get("PEFT_KERNELS_CPU_CAPABILITY", [name for name in NEEDS if supported(name)][-1]):
        pytest.skip(f"{capability} is what every other test of this run uses")
    files = [f"tests/lora/test_{name}.py" for name in ("operators", "properties", "philox")]
    files.append("tests/sparse_delta/test_sampled_product.py")
    files += [f"tests/s2ft/test_{name}.py" for name in ("gather_columns", "slice_grad", "swiglu")]
    files += ["tests/token_selection/test_block_scores.py", "tests/token_selection/test_select_tokens.py"]
    files.append("tests/cross_entropy/test_rows.py")
    done = run(capability, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("call", [SHRINK, MASK, SAMPLED], ids=["lora_shrink", "dropout_mask", "sampled_product"])
def test_unknown_capability_is_refused(call):
    done = run("sse", "-c", f"import torch, peft_kernels; {call}")
    assert done.returncode > 0
    assert "PEFT_KERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or amx, got sse" in done.stderr


@pytest.mark.skipif(all(supported(capability) for capability in NEEDS), reason="this processor has them all")
def test_capability_the_processor_lacks_is_refused():
    lacking = next(capability for capability in NEEDS if not supported(capability))
    done = run(lacking, "-c", f"import torch, peft_kernels; {SHRINK}")
    assert done.returncode > 0, "refused with an error, not ended by an illegal instruction"
    assert "PEFT_KERNELS_CPU_CAPABILITY" in done.stderr
