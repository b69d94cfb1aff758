"""The command line: `pdserve up | down | status | generate | chat | bench | profile | simulate | tune | validate`.

Each verb lives in a module of its own; here they are named and put behind one seam that turns errors into one line
and an exit code: 0 done, 1 failed, 2 wrong usage, configuration or input. Never a traceback. Knows nothing of how the
process begins: that is `cli`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdserve.cluster import launch, state
from pdserve.cluster.bench_command import bench
from pdserve.cluster.chat_command import chat
from pdserve.cluster.config import DEFAULT_CONFIG, load_config
from pdserve.cluster.errors_seam import one_line_errors
from pdserve.cluster.generate_command import generate
from pdserve.cluster.interruptible import end_as_if_interrupted
from pdserve.cluster.profile_command import profile
from pdserve.cluster.simulate_command import simulate
from pdserve.cluster.status_command import status
from pdserve.cluster.tune_command import tune
from pdserve.cluster.validate_command import validate
from pdserve.proto.errors import PdserveError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_line_errors
def up(
    config: Annotated[Path, typer.Option("--config", "-c", help="Cluster configuration (YAML).")] = DEFAULT_CONFIG,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it serves; stop it with `pdserve down`.")
    ] = False,
) -> None:
    """Start a cluster; without --detach, keep it up until Ctrl-C."""
    end_as_if_interrupted()
    settings = load_config(config, override or [])
    serving = False
    try:
        with Console(stderr=True).status("starting") as spinner, launch.launched(settings, spinner.update) as launched:
            cluster, head = launched
            spinner.stop()
            typer.echo(
                cluster.endpoint if detach else f"serving {cluster.model} at {cluster.endpoint}; Ctrl-C stops it"
            )
            serving = not detach
            if serving:
                head.wait()
    except KeyboardInterrupt:
        if not serving:
            raise
        typer.echo(f"{settings.name} is down")
        return
    if serving and head.returncode:
        raise PdserveError(f"{settings.name} ended by itself; see {state.state_dir(settings.name) / 'head.log'}")


@app.command()
@one_line_errors
def down(
    name: Annotated[str, typer.Option(help="Cluster name.")] = "local",
) -> None:
    """Stop a running cluster and everything it started."""
    launch.stop(name)
    typer.echo(f"{name} is down")


app.command()(one_line_errors(status))
app.command()(one_line_errors(generate))
app.command()(one_line_errors(chat))
app.command()(one_line_errors(bench))
app.command()(one_line_errors(profile))
app.command()(one_line_errors(simulate))
app.command()(one_line_errors(tune))
app.command()(one_line_errors(validate))
