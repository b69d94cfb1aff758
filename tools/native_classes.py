"""Value classes as mypyc likes them: with constructors written out, which it compiles; those that Python's own
decorators put together when a module is loaded stay interpreted, and took a quarter of the compiled simulator's time.

    @dataclass(frozen=True, slots=True)        @dataclass(init=False, unsafe_hash=True)
    class Pending:                             class Pending:
        num_blocks: int = 0            -->         num_blocks: int

                                                   def __init__(self, num_blocks: int = 0) -> None:
                                                       self.num_blocks = num_blocks

A named tuple that is named becomes such a class as well, with `_replace`: faster to make and to ask, and no tuple any
more, so that nothing may unpack or index it. That nobody writes to what is frozen has mypy seen by then. Knows nothing
of what the classes are for.
"""

from __future__ import annotations

import ast
from collections.abc import Collection


def written_out(source: str, named_tuples: Collection[str] = ()) -> str:
    """The module with the constructors of its dataclasses and of these named tuples written out."""
    module = ast.parse(source)
    for node in list(module.body):
        if isinstance(node, ast.ClassDef) and node.name in named_tuples:
            fields = _fields(node)
            _write_constructor(node, fields)
            node.bases = []
            module.body.insert(2, ast.parse("from typing import Any").body[0])  # behind the docstring and __future__
            node.body += ast.parse(_replace_method(node.name, fields)).body
        elif isinstance(node, ast.ClassDef) and _is_plain_dataclass(node):
            options = ast.unparse(node.decorator_list[0])
            kept = f"init=False, unsafe_hash={'frozen=True' in options}, order={'order=True' in options}"
            node.decorator_list = [ast.parse(f"dataclass({kept})", mode="eval").body]
            _write_constructor(node, _fields(node))
    return ast.unparse(ast.fix_missing_locations(module))


def _is_plain_dataclass(node: ast.ClassDef) -> bool:
    """Whether all of its constructor can be read off its body."""
    if node.bases or not any(ast.unparse(one).startswith("dataclass(") for one in node.decorator_list):
        return False
    names = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return "__post_init__" not in names and not any(
        "field(" in ast.unparse(one.value or one.target) for one in _fields(node)
    )


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [item for item in node.body if isinstance(item, ast.AnnAssign)]


def _write_constructor(node: ast.ClassDef, fields: list[ast.AnnAssign]) -> None:
    parameters = ", ".join(ast.unparse(one) for one in fields)
    lines = [f"self.{name} = {name}" for name in map(_name, fields)]
    node.body += ast.parse(f"def __init__(self, {parameters}) -> None:\n    " + "\n    ".join(lines)).body
    for one in fields:
        one.value = None


def _replace_method(name: str, fields: list[ast.AnnAssign]) -> str:
    values = ", ".join(f"changes['{one}'] if '{one}' in changes else self.{one}" for one in map(_name, fields))
    return f"def _replace(self, **changes: Any) -> {name}:\n    return {name}({values})"


def _name(one: ast.AnnAssign) -> str:
    return ast.unparse(one.target)
