"""Does the planner find what others have published? Their step times, their traffic, our simulator.

    python bench/published.py [--json] [--traces DIR] [--effort quick|normal] [--only PART]

Parts: `splitwise` (code against conversation), `distserve` (placements, and what splitting gains), `short` (equal
splits at short prompts; two more published ratios). DIR holds the public files; by default PDSERVE_TRACES names it.
A part whose files are not there is left out. `target` is what was published; `ok` is that ours has its direction and
its rough size, as each part says. docs/planner.md has the table and explains what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import _published_distserve
import _published_short
import _published_splitwise
from _cluster import Row
from _published import EFFORTS, Effort, load_profiles

PARTS = ("splitwise", "distserve", "short")
FILES = {
    "splitwise": (_published_splitwise.FILE,),
    "distserve": _published_distserve.FILES,
    "short": (_published_short.FILE,),
}
ROW_WIDTH = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    parser.add_argument("--traces", type=Path, help="the folder of the public files")
    parser.add_argument("--effort", choices=EFFORTS, default="quick")
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    folder = arguments.traces or Path(os.environ.get("PDSERVE_TRACES", "."))
    for part in PARTS if arguments.only is None else (arguments.only,):
        missing = [name for name in FILES[part] if not (folder / name).is_file()]
        if missing:
            words = f"{part}: left out; {folder} has no {', '.join(missing)}: give --traces or set PDSERVE_TRACES"
            print(words, file=sys.stderr)
            continue
        for found in rows(part, folder, EFFORTS[arguments.effort]):
            print(json.dumps(found) if arguments.json else as_line(found), flush=True)


def rows(part: str, folder: Path, effort: Effort) -> list[Row]:
    if part == "splitwise":
        return _published_splitwise.rows(load_profiles(folder, FILES[part], "nccl"), effort)
    profiles = load_profiles(folder, FILES[part], "cuda_ipc")
    return (
        _published_distserve.rows(profiles, effort) if part == "distserve" else _published_short.rows(profiles, effort)
    )


def as_line(found: Row) -> str:
    verdict = {True: "ok", False: "NOT OK", None: ""}[found["ok"] if isinstance(found["ok"], bool) else None]
    target = "" if found["target"] is None else f"published {found['target']}"
    return (
        f"{found['name']:>{ROW_WIDTH}} {found['value']:>7} {found['unit']:<8} {target:<16} {verdict:<6} {found['note']}"
    )


if __name__ == "__main__":
    main()
