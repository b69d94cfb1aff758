"""`pdserve profile`: what a worker costs, measured here, told by a running cluster, or converted from a public file.

Checks what was asked for, and shows and writes what came of it; measuring is `profiling_clusters`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pdserve.cluster import launch, profiling_clusters, state
from pdserve.cluster import profiling_profile as finding
from pdserve.cluster.config import DEFAULT_CONFIG, ClusterConfig, load_config
from pdserve.cluster.interruptible import end_as_if_interrupted
from pdserve.cluster.planner import profile as profiles
from pdserve.cluster.planner.profile import MAX_PROFILE_CHARS, LinkCost, Overheads
from pdserve.cluster.planner.public_facts import Conversion
from pdserve.cluster.planner.public_profiles import convert as convert_public
from pdserve.cluster.profile_files import read_profile
from pdserve.cluster.profile_options import check_asked, destination, model_name, require_destination
from pdserve.cluster.profiling_clusters import MeasuredPair, MeasuredSteps, Say
from pdserve.cluster.profiling_links import fit_handoffs, thin_links
from pdserve.cluster.profiling_prices import PowerDecodeW, PowerIdleW, PowerPrefillW, PricePerGpuHour, Prices
from pdserve.cluster.profiling_profile import Finding, Identity, Surroundings
from pdserve.cluster.profiling_run import LoneCost, watch_steps
from pdserve.cluster.session_groups import warn_of_starved_clients
from pdserve.cluster.whole_files import write_whole
from pdserve.proto.errors import ConfigError, StartupError
from pdserve.proto.types import KVLayout, Role

DEFAULT_BUDGET_S = 120.0
ASSUMED_FLIP_S = 0.1
"""No worker changes its role yet; the order of a few control calls, as nothing has to be loaded."""

MAX_PUBLIC_BYTES = 64 << 20


def profile(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Cluster configuration (YAML).", show_default=str(DEFAULT_CONFIG)),
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: NAME.json.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: the model's.")] = None,
    budget_s: Annotated[
        float | None, typer.Option(help="Seconds to measure for, or to watch.", show_default=f"{DEFAULT_BUDGET_S:g}")
    ] = None,
    flip_s: Annotated[
        float | None, typer.Option(help="Seconds of a role change, assumed; default: --base's, else 0.1.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="What the workers run on; default: this processor.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the prompts.", show_default="0")] = None,
    from_cluster: Annotated[
        str | None, typer.Option(help="Fit to the steps that this running cluster takes meanwhile.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Profile for what steps do not tell, with --from-cluster: links, overheads, costs."),
    ] = None,
    convert: Annotated[Path | None, typer.Option(help="Public file of step times to take the profile from.")] = None,
    price_per_gpu_hour: PricePerGpuHour = None,
    power_idle_w: PowerIdleW = None,
    power_prefill_w: PowerPrefillW = None,
    power_decode_w: PowerDecodeW = None,
) -> None:
    """Measure what a worker costs and write it as one JSON file for `simulate`, `tune` and `validate`.

    Starts clusters of its own on this machine; keep it otherwise idle meanwhile.
    """
    end_as_if_interrupted()
    prices = Prices(price_per_gpu_hour, power_idle_w, power_prefill_w, power_decode_w)
    asked = _Asked(name or None, hardware, budget_s or DEFAULT_BUDGET_S, flip_s, seed or 0, output)
    ours = {"--config": config, "--set": override, "--seed": seed, "--budget-s": budget_s, "--flip-s": flip_s}
    check_asked(ours | {"--hardware": hardware, "--from-cluster": from_cluster, "--base": base, "--convert": convert})
    require_destination(output, asked.name)
    if convert is not None:
        found = _converted(convert, asked.name)
    elif from_cluster is not None:
        found = _watched(from_cluster, base, asked)
    else:
        settings = load_config(config or DEFAULT_CONFIG, override or [])
        launch.check_model_dir(Path(settings.model))
        require_destination(output, asked.name or model_name(settings.model))
        warn_of_starved_clients()
        with Console(stderr=True).status("starting") as spinner:
            found = _measured(settings, asked, spinner.update)
    _write(found, prices, output)


@dataclass(frozen=True, slots=True)
class _Asked:
    """`None` where nothing was."""

    name: str | None
    hardware: str | None
    budget_s: float
    flip_s: float | None
    seed: int
    output: Path | None


def _measured(settings: ClusterConfig, asked: _Asked, say: Say) -> Finding:
    steps = profiling_clusters.measure_steps(settings, asked.budget_s, asked.seed, say)
    pairs, missing = _measure_links(settings, steps, asked, say)
    costs = {kind: fit_handoffs(pair.handoffs) for kind, pair in pairs.items()}
    overheads = Overheads(
        tokenize_s_per_token=steps.tokenize_s_per_token,
        request_s=steps.lone.request_s,
        token_s=steps.log.token_s(steps.lone),
    )
    flip_s = ASSUMED_FLIP_S if asked.flip_s is None else asked.flip_s
    around = finding.surroundings_of(costs, overheads, steps.startup_s, flip_s)
    timings = (*steps.log.timings, *(timing for pair in pairs.values() for timing in pair.log.timings))
    used = [role for role in Role if settings.replicas(role)]
    num_gpus = max(settings.pool(role).num_gpus for role in used)
    where = asked.hardware or f"{processor()}, {_cores(settings)} a worker"
    identity = _identity(asked.name, model_name(settings.model), where, steps.layout, num_gpus, steps)
    origin = (
        f"pdserve profile: {len(timings)} steps of {sum(map(settings.replicas, used))} mixed workers and of a pair, "
        f"{steps.log.num_rounds} whole rounds in {asked.budget_s:g} s; links from hand-offs of pairs. "
        + "; ".join(_lone_words(kind, lone) for kind, lone in _lones(steps, pairs).items())
        + f". {_assumed_words(flip_s)}"
    )
    found = finding.profile_of(identity, timings, around, origin)
    if not steps.log.num_rounds:
        missing.append("the budget ended before one round over the grid; raise --budget-s")
    return Finding(found.profile, found.fit, found.notes, (*found.warnings, *thin_links(costs), *missing))


def _assumed_words(flip_s: float) -> str:
    return f"Assumed, not measured: a role change in {flip_s:g} s."


def _lones(steps: MeasuredSteps, pairs: dict[str, MeasuredPair]) -> dict[str, LoneCost]:
    return {"mixed": steps.lone} | {f"{kind} pair": pair.lone for kind, pair in pairs.items()}


def _lone_words(where: str, lone: LoneCost) -> str:
    return f"{where}, a lone request: {lone.request_s * 1e3:.1f} ms to its step, {lone.token_s * 1e3:.1f} ms from it"


def _measure_links(
    settings: ClusterConfig, steps: MeasuredSteps, asked: _Asked, say: Say
) -> tuple[dict[str, MeasuredPair], list[str]]:
    """By kind, in the configuration's order; and a line for each that does not run here."""
    pairs: dict[str, MeasuredPair] = {}
    missing: list[str] = []
    kinds = settings.kv_transfer.links
    for kind in kinds:
        budgets = profiling_clusters.pair_budgets(asked.budget_s, len(kinds), is_first=not pairs)
        try:
            pairs[kind] = profiling_clusters.measure_pair(settings, kind, steps.limits, budgets, asked.seed, say)
        except StartupError as error:
            missing.append(f"{kind} links are not in the profile: {error.message}")
    return pairs, missing


