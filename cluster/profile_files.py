"""Profiles by path or, for those that are shipped, by name: what `--profile` means to every command.

Knows nothing of what a profile is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner import profile as profiles
from pdserve.cluster.planner.profile import Profile
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

SHIPPED = Path(__file__).parent.parent / "deploy" / "profiles"


def shipped_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.json")))


def read_profile(written: str) -> Profile:
    """The profile of a file or, where there is no such file, the shipped one of that name.

    Raises:
        ConfigError: there is neither, or it makes no sense.
    """
    path = Path(written)
    if not path.exists() and written in shipped_names():
        path = SHIPPED / f"{written}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        hint = f"; shipped: {', '.join(shipped_names())}" if not path.suffix else ""
        raise ConfigError(f"--profile: {path}: cannot be read: {why}{hint}") from error
    return profiles.load(text, str(path))


def read_profiles(written: Sequence[str], settings: ClusterConfig) -> dict[Role, Profile]:
    """The profile of every role that has workers; a later one replaces an earlier one.

    Raises:
        ConfigError: a file cannot be read or makes no sense, or a role has no profile.
    """
    wanted = [role for role in Role if settings.replicas(role)]
    found: dict[Role, Profile] = {}
    for text in written:
        name, separator, path = text.partition("=")
        if separator and name in list(Role):
            found[Role(name)] = read_profile(path)
        else:
            found |= dict.fromkeys(wanted, read_profile(text))
    missing = [str(role) for role in wanted if role not in found]
    if missing:
        raise ConfigError(f"--profile: none for {' and '.join(missing)} workers; give FILE or {missing[0]}=FILE")
    return {role: found[role] for role in wanted}
