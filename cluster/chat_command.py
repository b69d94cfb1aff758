"""`pdserve chat`: a conversation in the terminal, or piped through it, that remembers what was said.

Ctrl-C cancels the current answer and keeps what had come; Ctrl-D leaves. With piped input every line is one turn and
the first failure ends the command. An answer is read on an event loop because only there Ctrl-C is a clean
cancellation; the loop rests while the user types. Knows the client only.
"""

from __future__ import annotations

import asyncio
import readline
import sys
from typing import Annotated

import typer

from pdserve.client import AsyncClient, GenerateOptions
from pdserve.cluster import command_options as options
from pdserve.cluster.errors_seam import error_line
from pdserve.cluster.interruptible import run_interruptible
from pdserve.cluster.state import resolve_endpoint
from pdserve.proto.errors import InvalidRequest, PdserveError

PROMPT = "> "


def chat(
    endpoint: options.Endpoint = None,
    name: options.Name = "local",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    timeout_s: options.TimeoutS = 600.0,
) -> None:
    """Talk to the model. Ctrl-C cancels an answer, Ctrl-D leaves."""
    chosen = GenerateOptions(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    target = resolve_endpoint(endpoint, name)
    interactive = sys.stdin.isatty()
    with asyncio.Runner() as runner:
        client = runner.run(_connect(target, timeout_s))
        try:
            model = run_interruptible(runner, client.model_info())
            if interactive:
                readline.set_history_length(1000)
                typer.echo(f"{model.model}; Ctrl-C cancels an answer, Ctrl-D leaves", err=True)
            Conversation(runner, client, chosen, system, interactive).run()
        finally:
            runner.run(client.close())


async def _connect(endpoint: str, timeout_s: float) -> AsyncClient:
    """The client belongs to the loop that makes it."""
    return AsyncClient(endpoint, timeout_s=timeout_s)


class Conversation:
    """Owns the history. A turn is kept when an answer to it came, whole or cancelled midway."""

    def __init__(
        self,
        runner: asyncio.Runner,
        client: AsyncClient,
        chosen: GenerateOptions,
        system: str | None,
        interactive: bool,
    ) -> None:
        self.runner = runner
        self.client = client
        self.chosen = chosen
        self.interactive = interactive
        self.history: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def run(self) -> None:
        """Turns until the input ends.

        Raises:
            PdserveError: a turn failed and nobody is there to try again.
        """
        while (text := self._read()) is not None:
            if not text.strip():
                continue
            try:
                run_interruptible(self.runner, self._turn(text))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                typer.echo("(cancelled)", err=True)
            except PdserveError as error:
                if not self.interactive:
                    raise
                typer.echo(f"error: {error_line(error)}", err=True)

    def _read(self) -> str | None:
        """The next turn, or `None` at the end of the input."""
        while True:
            try:
                return input(PROMPT if self.interactive else "")
            except EOFError:
                if self.interactive:
                    typer.echo()
                return None
            except UnicodeDecodeError as error:
                raise InvalidRequest("input", "is not UTF-8 text") from error
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                typer.echo("\n(Ctrl-D leaves)", err=True)

    async def _turn(self, text: str) -> None:
        """Ask, print the answer as it comes, remember both. A cancelled answer counts as far as it came."""
        asked = {"role": "user", "content": text}
        stream = self.client.stream([*self.history, asked], **self.chosen)
        failed = False
        try:
            async with stream:
                async for delta in stream:
                    typer.echo(delta.text, nl=False)
                    sys.stdout.flush()
        except PdserveError:
            failed = True
            raise
        finally:
            typer.echo()
            if stream.text and not failed:
                self.history += [asked, {"role": "assistant", "content": stream.text}]
