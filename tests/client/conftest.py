"""Fixtures of the client's tests: a scriptable server and both clients to it."""

from collections.abc import Iterator

import pytest
from fake_inference import FakeInference, running


@pytest.fixture
def fake() -> Iterator[FakeInference]:
    with running(FakeInference()) as server:
        yield server
