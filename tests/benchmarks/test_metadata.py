"""Every figure says where it comes from."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import metadata

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git(answers: dict[str, str | None]):  # type: ignore[no-untyped-def]
    return lambda *arguments: answers[arguments[0]]


def test_a_changed_tree_is_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_git", git({"rev-parse": COMMIT, "status": " M setup.py"}))
    assert metadata.commit() == {"commit": COMMIT, "dirty": True}
    monkeypatch.setattr(metadata, "_git", git({"rev-parse": COMMIT, "status": ""}))
    assert metadata.commit() == {"commit": COMMIT, "dirty": False}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (COMMIT, {"commit": COMMIT, "dirty": False}),
        (f"{COMMIT}-dirty", {"commit": COMMIT, "dirty": True}),
        ("main", {"commit": None, "dirty": None}),
        (None, {"commit": None, "dirty": None}),
    ],
)
def test_without_git_the_environment_says_the_commit(
    monkeypatch: pytest.MonkeyPatch, stated: str | None, expected: dict[str, object]
) -> None:
    monkeypatch.setattr(metadata, "_git", git({"rev-parse": None}))
    monkeypatch.delenv("PEFT_KERNELS_COMMIT", raising=False)
    if stated is not None:
        monkeypatch.setenv("PEFT_KERNELS_COMMIT", stated)
    assert metadata.commit() == expected


def test_the_device_has_a_name_fit_for_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_cpu_info", lambda: ("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", []))
    expected = f"intel-xeon-gold-6338-cpu-2-00ghz-{torch.get_num_threads()}-threads"
    assert metadata.slug(torch.device("cpu")) == expected


def test_the_machine_and_the_versions_are_recorded() -> None:
    versions = metadata.package_versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"triton", "peft", "transformers", "peft_kernels"} <= set(versions)
    system = metadata.system(torch.device("cpu"))
    assert system["cpu"]
    assert system["threads"] == torch.get_num_threads()
