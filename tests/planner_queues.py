"""Queues whose attainment is known, as stand-ins for the simulator: a request has to wait for less than a limit.

Each is made for a service time of one second in the mean, so that the rate is the utilisation of one server. All are a
pure function of rate, seed and number of requests. Knows nothing of what is tested with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdserve.cluster.planner.attainment import Outcomes
from pdserve.cluster.planner.stationarity import FloatArray

Draw = Callable[[np.random.Generator, int], FloatArray]


def exponential_times(random: np.random.Generator, num_requests: int) -> FloatArray:
    return random.exponential(1.0, num_requests)


def constant_times(random: np.random.Generator, num_requests: int) -> FloatArray:
    return np.ones(num_requests)


def lognormal_times(random: np.random.Generator, num_requests: int) -> FloatArray:
    """Mean one, squared coefficient of variation e - 1."""
    return random.lognormal(-0.5, 1.0, num_requests)


def single_server(draw: Draw, limit_s: float, *, shape: float = 1.0) -> Callable[[float, int, int], Outcomes]:
    """GI/G/1 by Lindley's recursion, which is a running minimum; gaps are gamma of that shape, 1 being Poisson."""

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        random = np.random.default_rng(seed)
        gaps_s = random.gamma(shape, 1 / (rate * shape), num_requests)
        service_s = draw(random, num_requests)
        walk = np.concatenate([[0.0], np.cumsum(service_s[:-1] - gaps_s[1:])])
        wait_s = walk - np.minimum.accumulate(walk)
        return outcomes(np.cumsum(gaps_s), wait_s, service_s, limit_s)

    return run


def outcomes(arrival_s: FloatArray, wait_s: FloatArray, service_s: FloatArray, limit_s: float) -> Outcomes:
    everything = np.ones(len(arrival_s), dtype=np.bool_)
    return Outcomes(arrival_s, arrival_s + wait_s + service_s, wait_s <= limit_s, everything)


def two_servers(draw: Draw, limit_s: float, *, shape: float) -> Callable[[float, int, int], Outcomes]:
    """GI/G/2 first come, first served."""

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        random = np.random.default_rng(seed)
        arrival_s = np.cumsum(random.gamma(shape, 1 / (rate * shape), num_requests))
        service_s = draw(random, num_requests)
        wait_s = np.empty(num_requests)
        soon, late = 0.0, 0.0
        for index, (now, takes) in enumerate(zip(arrival_s.tolist(), service_s.tolist(), strict=True)):
            start = soon if soon > now else now
            wait_s[index] = start - now
            end = start + takes
            soon, late = (end, late) if end < late else (late, end)
        return outcomes(arrival_s, wait_s, service_s, limit_s)

    return run


def batch_server(limit_s: float, *, fixed_s: float, each_s: float, most: int) -> Callable[[float, int, int], Outcomes]:
    """One server that takes all that wait, up to `most`, in `fixed_s` plus `each_s` for every one of them."""

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        random = np.random.default_rng(seed)
        arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
        arrivals = arrival_s.tolist()
        wait_s, takes_s = np.empty(num_requests), np.empty(num_requests)
        first, free_s = 0, 0.0
        while first < num_requests:
            start_s = max(free_s, arrivals[first])
            end = first + 1
            while end < num_requests and end - first < most and arrivals[end] <= start_s:
                end += 1
            takes_s[first:end] = fixed_s + each_s * (end - first)
            wait_s[first:end] = start_s - arrival_s[first:end]
            free_s = start_s + fixed_s + each_s * (end - first)
            first = end
        return outcomes(arrival_s, wait_s, takes_s, limit_s)

    return run


def mm1_goodput(target: float, limit_s: float) -> float:
    """Exact: a request waits longer than `limit_s` with probability `rate * exp(-(1 - rate) * limit_s)`."""
    return _falls_to(target, lambda rate: 1 - rate * math.exp(-(1 - rate) * limit_s))


