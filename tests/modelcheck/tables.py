"""Snapshots of the real tables: a number stands for the contents of one, a call makes the next.

Each distinct call of a real method on a real table happens once and is remembered, so that a search of millions of
steps costs thousands of calls. Real clocks are replaced by a coarse one: everything happens at time 0, a timer fires by
being set to 0 or by a look at time 1, and what a call has postponed is set back afterwards. So every timer runs on its
own, and the number of snapshots stays finite.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from modelcheck.vocabulary import LAYOUT

from pdserve.kv_transfer.lease import Lease, LeaseTimes
from pdserve.kv_transfer.leases import LeaseTable
from pdserve.kv_transfer.reservation import Reservation, Timeouts
from pdserve.kv_transfer.reservations import ReservationTable
from pdserve.proto.errors import PdserveError
from pdserve.proto.types import HandoffId

TIMES = LeaseTimes(lease_s=10.0, retry_s=1.0)
TIMEOUTS = Timeouts(reserve_s=10.0, room_s=10.0, part_s=10.0, transfer_s=10.0, renew_s=5.0, max_pulls=2)
DEADLINE_S = 100.0

T = TypeVar("T", bound=Hashable)
Effects = tuple[Any, ...]


class Numbered(Generic[T]):
    """Values by number, equal ones by the same."""

    def __init__(self) -> None:
        self._values: list[T] = []
        self._numbers: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, number: int) -> T:
        return self._values[number]

    def number(self, value: T) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number


class Nowhere(Mapping[str, str]):
    """An empty mapping that can be hashed: a ticket's link addresses."""

    def __getitem__(self, key: str) -> str:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nowhere)


NOWHERE = Nowhere()


class Leases:
    """Snapshots of `LeaseTable`. Number 0 is the empty one."""

    def __init__(self) -> None:
        self._snapshots: Numbered[tuple[Lease, ...]] = Numbered()
        self._done: dict[Hashable, tuple[int, Effects, str]] = {}
        assert self._snapshots.number(()) == 0

    def __getitem__(self, number: int) -> tuple[Lease, ...]:
        return self._snapshots[number]

    def find(self, number: int, id: HandoffId) -> Lease | None:
        return next((lease for lease in self._snapshots[number] if lease.id == id), None)

    def table(self, number: int) -> LeaseTable:
        table = LeaseTable(TIMES)
        table._leases.update((lease.id, lease) for lease in self._snapshots[number])
        return table

    def call(self, number: int, method: str, *arguments: Hashable, **options: Hashable) -> tuple[int, Effects, str]:
        """The snapshot afterwards, the effects, and the kind of error that was raised, or ""."""
        key = (number, method, arguments, tuple(options.items()))
        if key not in self._done:
            table = self.table(number)
            effects, error = _call(getattr(table, method), *arguments, **{"now_s": 0.0, **options})
            self._done[key] = (self._number(table), effects, error)
        return self._done[key]

    def expire(self, number: int, id: HandoffId) -> int:
        """Time passes: this lease has expired and nobody has looked yet."""
        leases = (lease._replace(expires_s=0.0) if lease.id == id else lease for lease in self._snapshots[number])
        return self._snapshots.number(tuple(leases))

    def _number(self, table: LeaseTable) -> int:
        leases = table.leases.values()
        return self._snapshots.number(tuple(lease._replace(offer_at_s=_retry_s(lease)) for lease in leases))


def _retry_s(lease: Lease) -> float:
    """Still to come, or over."""
    return lease.offer_at_s if not lease.is_offering else 0.0


class Reservations:
    """Snapshots of `ReservationTable`, with its memory of what was admitted. Number 0 is the empty one."""

    def __init__(self) -> None:
        self._snapshots: Numbered[tuple[tuple[Reservation, ...], tuple[Any, ...]]] = Numbered()
        self._done: dict[Hashable, tuple[int, Effects, str]] = {}
        assert self._snapshots.number(((), ())) == 0

    def __getitem__(self, number: int) -> tuple[Reservation, ...]:
        return self._snapshots[number][0]

    def find(self, number: int, id: HandoffId) -> Reservation | None:
        return next((entry for entry in self[number] if entry.id == id), None)

    def table(self, number: int) -> ReservationTable:
        table = ReservationTable(LAYOUT, TIMEOUTS)
        entries, admitted = self._snapshots[number]
        table._reservations.update((entry.id, entry) for entry in entries)
        table._admitted.update(admitted)
        return table

    def call(self, number: int, method: str, *arguments: Hashable, **options: Hashable) -> tuple[int, Effects, str]:
        """The snapshot afterwards, the effects, and the kind of error that was raised, or ""."""
        key = (number, method, arguments, tuple(options.items()))
        if key not in self._done:
            table = self.table(number)
            effects, error = _call(getattr(table, method), *arguments, **{"now_s": 0.0, **options})
            self._done[key] = (self._number(table), effects, error)
        return self._done[key]

    def expire(self, number: int, id: HandoffId) -> int:
        """Time passes: this phase has missed its deadline and nobody has looked yet."""
        entries, admitted = self._snapshots[number]
        late = tuple(entry._replace(deadline_s=0.0) if entry.id == id else entry for entry in entries)
        return self._snapshots.number((late, admitted))

    def _number(self, table: ReservationTable) -> int:
        return self._snapshots.number((tuple(table.reservations.values()), tuple(table._admitted.items())))


def _call(method: Callable[..., Effects], *arguments: Hashable, **options: Hashable) -> tuple[Effects, str]:
    try:
        return tuple(method(*arguments, **options)), ""
    except PdserveError as error:
        return (), type(error).__name__
