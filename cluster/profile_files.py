"""Profiles by path or, for those that are shipped, by name: what `--profile` means to every command.

Knows nothing of what a profile is used for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.config import ClusterConfig
from pdserve.cluster.planner import profile as profiles
from pdserve.cluster.planner.fleets import check_comparable
from pdserve.cluster.planner.profile import Profile
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

SHIPPED = Path(__file__).parent.parent / "deploy" / "profiles"
WORKER_ID = re.compile(rf"(?:{'|'.join(Role)})-\d+")


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


@dataclass(frozen=True, slots=True)
class FleetProfiles:
    """What each role's workers cost, and what single ones do that are not like the rest of their role. `spare` is of
    roles that have no worker, for those that may be started."""

    by_role: Mapping[Role, Profile]
    by_worker: Mapping[str, Profile]
    spare: Mapping[Role, Profile]

    @property
    def by_name(self) -> dict[str, Profile]:
        """Of roles and of workers, each by its name."""
        return {**{str(role): profile for role, profile in self.by_role.items()}, **self.by_worker}

    @property
    def ever(self) -> dict[str, Profile]:
        """Also of workers that are yet to come."""
        return {**{str(role): profile for role, profile in self.spare.items()}, **self.by_name}


def read_profiles(written: Sequence[str], settings: ClusterConfig) -> dict[Role, Profile]:
    """The profile of every role that has workers; a later one replaces an earlier one.

    Raises:
        ConfigError: a file cannot be read or makes no sense, a role has no profile, two are of different models or
            have one name though they differ, or a single worker has one of its own.
    """
    found = read_fleet(written, settings)
    if found.by_worker:
        name = next(iter(found.by_worker))
        raise ConfigError(f"--profile: {name}=FILE: single workers cannot differ here; give ROLE=FILE")
    return dict(found.by_role)


def read_fleet(written: Sequence[str], settings: ClusterConfig) -> FleetProfiles:
    """The same, and single workers, as in `decode-1=FILE`, may have profiles of their own. FILE counts for every role.

    Raises:
        ConfigError: as `read_profiles`, or there is no such worker.
    """
    wanted = [role for role in Role if settings.replicas(role)]
    whole: dict[Role, Profile] = {}
    single: dict[str, Profile] = {}
    for text in written:
        name, separator, path = text.partition("=")
        if separator and name in list(Role):
            whole[Role(name)] = read_profile(path)
        elif separator and WORKER_ID.fullmatch(name):
            single[_known_worker(name, settings)] = read_profile(path)
        else:
            whole |= dict.fromkeys(Role, read_profile(text))
    missing = [str(role) for role in wanted if role not in whole]
    if missing:
        raise ConfigError(f"--profile: none for {' and '.join(missing)} workers; give FILE or {missing[0]}=FILE")
    by_role = {role: whole[role] for role in wanted}
    check_comparable([*by_role.values(), *single.values()])
    return FleetProfiles(by_role, single, {role: whole[role] for role in Role if role in whole and role not in wanted})


def worker_ids(settings: ClusterConfig) -> list[str]:
    """Of all workers, as `decode-1`."""
    return [f"{role}-{ordinal}" for role in Role for ordinal in range(settings.replicas(role))]


def _known_worker(name: str, settings: ClusterConfig) -> str:
    known = worker_ids(settings)
    if name not in known:
        raise ConfigError(f"--profile: there is no worker {name}; there are {', '.join(known)}")
    return name


def other_model(profiles: Iterable[Profile], settings: ClusterConfig) -> str:
    """What is to be said where the profiles are of another model than the configuration; empty where they are not.

    Models go by the names of their folders; `served_model_name` is for those whose folders were renamed.
    """
    profile, known = next(iter(profiles)), (settings.served_model_name, Path(settings.model).name)
    if profile.model in known:
        return ""
    return f"{profile.name} is of the model {profile.model}, the configuration of {known[0] or known[1]}"
