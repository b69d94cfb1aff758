"""House rules that a linter does not know: no code from data, small files, small functions, a docstring each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGES, SCRIPTS, imported_modules, parse, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Each of these turns bytes or text from elsewhere into running code.
UNSAFE_MODULES = frozenset({"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})
UNSAFE_BUILTINS = frozenset({"__import__", "compile", "eval", "exec"})
UNSAFE_CALLS = frozenset(
    {
        ("numpy", "load"),
        ("np", "load"),
        ("os", "system"),
        ("os", "popen"),
        ("torch", "load"),
        ("yaml", "full_load"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
    }
)
# File -> the unsafe names it may use. Empty is the aim; an entry needs its reason beside it.
EXCUSED: dict[str, frozenset[str]] = {
    # The loader is its own subclass of SafeLoader, stricter still: no aliases, bounded depth.
    "cluster/config.py": frozenset({"yaml.load"}),
}

ALL_SOURCES = sources(*PACKAGES, *SCRIPTS)


def unsafe_uses(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything in the file that could run foreign data."""
    for line, name in imported_modules(path):
        if name.partition(".")[0] in UNSAFE_MODULES:
            yield line, name.partition(".")[0]
        module, _, last = name.rpartition(".")
        if (module, last) in UNSAFE_CALLS:
            yield line, name
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in UNSAFE_BUILTINS:
            yield node.lineno, function.id
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            pair = (function.value.id, function.attr)
            if pair in UNSAFE_CALLS:
                yield node.lineno, ".".join(pair)
        if any(key.arg in ("shell", "trust_remote_code") and not is_false(key.value) for key in node.keywords):
            yield node.lineno, "shell or trust_remote_code"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno} {node.name} has {num_lines} lines"


def test_nothing_runs_code_that_came_as_data() -> None:
    wrong = [
        f"{path}:{line} uses {name}"
        for path in ALL_SOURCES
        for line, name in unsafe_uses(path)
        if name not in EXCUSED.get(str(path), frozenset())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load('x')",
        "from torch import load",
        "eval('1')",
        "import yaml; yaml.load('x')",
        "f(shell=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_the_scan_finds_unsafe_code(line: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(line)
    assert list(unsafe_uses(sample))


@pytest.mark.parametrize(
    "line", ["model.eval()", "yaml.safe_load('x')", "f(trust_remote_code=False)", "re.compile('x')"]
)
def test_the_scan_lets_harmless_lookalikes_pass(line: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(line)
    assert not list(unsafe_uses(sample))


def test_no_file_is_longer_than_its_limit() -> None:
    lengths = {path: (parse(path).body[-1].end_lineno or 0) if parse(path).body else 0 for path in ALL_SOURCES}
    assert not {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES}


def test_no_function_is_longer_than_its_limit() -> None:
    wrong = [line for path in ALL_SOURCES for line in long_functions(path)]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is_for() -> None:
    missing = [str(path) for path in ALL_SOURCES if not ast.get_docstring(parse(path))]
    assert not missing, "\n".join(missing)