def md1_goodput(target: float, limit_s: float) -> float:
    """Exact, by Erlang's formula (1909) for the waiting time beside a constant service."""

    def attainment(rate: float) -> float:
        terms = (
            (rate * (step - limit_s)) ** step / math.factorial(step) * math.exp(-rate * (step - limit_s))
            for step in range(math.floor(limit_s) + 1)
        )
        return (1 - rate) * math.fsum(terms)

    return _falls_to(target, attainment)


def _falls_to(target: float, attainment: Callable[[float], float]) -> float:
    low, high = 0.01, 0.99
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if attainment(middle) > target else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue and the rate at which nine in ten of its requests wait less than the limit."""

    run: Callable[[float, int, int], Outcomes]
    goodput: float


QUEUES = {
    "M/M/1": Queue(single_server(exponential_times, 5.0), mm1_goodput(0.9, 5.0)),
    "M/D/1": Queue(single_server(constant_times, 3.0), md1_goodput(0.9, 3.0)),
    # Of these two by quadratic interpolation between three rates, each seven runs of 700,000 requests.
    "bursty G/G/2": Queue(two_servers(lognormal_times, 4.0, shape=0.4), 1.1691),
    "batch service": Queue(batch_server(1.5, fixed_s=0.5, each_s=0.05, most=16), 11.284),
}


def of_classes(limits_s: tuple[float, ...], shares: tuple[float, ...]) -> Callable[[float, int, int], Outcomes]:
    """M/M/1 first come, first served, whose requests are of several classes with limits of their own."""

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        plain = single_server(exponential_times, 0.0)(rate, seed, num_requests)
        random = np.random.default_rng((seed, 1))
        slo_class = random.choice(len(shares), size=num_requests, p=shares).astype(np.int64)
        service_s = exponential_service(rate, seed, num_requests)
        met = plain.end_s - plain.arrival_s - service_s <= np.array(limits_s)[slo_class]
        return Outcomes(plain.arrival_s, plain.end_s, met, np.ones(num_requests, dtype=np.bool_), slo_class=slo_class)

    return run


def exponential_service(rate: float, seed: int, num_requests: int) -> FloatArray:
    """What `single_server` draws for its service times."""
    random = np.random.default_rng(seed)
    random.gamma(1.0, 1 / rate, num_requests)
    return exponential_times(random, num_requests)


def swinging(run_s: float, swing: float, limit_s: float, *, growth: float = 0.0) -> Callable[..., Outcomes]:
    """M/M/1 whose service times swing up and down over `run_s`, around a mean that grows by `growth` over it.

    The work of each request is told by a control, so that it can be seen that it is the load that drifts.
    """

    def run(rate: float, seed: int, num_requests: int) -> Outcomes:
        random = np.random.default_rng(seed)
        arrival_s = np.cumsum(random.exponential(1 / rate, num_requests))
        phase = 2 * math.pi * arrival_s / run_s
        work = 1 + swing * np.sin(phase) + growth * (arrival_s / run_s - 0.5)
        service_s = work * random.exponential(1.0, num_requests)
        walk = np.concatenate([[0.0], np.cumsum(service_s[:-1] - np.diff(arrival_s))])
        wait_s = walk - np.minimum.accumulate(walk)
        everything = np.ones(num_requests, dtype=np.bool_)
        return Outcomes(arrival_s, arrival_s + wait_s + service_s, wait_s <= limit_s, everything, controls=(work - 1,))

    return run


def with_tpot(run: Callable[[float, int, int], Outcomes], share: float) -> Callable[[float, int, int], Outcomes]:
    """As before, but at any rate no more than `share` of the requests meet TPOT; those that do not are up to twice too
    slow."""

    def both(rate: float, seed: int, num_requests: int) -> Outcomes:
        plain = run(rate, seed, num_requests)
        used = np.random.default_rng((seed, 2)).uniform(0.0, 1 / share, num_requests)
        ttft_used = np.where(plain.ttft_ok, 0.5, 2.0)
        return Outcomes(plain.arrival_s, plain.end_s, plain.ttft_ok, used <= 1.0, ttft_used=ttft_used, tpot_used=used)

    return both
