"""What one search works on: a setting, the real tables' snapshots, and what the workers' hands do.

`Hands` are the rules that live outside the two tables, in the roles and the links. Mutants take one away.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcheck.tables import Leases, Reservations
from modelcheck.vocabulary import Setting


@dataclass(frozen=True, slots=True)
class Hands:
    """`asks_before_offering`: a prefill worker asks the table once more when digests are ready. `knows_attempts`: an
    Abort or a Release names the attempt, not only the request. `checks_generation`: calls and notices name the process
    they mean. `renews_links`: a link that failed comes back under a new epoch. `remembers_ends`: a worker accepts no
    request twice, even when it is done with it. `answers_repeats`: to a request that it is done with, it says so as it
    did when it accepted it; only what was aborted is refused.
    """

    asks_before_offering: bool = True
    checks_digests: bool = True
    checks_generation: bool = True
    knows_attempts: bool = True
    renews_links: bool = True
    remembers_ends: bool = True
    answers_repeats: bool = True


class System:
    """Owner of the snapshots of one search."""

    def __init__(self, setting: Setting, hands: Hands) -> None:
        self.setting = setting
        self.hands = hands
        self.leases = Leases()
        self.reservations = Reservations()
        self.ids = tuple(setting.id(request) for request in range(setting.num_requests))
        self.requests = {id: request for request, id in enumerate(self.ids)}
