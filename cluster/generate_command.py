"""`pdserve generate`: one prompt to the terminal as it is made, or a file of prompts to JSONL in input order.

Options and output; the file's format and order are `prompt_batch`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import IO, Annotated

import typer

from pdserve.client import AsyncClient, GenerateOptions
from pdserve.cluster import command_options as options
from pdserve.cluster.interruptible import run_interruptible
from pdserve.cluster.prompt_batch import answer_object, run_batch
from pdserve.cluster.state import resolve_endpoint
from pdserve.proto.errors import ConfigError


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to complete.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="JSONL file of requests, or - for standard input.")
    ] = None,
    endpoint: options.Endpoint = None,
    name: options.Name = "local",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests of a file in flight at once.")] = 16,
    timeout_s: options.TimeoutS = 600.0,
    as_json: options.Json = False,
) -> None:
    """Complete one prompt, or a file of them.

    With --prompts, exit status 1 when any line failed.
    """
    if (prompt is None) == (prompts is None):
        raise ConfigError("give either a prompt or --prompts FILE")
    common = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or None,
        ignore_eos=ignore_eos or None,
    )
    target = resolve_endpoint(endpoint, name)
    with asyncio.Runner() as runner:
        if prompt is not None:
            run_interruptible(runner, _single(target, timeout_s, prompt, common, as_json))
        elif prompts is not None:
            num_failed = run_interruptible(runner, _batch(target, timeout_s, prompts, common, concurrency))
            raise typer.Exit(1 if num_failed else 0)


async def _single(endpoint: str, timeout_s: float, prompt: str, common: GenerateOptions, as_json: bool) -> None:
    async with AsyncClient(endpoint, timeout_s=timeout_s) as client, client.stream(prompt, **common) as stream:
        if as_json:
            typer.echo(json.dumps(answer_object(await stream.result())))
            return
        async for delta in stream:
            typer.echo(delta.text, nl=False)
            sys.stdout.flush()
    typer.echo()


async def _batch(endpoint: str, timeout_s: float, source: str, common: GenerateOptions, concurrency: int) -> int:
    lines = _opened(source)
    async with AsyncClient(endpoint, timeout_s=timeout_s) as client:
        return await run_batch(client, lines, common, concurrency, typer.echo)


def _opened(source: str) -> IO[bytes]:
    """The file, or standard input by its descriptor: `sys.stdin` must not be busy in a thread as Python exits."""
    try:
        if source == "-":
            return open(0, "rb", closefd=False)
        return Path(source).open("rb")
    except OSError as error:
        raise ConfigError(f"--prompts {source}: {error.strerror}") from error
