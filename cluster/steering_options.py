"""What happens to a simulated fleet, as it is written on a command line.

    --fail decode-0@60+30     dies at 60 s, an empty worker takes its place 30 s later; without +30 never
    --flip prefill-1@120=decode    takes nothing new from 120 s on and turns when it is empty

Seconds are whatever `float` reads, finite and not negative.

Knows nothing of how it is carried out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pdserve.cluster.planner.simulation import Outcome
from pdserve.cluster.planner.steering import Action, Fail, Flip, Script, Undone
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

WORKER = re.compile(r"[a-z]+-\d+")


def parse_script(failures: Sequence[str], flips: Sequence[str], worker_ids: Sequence[str]) -> Script:
    """Everything that was written, in order of time.

    Raises:
        ConfigError: naming what makes no sense.
    """
    actions = [_failure(text, worker_ids) for text in failures] + [_flip(text, worker_ids) for text in flips]
    return Script(actions)


def undone_notes(outcome: Outcome, script: Script) -> tuple[str, ...]:
    """What was written and did not happen, each in a line."""
    over = f"the last request had ended at {outcome.end_s:,.1f} s"
    undone = (*outcome.undone, *(Undone(at_s, action, over) for at_s, action in script.left))
    return tuple(f"{_written(one.at_s, one.action)} did not happen: {one.why}" for one in undone)


def _written(at_s: float, action: Action) -> str:
    match action:
        case Fail(worker_id, back_after_s):
            back = "" if back_after_s == math.inf else f"+{back_after_s:.12g}"
            return f"--fail {worker_id}@{at_s:.12g}{back}"
        case Flip(worker_id, role):
            return f"--flip {worker_id}@{at_s:.12g}={role}"
        case _:
            raise AssertionError(f"there is no option for {action}")


def _failure(text: str, worker_ids: Sequence[str]) -> tuple[float, Action]:
    form = f"--fail: {text!r} is not WORKER@SECONDS or WORKER@SECONDS+SECONDS, as in decode-0@60+30"
    worker_id, separator, moments = text.partition("@")
    if not separator or not WORKER.fullmatch(worker_id):
        raise ConfigError(form)
    at_s, back_s = _moments(moments, form)
    return at_s, Fail(_known("--fail", worker_id, worker_ids), back_s)


def _moments(text: str, form: str) -> tuple[float, float]:
    """When, and how long after it; a plus may also be an exponent's, as in `1e+3+30`."""
    if (alone := _number(text)) is not None:
        return _seconds("--fail", alone), math.inf
    for place in (place for place, letter in enumerate(text) if letter == "+"):
        at_s, back_s = _number(text[:place]), _number(text[place + 1 :])
        if at_s is not None and back_s is not None:
            return _seconds("--fail", at_s), _seconds("--fail", back_s)
    raise ConfigError(form)


def _flip(text: str, worker_ids: Sequence[str]) -> tuple[float, Action]:
    worker_id, separator, rest = text.partition("@")
    written_at, equals, role = rest.partition("=")
    at_s = _number(written_at)
    if not separator or not equals or not WORKER.fullmatch(worker_id) or at_s is None:
        raise ConfigError(f"--flip: {text!r} is not WORKER@SECONDS=ROLE, as in prefill-1@120=decode")
    if role not in list(Role):
        raise ConfigError(f"--flip: {role} is no role; one of {', '.join(Role)}")
    return _seconds("--flip", at_s), Flip(_known("--flip", worker_id, worker_ids), Role(role))


def _known(option: str, worker_id: str, worker_ids: Sequence[str]) -> str:
    if worker_id not in worker_ids:
        raise ConfigError(f"{option}: there is no worker {worker_id}; there are {', '.join(worker_ids)}")
    return worker_id


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _seconds(option: str, seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{option}: {seconds:g} s is no moment; give a number of seconds from 0 on")
    return seconds
