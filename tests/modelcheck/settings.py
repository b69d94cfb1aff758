"""The configurations that are searched to the end, and by which bounds.

The full product of the design's bounds (two requests, two crashes, two losses, one duplicate, timers) is out of reach;
these are the sub-products that are exhaustive. `DEEP` takes a core for about a quarter of an hour more, and
4 GB of memory.
"""

from __future__ import annotations

from modelcheck.vocabulary import Setting

ONE_D, TWO_D = (1, 1), (1, 2)

STANDARD = (
    Setting("timers and a crash", timers=True, crashes=1),
    Setting("timers and a loss", timers=True, losses=1),
    Setting("crashes", crashes=2, cancels=1),
    Setting("losses", losses=2, cancels=1, export_failures=1),
    Setting("one of each", crashes=1, losses=1, duplicates=1),
    Setting("read: timers", one_sided=True, timers=True, crashes=1, losses=1),
    Setting("read: one of each", one_sided=True, crashes=1, losses=1, duplicates=1, cancels=1),
    Setting("two requests", targets=TWO_D),
    Setting("two requests, reuse", targets=ONE_D, cancels=1, pool_blocks=2),
    Setting("two requests, loss", targets=ONE_D, losses=1, pool_blocks=2),
    Setting("read: two requests, crash", targets=ONE_D, one_sided=True, crashes=1, pool_blocks=2),
    Setting("read: two requests, duplicate", targets=TWO_D, one_sided=True, duplicates=1),
    Setting("two attempts", targets=ONE_D, attempts=True, cancels=1, pool_blocks=2),
)
DEEP = (
    Setting("read: everything", one_sided=True, crashes=2, losses=2, duplicates=1),
    Setting("losses and a duplicate", losses=2, duplicates=1),
    Setting("timers and a duplicate", timers=True, duplicates=1),
    Setting("read: two targets, loss", targets=TWO_D, one_sided=True, losses=1),
    Setting("read: two targets, crash", targets=TWO_D, one_sided=True, crashes=1),
    Setting("read: two attempts", targets=ONE_D, one_sided=True, attempts=True, timers=True, pool_blocks=2),
    Setting("two targets, loss", targets=TWO_D, losses=1),
)
FAST = (
    Setting("no fault"),
    Setting("loss", losses=1),
    Setting("crash", crashes=1),
    Setting("duplicate", duplicates=1),
    Setting("cancel", cancels=1),
    Setting("export failure", export_failures=1),
    Setting("read: timers", one_sided=True, timers=True),
    Setting("read: two requests", targets=TWO_D, one_sided=True),
)
