"""What moving KV costs: each link and the digests against the limits of this machine, measured in the same run.

    python bench/transfer.py [--json] [--turns N]

Blocks are those of a model of 60 million parameters, scattered in both pools; the other end of a link is another
process. Rows: see `rows`. How they are measured: `_links.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
from _cluster import Row, row
from _handoff import handoff_rows
from _links import BLOCK_BYTES, NUM_BYTES, Measured, measure_digest, measure_gloo, measure_shm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--turns", type=int, default=31, help="comparisons of which the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for found in rows(arguments.turns):
        text = f"{found['name']:>22} {found['value']:>10} {found['unit']:<9} {found['note']}"
        print(json.dumps(found) if arguments.json else text, flush=True)


def rows(turns: int) -> Iterator[Row]:
    """Measure everything; one row each."""
    sizes = f"{NUM_BYTES >> 20} MiB in blocks of {BLOCK_BYTES >> 10} KiB"
    yield ratio_row("digest_ratio", measure_digest(turns), 0.6, f"XXH3 over a one-thread read; {sizes}")
    copied, verified = measure_shm(turns)
    yield ratio_row("shm_ratio", copied, 0.8, f"ShmSink.receive without digests over one memcpy; {sizes}")
    yield ratio_row("shm_verified_ratio", verified, None, "the same with digests")
    received, verified = measure_gloo(turns)
    yield ratio_row("gloo_ratio", received, 0.85, "GlooSink.receive without digests over raw recv of 16 MiB messages")
    yield ratio_row("gloo_verified_ratio", verified, None, "the same with digests")
    yield from handoff_rows()


def ratio_row(name: str, found: Measured, target: float | None, note: str) -> Row:
    ok = None if target is None else found.ratio >= target
    return row(name, found.ratio, "ratio", target, ok, f"{note}; the limit is {found.limit_gbps:.1f} GB/s")


if __name__ == "__main__":
    main()
