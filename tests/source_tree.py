"""The project's own source files and what they import, read as text: nothing is imported to find out.

Shared by the tests that hold the tree to its rules. Generated stubs are nobody's source and are left out.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "client",
    "cluster",
    "decode_worker",
    "engine",
    "kv_transfer",
    "prefill_worker",
    "proto",
    "router",
)
SCRIPTS = ("bench", "tests", "tools")


def is_generated(path: Path) -> bool:
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


def sources(*folders: str) -> list[Path]:
    """Every hand-written Python file below the folders, relative to the root."""
    found = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not is_generated(path))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, wherever it stands: in a function, under TYPE_CHECKING, in a `try`.

    `from a.b import c` yields `a.b.c`, because `c` may be a module.
    """
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def own_module(name: str) -> Path | None:
    """The file of `pdserve.folder.module` or of something in it; None for anything that is not ours."""
    parts = name.split(".")
    if parts[0] != "pdserve":
        return None
    for end in range(len(parts), 1, -1):
        stem = Path(*parts[1:end])
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if (ROOT / candidate).is_file():
                return candidate
    return None
