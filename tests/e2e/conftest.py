"""Fixtures of the tests that start real clusters: one Ray for the session, a state folder of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def private_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands start a Ray of their own and keep their state out of the user's home."""
    return os.environ | {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state")), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def environment(private_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Commands join one Ray that lives as long as the session."""
    shared = private_environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    shared |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    shared["RAY_worker_niceness"] = "0"
    shared["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    command = [sys.executable, str(Path(__file__).parent / "ray_host.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=shared, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as host:
        assert host.stdout is not None
        assert host.stdin is not None
        address = host.stdout.readline().strip()
        assert address, "Ray did not start"
        yield shared | {"PDSERVE_TEST_RAY": address}
        host.stdin.close()
        host.wait(timeout=30)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return REPOSITORY / "deploy" / "models" / "demo"
