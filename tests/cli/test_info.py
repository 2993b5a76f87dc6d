"""`peft-kernels info`: versions, machine, libraries, and who serves what."""

from __future__ import annotations

import json

import pytest
import torch

import peft_kernels
from peft_kernels import backends, libraries

from .conftest import Invoke


def test_json_holds_what_a_bug_report_needs(invoke: Invoke) -> None:
    found = json.loads(invoke("info", "--json").output)
    assert found["versions"]["peft-kernels"] == peft_kernels.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert set(found["libraries"]) == {"_C", "_C_cuda", "_host"}
    served = {(row["operator"], row["device"], row["dtype"]): row["backend"] for row in found["backends"]}
    for operator in backends.operators():
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            expected, _ = backends.choice(operator, "cpu", getattr(torch, dtype))
            assert served[operator, "cpu", dtype] == expected


def test_text_names_every_operator_and_the_reasons(invoke: Invoke) -> None:
    shown = invoke("info").output
    assert all(operator in shown for operator in backends.operators())
    assert "not cuda:" in shown and "not triton:" in shown
    assert torch.__version__ in shown


def test_a_missing_library_is_shown_with_its_reason(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries.missing, "_C_cuda", "because of a test")
    monkeypatch.setattr(libraries, "host", None)
    shown = invoke("info").output
    assert "because of a test" in shown
    assert "unknown, because _host is missing" in shown


@pytest.mark.skipif(libraries.host is None, reason="_host is not built")
def test_cpu_features_are_those_of_the_host_module(invoke: Invoke) -> None:
    found = json.loads(invoke("info", "--json").output)
    assert found["machine"]["cpu_features"] == libraries.host.cpu_features()
    assert found["build"] == libraries.host.build_info
