"""Command-line options that several verbs share, named as in vLLM where one exists.

Declares; does nothing.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Endpoint: TypeAlias = Annotated[
    str | None, typer.Option("--endpoint", "-e", help="Router as host:port; default: the running cluster.")
]
Name: TypeAlias = Annotated[str, typer.Option("--name", help="Cluster name, when no endpoint is given.")]
TimeoutS: TypeAlias = Annotated[float, typer.Option("--timeout-s", min=0.001, help="Deadline of each request.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

MaxTokens: TypeAlias = Annotated[int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Temperature: TypeAlias = Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")]
TopK: TypeAlias = Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP: TypeAlias = Annotated[float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this mass.")]
MinP: TypeAlias = Annotated[float | None, typer.Option("--min-p", help="Keep tokens this likely, relative to the top.")]
RepetitionPenalty: TypeAlias = Annotated[float | None, typer.Option("--repetition-penalty")]
PresencePenalty: TypeAlias = Annotated[float | None, typer.Option("--presence-penalty")]
FrequencyPenalty: TypeAlias = Annotated[float | None, typer.Option("--frequency-penalty")]
Seed: TypeAlias = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")]
Stop: TypeAlias = Annotated[list[str] | None, typer.Option("--stop", help="Stop string; may be repeated.")]
IgnoreEos: TypeAlias = Annotated[bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence.")]
