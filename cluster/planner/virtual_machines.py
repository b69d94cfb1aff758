"""The machines under simulated workers: which profile each has, on which host it stands, and what joins two of them.

A worker's name is its machine's: it stays the same one whatever role the worker has and however often it starts anew.
Which profile a machine has is by its name, else by the role that it was made for: `{"decode-1": slow, "decode": fast}`.
Two machines use the first kind of link that the configuration prefers and both profiles have; `HOST_LINKS` only within
one host. Knows nothing of what workers do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pdserve.cluster.planner.profile import LinkCost, Profile
from pdserve.cluster.planner.steering import Action, Flip, Start
from pdserve.proto.errors import ConfigError
from pdserve.proto.types import Role

HOST_LINKS = frozenset({"loopback", "shm", "cuda_ipc"})

Profiles = Mapping[str, Profile] | Mapping[Role, Profile]


class Machine(NamedTuple):
    host: int
    profile: Profile


class Post(NamedTuple):
    """A machine in a role that it has or will have; `why` it will, as an option says it, or nothing."""

    machine: Machine
    role: Role
    why: str = ""


class VirtualMachines:
    """Owner of all that there ever were, of those whose workers are gone, too. `kinds`: links, the best first."""

    def __init__(self, profiles: Profiles, kinds: Sequence[str], workers_per_host: int | None) -> None:
        self._profiles = {str(name): profile for name, profile in profiles.items()}
        self._kinds = kinds
        self._workers_per_host = workers_per_host
        self._machines: dict[str, Machine] = {}
        self._costs: dict[tuple[str, str], LinkCost] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._machines

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def place(self, name: str, role: Role) -> None:
        """One more, beside the last one if there is room on its host."""
        assert name not in self._machines, "a name is one machine"
        self._machines[name] = self._next(name, role, self._machines)

    def place_another(self, role: Role) -> str:
        """One more, under the first name that nobody ever had."""
        name = _free_name(role, self._machines)
        self.place(name, role)
        return name

    def _next(self, name: str, role: Role, before: Mapping[str, Machine]) -> Machine:
        profile = self._profiles.get(name) or self._profiles.get(str(role))
        if profile is None:
            raise ConfigError(f"--profile: there is none for {role} workers; give FILE or {role}=FILE")
        return Machine(len(before) // (self._workers_per_host or len(before) + 1), profile)

    def link(self, source_id: str, target_id: str) -> LinkCost:
        """Of the slower side. Raises ConfigError: there is none."""
        cost = self._costs.get((source_id, target_id))
        if cost is None:
            cost = self._cost(self._machines[source_id], self._machines[target_id])
            self._costs[source_id, target_id] = cost
        return cost

    def _cost(self, source: Machine, target: Machine) -> LinkCost:
        ways = source.profile.links, target.profile.links
        is_near = source.host == target.host
        kinds = (kind for kind in self._kinds if is_near or kind not in HOST_LINKS)
        kind = next((kind for kind in kinds if all(kind in way for way in ways)), None)
        if kind is None:
            where = "both profiles" if is_near else "both profiles for workers on different hosts"
            raise ConfigError(f"kv_transfer.links: none of {tuple(self._kinds)} is in {where}")
        return LinkCost(
            latency_s=max(way[kind].latency_s for way in ways),
            bandwidth_bytes_per_s=min(way[kind].bandwidth_bytes_per_s for way in ways),
        )

    def foreseen(self, actions: Iterable[Action]) -> Iterator[Post]:
        """What these actions, in order of time, will make of machines. Raises ConfigError: one has no profile."""
        machines = dict(self._machines)
        for action in actions:
            if isinstance(action, Flip) and action.worker_id in machines:
                yield Post(machines[action.worker_id], action.role, f"--flip {action.worker_id}={action.role}: ")
            elif isinstance(action, Start):
                name = _free_name(action.role, machines)
                machines[name] = self._next(name, action.role, machines)
                yield Post(machines[name], action.role, f"starting {name}: ")

    def check_links(self, posts: Iterable[Post]) -> None:
        """Of one pair of each two hosts and profiles: what cannot work is said before anything runs.

        Raises:
            ConfigError: a prefill worker could not hand off to a decode worker.
        """
        sides: dict[Role, dict[tuple[int, int], Post]] = defaultdict(dict)
        for post in posts:
            sides[post.role].setdefault((post.machine.host, id(post.machine.profile)), post)
        for source in sides[Role.PREFILL].values():
            for target in sides[Role.DECODE].values():
                try:
                    self._cost(source.machine, target.machine)
                except ConfigError as error:
                    raise ConfigError(f"{source.why or target.why}{error.message}") from error


def _free_name(role: Role, taken: Mapping[str, Machine]) -> str:
    ordinal = 0
    while (name := f"{role}-{ordinal}") in taken:
        ordinal += 1
    return name
