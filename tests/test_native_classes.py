"""Value classes whose constructors are written out are made, replaced, compared and hashed as they were."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

SOURCE = '''"""A module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where."""

    row: int
    column: int = 7

    @property
    def sum(self) -> int:
        return self.row + self.column

@dataclass(slots=True)
class Bag:
    things: list[int] = field(default_factory=list)

class Step(NamedTuple):
    number: int
    place: Place = Place(1, 2)

class Pair(NamedTuple):
    one: int
    other: int
'''


def load(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> str:
    tool = load("pdserve_native_classes", ROOT / "tools" / "native_classes.py", monkeypatch)
    written: str = tool.written_out(SOURCE, ("Step",))
    return written


@pytest.fixture
def made(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "made.py"
    path.write_text(text)
    return load("pdserve_made", path, monkeypatch)


def test_a_dataclass_has_a_constructor_of_its_own_and_is_the_same_otherwise(text: str, made: Any) -> None:
    place = made.Place
    assert "def __init__(self, row: int, column: int=7) -> None:" in text
    assert (place(1).row, place(1).column, place(1, column=2).sum) == (1, 7, 3)
    assert place(1, 2) == place(row=1, column=2) != place(1, 3)
    assert len({place(1, 2), place(1, 2)}) == 1
    assert place(1, 2) < place(1, 3)
    assert replace(place(1, 2), row=4) == place(4, 2)
    assert place.__match_args__ == ("row", "column")
    assert place.__doc__ == "Where."


def test_a_named_tuple_that_is_named_becomes_a_class_that_can_be_replaced(made: Any) -> None:
    step = made.Step(3)
    assert not isinstance(step, tuple)
    assert (step.number, step.place) == (3, made.Place(1, 2))
    changed = step._replace(number=4)
    assert (step.number, changed.number, changed.place) == (3, 4, step.place)


def test_others_stay_as_they_are(made: Any) -> None:
    assert made.Pair(1, 2) == (1, 2)
    bags = [made.Bag(), made.Bag()]
    bags[0].things.append(1)
    assert bags[1].things == []
