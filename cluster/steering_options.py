"""What happens to a simulated fleet, as it is written on a command line.

    --fail decode-0@60+30     dies at 60 s, an empty worker takes its place 30 s later; without +30 never
    --flip prefill-1@120=decode    takes nothing new from 120 s on and turns when it is empty

Knows nothing of how it is carried out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pdserve.cluster.planner.steering import Action, Fail, Flip, Script
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

FAIL = re.compile(r"(?P<worker>[a-z]+-\d+)@(?P<at>[\d.]+)(\+(?P<back>[\d.]+))?")
FLIP = re.compile(r"(?P<worker>[a-z]+-\d+)@(?P<at>[\d.]+)=(?P<role>[a-z]+)")


def parse_script(failures: Sequence[str], flips: Sequence[str], worker_ids: Sequence[str]) -> Script:
    """Everything that was written, in order of time.

    Raises:
        ConfigError: naming what makes no sense.
    """
    actions = [_failure(text, worker_ids) for text in failures] + [_flip(text, worker_ids) for text in flips]
    return Script(actions)


def _failure(text: str, worker_ids: Sequence[str]) -> tuple[float, Action]:
    found = FAIL.fullmatch(text)
    if found is None:
        raise ConfigError(f"--fail: {text!r} is not WORKER@SECONDS or WORKER@SECONDS+SECONDS, as in decode-0@60+30")
    back_s = math.inf if found["back"] is None else _seconds("--fail", found["back"])
    return _seconds("--fail", found["at"]), Fail(_known("--fail", found["worker"], worker_ids), back_s)


def _flip(text: str, worker_ids: Sequence[str]) -> tuple[float, Action]:
    found = FLIP.fullmatch(text)
    if found is None:
        raise ConfigError(f"--flip: {text!r} is not WORKER@SECONDS=ROLE, as in prefill-1@120=decode")
    if found["role"] not in list(Role):
        raise ConfigError(f"--flip: {found['role']} is no role; one of {', '.join(Role)}")
    worker_id = _known("--flip", found["worker"], worker_ids)
    return _seconds("--flip", found["at"]), Flip(worker_id, Role(found["role"]))


def _known(option: str, worker_id: str, worker_ids: Sequence[str]) -> str:
    if worker_id not in worker_ids:
        raise ConfigError(f"{option}: there is no worker {worker_id}; there are {', '.join(worker_ids)}")
    return worker_id


def _seconds(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option}: {text} is not a number of seconds") from None
