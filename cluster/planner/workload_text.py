"""A workload as one line: `HEAD[?KEY=VALUE[&KEY=VALUE...]]`, turned into the mapping that YAML would hold.

    azure-conv                                  a preset
    azure-conv?rate=2x&arrivals=poisson         with fields of its own
    trace:/data/conv.csv?window=600:1200        a trace
    synthetic?prompt=1024&output=128&rate=4
    sessions?mean_turns=6&think_s=5/30&prompt=60/300&output=200/500

Keys are those of the kind; `a.b=c` sets a key within `a`. A path with `?` in it must be written in YAML, and so must a
mix or a scenario: a line has no room for parts. Checks the form alone: fields are checked where they are defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdserve.cluster.arrivals import WORKLOADS
from pdserve.proto.errors import ConfigError

COMPOUND = {"mix": "parts", "scenario": "pieces"}
KINDS = ("synthetic", "trace", "sessions", *COMPOUND)


def as_mapping(value: Any) -> Any:
    """The long form of a text or of a mapping with `preset` or a multiple as its rate; anything else as it is.

    Raises:
        ConfigError: the text has no such form, or names no preset.
    """
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, Mapping):
        return value
    fields = _with_scale(value)
    return {**_preset(fields.pop("preset")), **fields} if "preset" in fields else fields


def _with_scale(written: Mapping[str, Any]) -> dict[str, Any]:
    """`rate: 2x` is twice the workload's own rate."""
    fields = dict(written)
    rate = fields.get("rate")
    if isinstance(rate, str) and rate.endswith("x"):
        if "rate_scale" in fields:
            raise ConfigError(f"workload: rate: {rate!r} and rate_scale say the same; give one of them")
        try:
            fields["rate_scale"] = float(rate[:-1])
        except ValueError:
            raise ConfigError(f"workload: rate: {rate!r} is no multiple of the workload's own; write 2x") from None
        del fields["rate"]
    return fields


def _preset(name: Any) -> dict[str, Any]:
    """Published traffic as a synthetic workload, with gamma gaps of its burstiness."""
    if name not in WORKLOADS:
        raise ConfigError(f"workload: preset {name!r} is none of {', '.join(WORKLOADS)}")
    known = WORKLOADS[name]
    return {
        "kind": "synthetic",
        "prompt": {"p50": known.prompt.p50, "p90": known.prompt.p90},
        "output": {"p50": known.output.p50, "p90": known.output.p90},
        "arrivals": {"process": "gamma", "cv": known.burstiness**-0.5},
        "rate": known.rate,
    }


def _parsed(text: str) -> dict[str, Any]:
    head, _, query = text.strip().partition("?")
    kind, colon, path = head.partition(":")
    if kind in COMPOUND:
        raise ConfigError(
            f"workload: a {kind} has {COMPOUND[kind]}, for which a line has no room; write it as YAML and give "
            "FILE.yaml (docs/planner.md, Workloads)"
        )
    if kind in KINDS:
        found: dict[str, Any] = {"kind": kind}
        if colon and kind != "trace":
            raise ConfigError(f"workload: {kind}:{path}: only a trace has a path; write {kind}?KEY=VALUE")
        if kind == "trace":
            found["path"] = path
    elif head in WORKLOADS:
        found = {"preset": head}
    else:
        raise ConfigError(
            f"workload: {head!r} is neither a preset ({', '.join(WORKLOADS)}) nor a kind ({', '.join(KINDS)}); "
            "a trace is written trace:PATH, a file FILE.yaml without ?..."
        )
    for part in query.split("&") if query else []:
        _set(found, part)
    return found


def _set(found: dict[str, Any], part: str) -> None:
    """Apply one KEY=VALUE."""
    key, equals, value = part.partition("=")
    names = key.split(".")
    if not equals or not all(names) or not value:
        raise ConfigError(f"workload: {part!r} is not KEY=VALUE")
    node = found
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"workload: {key}: {name} was given as a whole before")
        node = child
    if names[-1] in node:
        raise ConfigError(f"workload: {key}: given twice")
    node[names[-1]] = value
