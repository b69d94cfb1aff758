"""`pdserve generate`: one prompt to the terminal as it is made, or a file of prompts to JSONL in input order.

A line of the file is `{"prompt": ...}`, `{"prompt_token_ids": [...]}` or `{"messages": [...]}` with any option of
`Client.generate` beside it. What fails for one line is that line's answer; the others go on. Memory is
bounded: at most a few lines per running request are read ahead of the printed answers.
"""

from __future__ import annotations

import asyncio
import io
import json
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any, cast

import typer

from pdserve.client import AsyncClient, Client, Completion, GenerateOptions
from pdserve.cluster import command_options as options
from pdserve.cluster.errors_seam import error_object
from pdserve.cluster.state import resolve_endpoint
from pdserve.proto.errors import ConfigError, InvalidRequest, PdserveError

MAX_LINE_BYTES = 16 << 20
READ_AHEAD = 4
END = b""
INPUT_KEYS = ("prompt", "prompt_token_ids", "messages")


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
    if prompt is not None:
        asyncio.run(_single(target, timeout_s, prompt, common, as_json))
    elif prompts is not None:
        with _opened(prompts) as lines, Client(target, timeout_s=timeout_s) as client:
            num_failed = _Batch(client, common, concurrency).run(lines)
        raise typer.Exit(1 if num_failed else 0)


def answer_object(completion: Completion) -> dict[str, Any]:
    """A completion for machines, with stable keys."""
    found: dict[str, Any] = {
        "request_id": completion.request_id,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason.value,
        "stop_match": completion.stop_match,
        "usage": asdict(completion.usage),
        "timings": asdict(completion.timings),
        "prefill_worker": completion.prefill_worker,
        "decode_worker": completion.decode_worker,
    }
    if completion.logprobs is not None:
        found["logprobs"] = [asdict(token) for token in completion.logprobs]
    return found


def parse_line(line: bytes, common: GenerateOptions) -> tuple[Any, GenerateOptions]:
    """The prompt and the options of one line; the line's own options win over the common ones.

    Raises:
        InvalidRequest: not JSON, no input or several, or a key that is no option.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", f"is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise InvalidRequest("line", "is not a JSON object")
    given = [key for key in INPUT_KEYS if key in entry]
    if len(given) != 1:
        raise InvalidRequest("line", f"needs exactly one of {', '.join(INPUT_KEYS)}")
    prompt = entry.pop(given[0])
    if not isinstance(prompt, str if given[0] == "prompt" else list):
        raise InvalidRequest(given[0], f"has the wrong type ({type(prompt).__name__})")
    unknown = sorted(entry.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise InvalidRequest(unknown[0], "unknown key")
    if isinstance(entry.get("logit_bias"), dict):
        entry["logit_bias"] = _integer_keys(entry["logit_bias"])
    return prompt, cast("GenerateOptions", {**common, **entry})


def _integer_keys(bias: dict[str, float]) -> dict[int, float]:
    """JSON has only text keys."""
    try:
        return {int(key): value for key, value in bias.items()}
    except ValueError as error:
        raise InvalidRequest("logit_bias", str(error)) from error


async def _single(endpoint: str, timeout_s: float, prompt: str, common: GenerateOptions, as_json: bool) -> None:
    async with AsyncClient(endpoint, timeout_s=timeout_s) as client, client.stream(prompt, **common) as stream:
        if as_json:
            typer.echo(json.dumps(answer_object(await stream.result())))
            return
        async for delta in stream:
            typer.echo(delta.text, nl=False)
            sys.stdout.flush()
    typer.echo()


class _Batch:
    """A file of requests. This thread reads, a pool asks, one thread prints the answers in input order.

    Ctrl-C raises only while this thread reads: anywhere else it could break a lock that the other threads need. There
    it closes the client, which ends every request, and the main thread finds the mark at its next step.
    """

    def __init__(self, client: Client, common: GenerateOptions, concurrency: int) -> None:
        self.client = client
        self.common = common
        self.concurrency = concurrency
        self.pending: queue.Queue[Future[dict[str, Any]] | None] = queue.Queue(READ_AHEAD * concurrency)
        self.broken: BaseException | None = None
        self.reading = False
        self.num_failed = 0

    def run(self, lines: IO[bytes]) -> int:
        """Answer every line; the number of lines that failed."""
        printer = threading.Thread(target=self._print_in_order, name="printer")
        usual = signal.signal(signal.SIGINT, self._on_interrupt)
        try:
            with ThreadPoolExecutor(self.concurrency, thread_name_prefix="generate") as pool:
                printer.start()
                try:
                    self._submit_all(lines, pool)
                finally:
                    self.pending.put(None)
                    printer.join()
        finally:
            signal.signal(signal.SIGINT, usual)
        if self.broken is not None:
            raise self.broken
        return self.num_failed

    def _submit_all(self, lines: IO[bytes], pool: ThreadPoolExecutor) -> None:
        source = _bounded_lines(lines)
        while self.broken is None:
            try:
                self.reading = True
                line = next(source, END)
            except KeyboardInterrupt:
                return
            finally:
                self.reading = False
            if line is END:
                return
            self.pending.put(pool.submit(self._answer, line))

    def _on_interrupt(self, number: int, frame: object) -> None:
        self.broken = KeyboardInterrupt()
        self.client.close()
        if self.reading:
            raise self.broken

    def _answer(self, line: bytes | None) -> dict[str, Any]:
        try:
            if line is None:
                raise InvalidRequest("line", f"longer than {MAX_LINE_BYTES} bytes")
            prompt, chosen = parse_line(line, self.common)
            return answer_object(self.client.generate(prompt, **chosen))
        except PdserveError as error:
            return {"error": error_object(error)}

    def _print_in_order(self) -> None:
        """Print until the end mark. After a failure only take, so that the reader never blocks on a full queue."""
        while (future := self.pending.get()) is not None:
            if self.broken is not None:
                future.cancel()
                continue
            try:
                answer = future.result()
                if self.broken is not None:
                    continue
                self.num_failed += "error" in answer
                typer.echo(json.dumps(answer))
            except Exception as error:
                self.broken = self.broken or error


def _bounded_lines(lines: IO[bytes]) -> Iterator[bytes | None]:
    """Lines that are not blank; `None` stands for one that is too long, which is read past."""
    first = True
    while line := lines.readline(MAX_LINE_BYTES + 1):
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf"), False
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = lines.readline(MAX_LINE_BYTES)
            yield None
        elif line.strip():
            yield line


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield cast("io.BytesIO", sys.stdin.buffer)
        return
    path = Path(source)
    if not path.exists() or path.is_dir():
        raise ConfigError(f"--prompts {source}: {'is a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        yield file