def _identity(
    name: str | None, model: str, hardware: str, layout: KVLayout, num_gpus: float, steps: MeasuredSteps
) -> Identity:
    return Identity(
        name=name or model,
        model=model,
        hardware=hardware,
        num_gpus=num_gpus,
        kv_bytes_per_token=max(1, layout.block_bytes // layout.block_size),
        kv_capacity_tokens=steps.limits.kv_capacity_tokens,
        max_model_len=steps.limits.max_model_len,
    )


def _watched(cluster: str, base: str | None, asked: _Asked) -> Finding:
    """Fitted to the steps of whatever load a running cluster has."""
    running = state.require(cluster)
    model = model_name(running.model)
    require_destination(asked.output, asked.name or model)
    like = None if base is None else read_profile(base)
    with Console(stderr=True).status(f"watching {cluster} for {asked.budget_s:g} s"):
        infos, timings = asyncio.run(watch_steps(running, asked.budget_s))
    info = infos[0]
    links: dict[str, LinkCost] = {} if like is None else like.links
    flip_s = asked.flip_s if like is None or asked.flip_s is not None else like.flip_s
    around = Surroundings(
        links=links,
        overheads=Overheads() if like is None else like.overheads,
        startup_s=0.0 if like is None else like.startup_s,
        flip_s=ASSUMED_FLIP_S if flip_s is None else flip_s,
        contention=None if like is None else like.contention,
    )
    rest = "not known, and left at 0" if like is None else f"those of {like.name}"
    identity = Identity(
        name=asked.name or model,
        model=model,
        hardware=asked.hardware or processor(),
        num_gpus=0.0 if like is None else like.num_gpus,
        kv_bytes_per_token=max(1, info.layout.block_bytes // info.layout.block_size),
        kv_capacity_tokens=info.num_blocks * info.layout.block_size,
        max_model_len=info.max_model_len,
    )
    origin = f"pdserve profile --from-cluster: {len(timings)} steps under its own load; links, overheads: {rest}."
    if like is None or asked.flip_s is not None:
        origin += f" {_assumed_words(around.flip_s)}"
    found = finding.profile_of(identity, timings, around, origin)
    if like is not None:
        costs = {"power": like.power, "price_per_gpu_hour": like.price_per_gpu_hour}
        return dataclasses.replace(found, profile=found.profile.model_copy(update=costs))
    missing = "links and overheads are not known: a split cannot be simulated; give --base"
    return dataclasses.replace(found, warnings=(*found.warnings, missing))


def _converted(path: Path, name: str | None) -> Finding:
    known = convert_public(_read_public(path), path.name.removesuffix(".gz"))
    chosen = choose_conversion(known, name, path.name)
    return Finding(chosen.profile, profiles.describe_fit(chosen.profile), chosen.notes, ())


def choose_conversion(known: tuple[Conversion, ...], name: str | None, file: str) -> Conversion:
    """The one of that name, or the only one.

    Raises:
        ConfigError: listing the names.
    """
    fitting = [one for one in known if name in (None, one.profile.name)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(one.profile.name for one in known)
    what = "holds several profiles" if name is None else f"holds no profile {name!r}"
    raise ConfigError(f"--convert: {file} {what}; give --name, one of: {names}")


def _read_public(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            data = handle.read(MAX_PUBLIC_BYTES + 1)
        if len(data) > MAX_PUBLIC_BYTES:
            raise ConfigError(f"--convert: {path}: more than {MAX_PUBLIC_BYTES} bytes")
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--convert: {path}: cannot be read: {why}") from error


def _write(found: Finding, prices: Prices, output: Path | None) -> None:
    text = profiles.dump(prices.filled_in(found.profile))
    assert len(text) <= MAX_PROFILE_CHARS
    option, path = destination(output, found.profile.name)
    write_whole(option, path, text)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for line in (*found.fit, *found.notes, *overhead_lines(found)):
        console.print(line, highlight=False, markup=False)
    for line in found.warnings:
        typer.echo(f"warning: {line}", err=True)
    typer.echo(f"wrote {path}")


def overhead_lines(found: Finding) -> tuple[str, ...]:
    """Links and overheads in words."""
    profile, around = found.profile, found.profile.overheads
    lines = [
        f"{kind}: {cost.latency_s * 1e3:.2f} ms and {cost.bandwidth_bytes_per_s / 1e9:.2f} GB/s"
        for kind, cost in profile.links.items()
    ]
    lines.append(
        f"request {around.request_s * 1e3:.2f} ms, token {around.token_s * 1e3:.2f} ms, hand-off "
        f"{around.handoff_s * 1e3:.2f} ms, tokenising {around.tokenize_s_per_token * 1e6:.2f} us a token; "
        f"start {profile.startup_s:.1f} s, role change {profile.flip_s:g} s"
    )
    return tuple(lines)


def processor() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "an unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "an unknown processor")


def _cores(settings: ClusterConfig) -> str:
    cores = profiling_clusters.cores_per_worker(settings)
    return f"{cores} core{'s' if cores != 1 else ''}"
