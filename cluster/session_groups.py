"""Whether this machine's kernel may starve a client beside busy workers.

Linux can share its cores between sessions (`kernel.sched_autogroup_enabled`). A client in a session of its own then
waited for up to 1.3 s for a core beside two workers that filled both (Linux 6.18), though it hardly computes: its
requests leave late, and its first tokens look late. Without that, 3 ms. Knows of the switch only, and leaves it alone.
"""

from __future__ import annotations

from pathlib import Path

import typer

SWITCH = Path("/proc/sys/kernel/sched_autogroup_enabled")


def warning(switch: Path = SWITCH) -> str | None:
    """In words; `None` where it cannot happen."""
    try:
        if switch.read_text(encoding="ascii").strip() != "1":
            return None
    except OSError:
        return None
    return (
        "kernel.sched_autogroup_enabled is 1: Linux shares cores between sessions, and beside workers that fill them a "
        "client may wait for one for more than a second; set it to 0 while you measure (docs/planner.md)"
    )


def warn_of_starved_clients() -> None:
    """One line for whoever is about to measure."""
    found = warning()
    if found is not None:
        typer.echo(f"warning: {found}", err=True)
