"""What measures starts clusters of its own: whatever ends the command takes them down."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_runner import application
from planner_setups import make_profile
from typer.testing import CliRunner

from pdserve.cluster import launch
from pdserve.cluster.planner.profile import dump
from pdserve.cluster.profile_command import profile
from pdserve.cluster.validate_command import validate

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("command", "arguments"),
    [(profile, ["--budget-s", "5"]), (validate, ["--profile", "made-up.json", "--request-rate", "1"])],
    ids=["profile", "validate"],
)
def test_a_signal_takes_the_cluster_down_that_is_measured(
    command: Callable[..., None],
    arguments: list[str],
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken_down = []

    @contextmanager
    def signalled(*_: object) -> Iterator[None]:
        """Comes while the cluster starts."""
        try:
            os.kill(os.getpid(), number)
            yield
        except BaseException as error:
            taken_down.append(type(error))
            raise

    monkeypatch.setattr(launch, "launched", signalled)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made-up.json").write_text(dump(make_profile(model="demo")))
    done = CliRunner().invoke(application(command), [command.__name__, *arguments])
    assert (done.exit_code, taken_down) == (130, [KeyboardInterrupt]), done.output
    assert "interrupted" in done.stderr
