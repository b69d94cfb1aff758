"""What may be asked of `pdserve profile`, and the file that it writes. Everything is said before anything is measured.

Knows nothing of how a profile is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from pdserve.cluster.whole_files import require_writable
from pdserve.proto.errors import ConfigError

CONVERT, FROM_CLUSTER = "--convert", "--from-cluster"

MEANINGLESS: Mapping[str, tuple[str, ...]] = {
    CONVERT: (
        "--config", "--set", "--seed", "--budget-s", "--flip-s", "--hardware", FROM_CLUSTER, "--base",
    ),
    FROM_CLUSTER: ("--config", "--set", "--seed"),
}  # fmt: skip
WHY_MEANINGLESS: Mapping[str, str] = {
    CONVERT: "the profile is what the file says",
    FROM_CLUSTER: "that cluster has a configuration and a load of its own",
}


def check_asked(given: Mapping[str, object]) -> None:
    """Of options with their values, `None` where nobody gave one: those that go together, with values that can be.

    Raises:
        ConfigError: naming the option.
    """
    asked = {option for option, value in given.items() if value not in (None, [])}
    for kind, meaningless in MEANINGLESS.items():
        idle = [option for option in meaningless if kind in asked and option in asked]
        if idle:
            raise ConfigError(f"{idle[0]}: has no meaning with {kind}: {WHY_MEANINGLESS[kind]}")
    if "--base" in asked and FROM_CLUSTER not in asked:
        raise ConfigError(f"--base: has a meaning with {FROM_CLUSTER} only; everything is measured here")
    budget_s, flip_s = given["--budget-s"], given["--flip-s"]
    if isinstance(budget_s, float) and not (math.isfinite(budget_s) and budget_s > 0):
        raise ConfigError(f"--budget-s: {budget_s!r} is not a positive number of seconds")
    if isinstance(flip_s, float) and not (math.isfinite(flip_s) and flip_s >= 0):
        raise ConfigError(f"--flip-s: {flip_s!r} is neither 0 nor a positive number of seconds")


def model_name(model: str) -> str:
    """That of the folder, which may be written as `.`."""
    return Path(os.path.abspath(model)).name or "model"


def destination(output: Path | None, name: str) -> tuple[str, Path]:
    """What messages call the choice of file, and the file: the one asked for, else NAME.json in the current folder."""
    if output is not None:
        return "--output", output
    return "without --output", Path(f"{name.replace('/', '-').replace(' ', '-')}.json")


def require_destination(output: Path | None, name: str | None) -> None:
    """As far as the file is known: without a name it is when `output` is given.

    Raises:
        ConfigError: it could not be written.
    """
    if output is not None or name is not None:
        require_writable(*destination(output, name or ""))
