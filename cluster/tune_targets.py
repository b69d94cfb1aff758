"""SLO classes as they are written on the command line, and whether a workload's requests all have one.

    --slo chat:ttft=300,tpot=40,share=0.95

Knows nothing of what targets are used for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pdserve.cluster.planner.findings import Target
from pdserve.proto.errors import ConfigError

GENERAL = "all"
"""The class of requests that no other class was given for."""

MAX_SHARE, MAX_TARGET_MS = 0.999, 1e9
FORM = "write NAME:ttft=MS,tpot=MS and, if you like, share=0.9"


def targets_of(
    written: Sequence[str], ttft_ms: float | None, tpot_ms: float | None, attainment: float
) -> tuple[Target, ...]:
    """The named classes, and the general one for requests of no other class if `ttft_ms` and `tpot_ms` are given.

    Raises:
        ConfigError: naming the option.
    """
    targets = [_parsed(text, attainment) for text in written]
    if (ttft_ms is None) != (tpot_ms is None):
        raise ConfigError("--ttft-ms and --tpot-ms: give both, or neither and --slo for every class")
    if ttft_ms is not None and tpot_ms is not None:
        targets.append(_checked(Target(GENERAL, ttft_ms, tpot_ms, attainment), "--ttft-ms, --tpot-ms"))
    if not targets:
        raise ConfigError("no targets: give --ttft-ms and --tpot-ms, or --slo for every class")
    names = [target.name for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--slo: {name} is given twice")
    return tuple(targets)


def target_of(targets: Sequence[Target], slo_class: str | None) -> int:
    """Which of the targets requests of a class are judged by: a single one judges all."""
    if len(targets) == 1:
        return 0
    names = [target.name for target in targets]
    return names.index(slo_class if slo_class in names else GENERAL)


def _parsed(text: str, attainment: float) -> Target:
    name, colon, fields = text.partition(":")
    if not colon or not name:
        raise ConfigError(f"--slo {text}: {FORM}")
    values = {"share": attainment}
    for part in fields.split(","):
        key, _, value = part.partition("=")
        if key not in ("ttft", "tpot", "share"):
            raise ConfigError(f"--slo {text}: {part!r} is not known; {FORM}")
        try:
            values[key] = float(value)
        except ValueError:
            raise ConfigError(f"--slo {text}: {key}: {value!r} is not a number") from None
    if "ttft" not in values or "tpot" not in values:
        raise ConfigError(f"--slo {text}: ttft and tpot are both needed; {FORM}")
    return _checked(Target(name, values["ttft"], values["tpot"], values["share"]), f"--slo {text}")


def _checked(target: Target, option: str) -> Target:
    for what, value in (("ttft", target.ttft_ms), ("tpot", target.tpot_ms)):
        if not 0 < value <= MAX_TARGET_MS:
            raise ConfigError(f"{option}: {what} {value:g} is not a number of milliseconds up to {MAX_TARGET_MS:g}")
    if not 0 < target.share <= MAX_SHARE:
        raise ConfigError(
            f"{option}: share {target.share:g} is not above 0 and at most {MAX_SHARE}; write 0.9 for 90 %. More than "
            "that takes more requests to see than are simulated"
        )
    return target


def check_classes(targets: Sequence[Target], found: Iterable[str | None]) -> None:
    """
    Raises:
        ConfigError: a class of the workload has no targets.
    """
    names = {target.name for target in targets}
    if len(targets) == 1 or GENERAL in names:
        return
    for name in found:
        if name not in names:
            who = "requests of no class" if name is None else f"requests of the class {name}"
            raise ConfigError(
                f"--slo: the workload has {who}, for which there is no target; add --slo or --ttft-ms and --tpot-ms"
            )
