"""A search's jobs on the machine's cores: processes that each know the problem, and answers in the order of the jobs.

The answers do not depend on how many processes there are. Whatever ends the command ends the processes. Knows nothing
of what jobs are for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection

from pdserve.cluster.planner.trials import Evaluate, Job, Result
from pdserve.cluster.tune_jobs import Problem, perform
from pdserve.proto.errors import InternalError

Told = Callable[[str, int], None]
"""Called after each job with its stage and the number of requests that it simulated."""

_problem: Problem | None = None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def evaluator(problem: Problem, num_processes: int, told: Told) -> Iterator[Evaluate]:
    """Does jobs with so many processes; with one, in this one."""
    if num_processes <= 1:

        def alone(stage: str, jobs: Sequence[Job]) -> list[Result]:
            return [_tell(told, stage, perform(job, problem)) for job in jobs]

        yield alone
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num_processes, context, _start, (problem,))

    def together(stage: str, jobs: Sequence[Job]) -> list[Result]:
        # The long ones first: the last to end should be a short one.
        order = sorted(range(len(jobs)), key=lambda index: -jobs[index].most_requests)
        futures = {index: pool.submit(_work, jobs[index]) for index in order}
        try:
            # What is done is told at once; the results are in the order of the jobs.
            for future in as_completed(futures.values()):
                told(stage, future.result().num_requests)
            return [futures[index].result() for index in range(len(jobs))]
        except BrokenProcessPool:
            raise InternalError("a simulating process ended by itself; too little memory? try --processes 1") from None

    try:
        yield together
        pool.shutdown()
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _tell(told: Told, stage: str, result: Result) -> Result:
    told(stage, result.num_requests)
    return result


def _start(problem: Problem) -> None:
    """In each process, once. Ctrl-C ends it without a word: the command speaks for all."""
    global _problem
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_command, daemon=True).start()
    _problem = problem


def _end_with_command() -> None:
    """However the command ended, and in the middle of a job."""
    command = multiprocessing.parent_process()
    assert command is not None
    connection.wait([command.sentinel])
    os._exit(1)


def _work(job: Job) -> Result:
    assert _problem is not None
    return perform(job, _problem)
