"""The longer options of `pdserve tune`.

Declares; does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from pdserve.cluster.planner.search import EFFORTS

Profiles: TypeAlias = Annotated[
    list[str],
    typer.Option(
        help="Profile of the workers: a JSON file or a shipped one's name, one for each tensor-parallel degree; "
        "ROLE=... where roles have hardware of their own. May be repeated."
    ),
]
Workload: TypeAlias = Annotated[
    str, typer.Option(help="A preset, trace:FILE, synthetic?..., sessions?..., FILE.yaml; see docs/planner.md.")
]
PricePerGpuHour: TypeAlias = Annotated[
    float | None, typer.Option(min=0, help="Price of a GPU; default: the profile's.")
]
Slo: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="Targets of one class: NAME:ttft=MS,tpot=MS[,share=0.9]; may be repeated."),
]
Effort: TypeAlias = Annotated[str, typer.Option(help=f"How much to simulate: {', '.join(EFFORTS)}.")]
MaxRequests: TypeAlias = Annotated[
    int | None, typer.Option(min=10_000, help="Simulate at most so many requests; default: the effort's.")
]
Processes: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Processes that simulate; default: one a core.")]
WriteConfig: TypeAlias = Annotated[
    Path | None, typer.Option("--write-config", help="Write the best set-up for `pdserve up -c`.")
]
