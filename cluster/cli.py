"""Where `pdserve` and `python -m pdserve.cluster.cli` begin: ready for Ctrl-C before anything slow is imported.

Knows nothing of the commands but where they are.
"""

from __future__ import annotations

from pdserve.cluster import early_interrupt

# The commands take about a second to import. Nothing of ours could catch a KeyboardInterrupt in the middle of that, so
# until a command's own seam of errors takes over there must not be one.
early_interrupt.end_at_once()

from pdserve.cluster.commands import app  # noqa: E402 - has to come after the line above


def main() -> None:
    app()


if __name__ == "__main__":
    main()
