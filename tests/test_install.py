"""`make setup` builds once, starts over after an interruption, and refuses several GB that nobody asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from source_tree import ROOT


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pdserve_install", ROOT / "tools" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build(**changes)` updates the environment below `tmp_path`; the pip calls it made, or raises what it raised."""

    def run(torch: str = "", fail_at: str = "", cuda: tuple[str, ...] = (), has_cpu_build: bool = True) -> list[str]:
        calls: list[str] = []

        class Recording(install.Environment):  # type: ignore[name-defined, misc]
            def create(self) -> None:
                self.folder.mkdir(exist_ok=True)
                calls.append("create")

            def pip(self, *args: str) -> None:
                calls.append(args[-1])
                if fail_at and fail_at in args[-1]:
                    raise install.SetupFailed("interrupted")

            def try_pip(self, *args: str) -> bool:
                calls.append(args[-1])
                return has_cpu_build

            def cuda_requirements(self) -> list[str]:
                return list(cuda)

        Recording(tmp_path / "venv", torch, []).update()
        return calls

    monkeypatch.setattr(install, "has_gpu", lambda: False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    return run


def test_a_finished_set_up_is_recognised_and_does_nothing(build: Any) -> None:
    first = build()
    assert first[0] == "create"
    assert first[-1] == str(ROOT)
    assert build() == []


@pytest.mark.parametrize("fail_at", ["constraints.txt", str(ROOT)])
def test_an_interrupted_set_up_is_redone_from_the_start(build: Any, install: ModuleType, fail_at: str) -> None:
    with pytest.raises(install.SetupFailed):
        build(fail_at=fail_at)
    assert build()[0] == "create"


def test_a_torn_stamp_counts_as_no_stamp(build: Any, tmp_path: Path) -> None:
    build()
    (tmp_path / "venv" / "setup.json").write_text('{"closure": "12')
    assert build()[0] == "create"


def test_a_changed_pyproject_reinstalls_only_the_project(
    build: Any, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    changed = tmp_path / "pyproject.toml"
    changed.write_text("[project]")
    monkeypatch.setattr(install, "PYPROJECT", changed)
    assert build() == [str(ROOT)]


def test_changed_constraints_rebuild_everything(
    build: Any, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    changed = tmp_path / "constraints.txt"
    changed.write_text("six==1.0")
    monkeypatch.setattr(install, "CONSTRAINTS", changed)
    assert build()[0] == "create"


def test_without_a_gpu_the_cpu_build_is_asked_for_first(build: Any, install: ModuleType) -> None:
    assert build()[1] == f"torch=={install.TORCH_VERSION}+cpu"


def test_a_build_without_cuda_packages_will_do_when_there_is_none_labelled_cpu(build: Any) -> None:
    assert build(has_cpu_build=False)[-1] == str(ROOT)


def test_cuda_packages_are_refused_without_a_gpu_with_both_ways_out(build: Any, install: ModuleType) -> None:
    with pytest.raises(install.SetupFailed) as refusal:
        build(has_cpu_build=False, cuda=("nvidia-cublas",))
    assert "nvidia-cublas" in str(refusal.value)
    assert "PIP_ARGS=" in str(refusal.value)
    assert "TORCH=" in str(refusal.value)


def test_a_named_build_is_installed_and_kept_when_none_is_named_later(build: Any) -> None:
    named = "torch==2.13.0"
    assert build(torch=named, cuda=("nvidia-cublas",))[1] == named
    assert build() == []


def test_constraints_pin_every_package_exactly_and_name_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert not any(mark in line for line in pins for mark in ("://", "@", "--", "torch=="))
    names = [line.partition("==")[0] for line in pins]
    assert len(names) == len(set(names))
