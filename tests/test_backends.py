"""The choice between backends: what `use_backend` promises, what is refused and why, what the report says."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

import peft_kernels
from peft_kernels import BackendUnavailable, backends, libraries
from peft_kernels.backends import Registration

from .support.lora import random_layer
from .support.operators import OPERATORS
from .support.places import GPU, LAYER_OPERATORS
from .support.s2ft import OPERATORS as S2FT_OPERATORS
from .support.sparse_delta import OPERATORS as SPARSE_OPERATORS
from .support.token_elimination import OPERATORS as TOKEN_OPERATORS

EVERY_OPERATOR = ("dropout_mask", *OPERATORS, *SPARSE_OPERATORS, *S2FT_OPERATORS, *TOKEN_OPERATORS)
NAMES = ("cuda", "triton", "cpu", "reference")


@pytest.fixture
def spy(monkeypatch):
    """Records (operator, backend) of every operator that runs on the CPU, whoever serves it."""
    ran: list[tuple[str, str]] = []

    def watched(operator, backend, function):
        def call(*arguments):
            ran.append((operator, backend))
            return function(*arguments)

        return call

    kept = {name: dict(by_backend) for name, by_backend in backends._registrations.items()}
    for operator, by_backend in kept.items():
        for backend, registration in by_backend.items():
            if registration.function is not None:
                function = watched(operator, backend, registration.function)
                backends.register(
                    operator, backend, Registration(function, registration.device_types, registration.dtypes)
                )
    yield ran
    for operator, by_backend in kept.items():
        for backend, registration in by_backend.items():
            backends.register(operator, backend, registration)


@pytest.fixture
def toy():
    """An operator for one test: reference everywhere, `cpu` and `cuda` kernels for float32, no `triton` kernel."""
    name = "toy_operator"
    backends.register(name, "reference", Registration(lambda: "reference", ("cpu", "cuda"), backends.DTYPES))
    backends.register(name, "cpu", Registration(lambda: "cpu", ("cpu",), (torch.float32,)))
    backends.register(
        name, "triton", Registration(None, ("cpu", "cuda"), backends.DTYPES, "needs a GPU of this century")
    )
    backends.register(name, "cuda", Registration(lambda: "cuda", ("cuda",), (torch.float32,)))
    yield name
    del backends._registrations[name]
    backends._table.clear()


def run(name, device="cpu", dtype=torch.float32):
    return backends.kernel(name, device, dtype)()


def test_compiled_library_is_there_where_it_has_to_be():
    reason = libraries.missing["_C"]
    if os.environ.get("PEFT_KERNELS_REQUIRE_C") == "1":
        assert reason is None, f"PEFT_KERNELS_REQUIRE_C=1, but {reason}"
    elif reason is not None:
        pytest.skip(f"{reason}; none of the compiled kernels is tested")


@GPU
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_are_there_where_a_gpu_is(backend):
    for operator in ("dropout_mask", "lora_accumulate_"):
        assert backends.obstacle(operator, backend, "cuda", torch.bfloat16) is None


def test_default_is_the_first_that_can(toy):
    assert run(toy) == "cpu"
    assert run(toy, dtype=torch.bfloat16) == "reference"


def test_default_on_the_cpu_is_the_compiled_backend_where_it_is_built():
    expected = "cpu" if libraries.missing["_C"] is None else "reference"
    for operator in EVERY_OPERATOR:
        assert backends.choice(operator, "cpu", torch.float32)[0] == expected


def test_use_backend_nests_and_restores(toy):
    assert backends.forced_backend() is None
    with peft_kernels.use_backend("reference"):
        assert run(toy) == "reference"
        with peft_kernels.use_backend("cpu"):
            assert backends.forced_backend() == "cpu"
            assert run(toy) == "cpu"
        assert run(toy) == "reference"
    assert backends.forced_backend() is None
    assert run(toy) == "cpu"


def test_use_backend_restores_after_an_error(toy):
    with pytest.raises(KeyError), peft_kernels.use_backend("reference"):
        raise KeyError("inside")
    assert backends.forced_backend() is None
    assert run(toy) == "cpu"


def test_an_explicit_backend_wins_over_use_backend(toy):
    with peft_kernels.use_backend("reference"):
        assert backends.kernel(toy, "cpu", torch.float32, "cpu")() == "cpu"


@pytest.mark.parametrize("name", ["cudnn", "", "CPU", None, 3])
def test_unknown_name_is_refused(name):
    message = "backend must be one of cuda, triton, cpu, reference, got"
    with pytest.raises(ValueError, match=message), peft_kernels.use_backend(name):
        raise AssertionError("must not enter")
    assert backends.forced_backend() is None


def test_registering_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'tpu'"):
        backends.register("toy_operator", "tpu", Registration(print, ("cpu",), backends.DTYPES))
    assert "toy_operator" not in backends.operators()


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float32, "needs a GPU of this century"),
        ("cuda", torch.float32, "serves cuda tensors only"),
        ("cpu", torch.bfloat16, "does not take bfloat16"),
    ],
)
def test_unavailable_backend_is_refused_with_the_reason(toy, backend, dtype, reason):
    with peft_kernels.use_backend(backend), pytest.raises(BackendUnavailable) as raised:
        run(toy, dtype=dtype)
    message = str(raised.value)
    assert toy in message
    assert repr(backend) in message
    assert reason in message


def test_refusal_by_name_never_falls_back(spy):
    layer = random_layer()
    with peft_kernels.use_backend("cuda"), pytest.raises(BackendUnavailable):
        layer()
    assert not spy


@pytest.mark.skipif(libraries.missing["_C"] is None, reason="the library is built")
def test_unbuilt_library_is_named_with_what_to_do():
    with peft_kernels.use_backend("cpu"), pytest.raises(BackendUnavailable, match="_C is not built; build it with"):
        random_layer()()


def test_layer_runs_on_the_named_backend_only(spy):
    for backend in ("reference", *(["cpu"] if libraries.missing["_C"] is None else [])):
        spy.clear()
        layer = random_layer().training("x", "lora_a", "lora_b")
        with peft_kernels.use_backend(backend):
            layer(0.3).sum().backward()
        assert {name for _, name in spy} == {backend}
        assert [operator for operator, _ in spy if operator != "dropout_mask"] == list(LAYER_OPERATORS)


def test_choice_of_the_forward_holds_for_the_backward(spy):
    layer = random_layer().training("x", "lora_a", "lora_b")
    with peft_kernels.use_backend("reference"):
        y = layer()
    spy.clear()
    y.sum().backward()
    assert spy
    assert {backend for _, backend in spy} == {"reference"}


@pytest.mark.skipif(libraries.missing["_C"] is not None, reason="needs a second backend")
def test_choice_of_the_forward_holds_inside_another_choice(spy):
    layer = random_layer().training("x", "lora_a", "lora_b")
    with peft_kernels.use_backend("cpu"):
        y = layer()
    spy.clear()
    with peft_kernels.use_backend("reference"):
        y.sum().backward()
    assert {backend for _, backend in spy} == {"cpu"}


def test_choice_of_the_forward_holds_for_a_backward_in_another_thread(spy):
    layer = random_layer().training("x", "lora_a", "lora_b")
    with peft_kernels.use_backend("reference"):
        y = layer()
    spy.clear()
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert layer.lora_a.grad is not None
    assert {backend for _, backend in spy} == {"reference"}


def test_a_kernel_no_gpu_of_this_kind_has_run_is_never_the_default(toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "_record", {})
    backend, passed_over = backends.choice(toy, "cuda", torch.float32)
    assert backend == "reference"
    assert "not yet run on a GPU of sm_90" in passed_over["cuda"]
    assert "needs a GPU of this century" in passed_over["triton"]
    monkeypatch.setattr(backends, "_record", {toy: {"cuda": [{"gpu": "H100", "architecture": "sm_90"}]}})
    assert backends.choice(toy, "cuda", torch.float32)[0] == "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert backends.choice(toy, "cuda", torch.float32)[0] == "reference"
    with peft_kernels.use_backend("cuda"):  # by name it may be tried
        assert run(toy, "cuda") == "cuda"


def test_recorded_runs_are_those_of_the_committed_file():
    path = Path(backends.__file__).with_name("backend_status.json")
    committed = json.loads(path.read_text())["verified_on"]
    for operator in EVERY_OPERATOR:
        for backend in NAMES:
            assert backends.recorded_runs(operator, backend) == committed.get(operator, {}).get(backend, [])


def test_committed_record_names_gpu_architecture_date_and_commit():
    path = Path(backends.__file__).with_name("backend_status.json")
    for operator, by_backend in json.loads(path.read_text())["verified_on"].items():
        assert operator in EVERY_OPERATOR
        for backend, runs in by_backend.items():
            assert backend in ("cuda", "triton")
            for entry in runs:
                assert {"gpu", "architecture", "date", "commit"} <= entry.keys()
                assert entry["architecture"].startswith("sm_")


def test_report_has_a_row_for_every_operator_device_and_dtype():
    report = peft_kernels.backend_report()
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    rows = [(row.operator, row.device_type, row.dtype) for row in report.rows]
    expected = {(op, dev, dtype) for op in backends.operators() for dev in devices for dtype in backends.DTYPES}
    assert set(EVERY_OPERATOR) <= set(backends.operators())
    assert set(rows) == expected
    assert len(rows) == len(expected)


def test_report_gives_a_reason_for_every_backend_that_does_not_serve():
    for row in peft_kernels.backend_report().rows:
        assert row.backend == backends.choice(row.operator, row.device_type, row.dtype)[0]
        assert {row.backend, *row.passed_over} == set(NAMES)
        assert row.backend not in row.passed_over
        assert all(isinstance(reason, str) and reason for reason in row.passed_over.values())


def test_report_prints_a_line_per_row_with_reasons(toy):
    report = peft_kernels.backend_report()
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows)
    (line,) = [line for line in lines if line.startswith(toy) and " float32" in line and " cpu " in line][:1]
    assert "needs a GPU of this century" in line
    assert "reference: available, less preferred" in line


def test_every_missing_library_has_a_reason():
    assert libraries.missing.keys() == {"_C", "_C_cuda", "_host"}
    for name, reason in libraries.missing.items():
        assert reason is None or name in reason
