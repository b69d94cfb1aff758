"""Many requests from JSONL, answered as JSONL in input order.

A line is `{"prompt": ...}`, `{"prompt_token_ids": [...]}` or `{"messages": [...]}` with any option of
`Client.generate` beside it. What fails for one line is that line's answer; the others go on. Memory is bounded: at
most a few lines per running request lie between the one being read and the one being printed.

Knows the client; where lines come from and go to is the caller's.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any, cast

from pdserve.client import AsyncClient, Completion, GenerateOptions
from pdserve.cluster.errors_seam import error_object
from pdserve.cluster.unique_keys import unique_keys
from pdserve.proto.errors import InvalidRequest, PdserveError

MAX_LINE_BYTES = 16 << 20
READ_AHEAD = 4
INPUT_KEYS = ("prompt", "prompt_token_ids", "messages")
END = b""


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
        InvalidRequest: not JSON, a key given twice, no input or several, or a key that is no option.
    """
    try:
        entry = json.loads(line, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("line", f"is not JSON ({error})") from error
    except ValueError as error:
        raise InvalidRequest("line", str(error)) from error
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


async def run_batch(
    client: AsyncClient, lines: IO[bytes], common: GenerateOptions, concurrency: int, write: Callable[[str], None]
) -> int:
    """Answer every line, at most `concurrency` at once; the number of lines that failed.

    Raises:
        ExceptionGroup: `write` or reading failed; every request in flight was cancelled.
    """
    gate = asyncio.Semaphore(concurrency)
    answers: asyncio.Queue[asyncio.Task[dict[str, Any]] | None] = asyncio.Queue()
    source = LineSource(lines, READ_AHEAD * concurrency)
    try:
        async with asyncio.TaskGroup() as tasks:
            printing = tasks.create_task(_print_in_order(answers, source, write))
            while (line := await source.next()) != END:
                answers.put_nowait(tasks.create_task(_answer(client, line, common, gate)))
            answers.put_nowait(None)
    finally:
        source.stop()
    return printing.result()


async def _answer(
    client: AsyncClient, line: bytes | None, common: GenerateOptions, gate: asyncio.Semaphore
) -> dict[str, Any]:
    try:
        async with gate:
            if line is None:
                raise InvalidRequest("line", f"longer than {MAX_LINE_BYTES} bytes")
            prompt, chosen = parse_line(line, common)
            return answer_object(await client.generate(prompt, **chosen))
    except PdserveError as error:
        return {"error": error_object(error)}


async def _print_in_order(
    answers: asyncio.Queue[asyncio.Task[dict[str, Any]] | None], source: LineSource, write: Callable[[str], None]
) -> int:
    num_failed = 0
    while (task := await answers.get()) is not None:
        answer = await task
        num_failed += "error" in answer
        write(json.dumps(answer))
        source.printed()
    return num_failed


class LineSource:
    """Lines read by a thread of its own: a pipe on which nothing comes must not hold up Ctrl-C.

    Owns `lines` and closes it. At most `window` lines are out at once, from `next` to `printed`. The thread is a
    daemon because a blocked read cannot be called off; it ends by itself with its next line or the end of the input.
    """

    def __init__(self, lines: IO[bytes], window: int) -> None:
        self.lines = lines
        self.loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.room = threading.Semaphore(window)
        self.stopped = False
        threading.Thread(target=self._pump, name="line-source", daemon=True).start()

    async def next(self) -> bytes | None:
        """The next line, `None` for one that was too long, `END` after the last."""
        item = await self.inbox.get()
        if isinstance(item, Exception):
            raise item
        return item

    def printed(self) -> None:
        """One line is done with; another may be read."""
        self.room.release()

    def stop(self) -> None:
        self.stopped = True
        self.room.release()

    def _pump(self) -> None:
        with self.lines, suppress(RuntimeError):  # the loop is closed: nobody waits for lines any more
            try:
                for line in _bounded_lines(self.lines):
                    self.room.acquire()
                    if self.stopped:
                        return
                    self.loop.call_soon_threadsafe(self.inbox.put_nowait, line)
            except (OSError, ValueError) as error:
                self.loop.call_soon_threadsafe(self.inbox.put_nowait, error)
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, END)


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
