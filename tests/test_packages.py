"""What is installed is what is on disk, under one name only."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, SCRIPTS, parse

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
NOT_INSTALLED = {*SCRIPTS, "docs", "typings"}
# Files that other programs read; installed as package data.
DATA_ONLY = {"deploy"}


def folders_on_disk() -> set[str]:
    """Top-level folders that belong to the project: neither hidden, nor a script folder, nor a build's leavings."""
    leavings = {"build", "dist", "__pycache__"}
    return {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir()
        and not path.name.startswith(".")
        and path.suffix != ".egg-info"
        and path.name not in NOT_INSTALLED | leavings
    }


def nested_packages() -> set[str]:
    """Folders with Python in them below a top-level one, as `cluster/planner`."""
    modules = (path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).glob("*/**/*.py"))
    return {module.parent.as_posix() for module in modules}


def test_the_package_list_names_every_folder_and_no_other() -> None:
    names = {name.replace("/", ".") for name in folders_on_disk() | nested_packages()}
    assert set(SETUPTOOLS["packages"]) == {f"pdserve.{name}" for name in names}
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))


def test_the_rules_for_sources_cover_every_package() -> None:
    assert folders_on_disk() - DATA_ONLY == set(PACKAGES)


@pytest.mark.parametrize("name", sorted({*PACKAGES, *nested_packages()}))
def test_every_package_says_it_is_typed(name: str) -> None:
    assert (ROOT / name / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted({*PACKAGES, *nested_packages()} - {"proto"}))
def test_a_package_init_holds_a_docstring_and_at_most_its_public_names(name: str) -> None:
    """Importing a folder must cost nothing; only the client, which applications import, offers names."""
    module = parse(Path(name) / "__init__.py")
    assert ast.get_docstring(module)
    rest = module.body[1:]
    if name != "client":
        assert not rest
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in rest)


def test_proto_and_the_root_have_no_init() -> None:
    """`proto` is also the import name of a library that Ray depends on; a root init would shadow the layout."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


def test_deploy_holds_no_python() -> None:
    assert not list((ROOT / "deploy").rglob("*.py"))


def test_the_bare_name_of_every_package_is_banned() -> None:
    """One module must never be imported under two names."""
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(PACKAGES) <= set(banned)


def test_every_proto_file_has_its_stubs() -> None:
    for proto in (ROOT / "proto").glob("*.proto"):
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert proto.with_name(proto.stem + suffix).is_file()
