"""One simulated cluster: its processes' lives and deaths. What happens to it, the fault plan says; here is how.

    worker:  (nothing) --start--> starting --> ready --crash | gives up--> dead --start--> a new generation
    router:  (nothing) --start--> up --crash--> dead --start--> up, with a new epoch

Knows nothing of when things happen or of what they should lead to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from random import Random

from simulation.client import Clients
from simulation.controller import SimController
from simulation.loop import Process, SimLoop
from simulation.model import SimModel
from simulation.network import Network
from simulation.progress import Progress
from simulation.router import SimRouter
from simulation.rpc import Rpc
from simulation.scenario import Scenario
from simulation.trace import Trace
from simulation.wires import Wires
from simulation.worker import CONTROLLER, SimWorker, Surroundings, WorkerPlan


class World:
    """Owner of everything in one run."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._random = Random(f"{scenario.seed}/world")
        self.loop = SimLoop(Random(f"{scenario.seed}/executor"), self._on_loop_error)
        self.loop.laziness = 0.1 if "lazy threads" in scenario.kinds else 0.0
        self.trace = Trace(lambda: self.loop.now_s)
        self.network = Network(self.loop, Random(f"{scenario.seed}/network"), self.trace, scenario.weather)
        self.rpc = Rpc(self.network)
        self.wires = Wires(self.network, Random(f"{scenario.seed}/wires"), scenario.wire_faults)
        self.model = SimModel(scenario.seed)
        self.is_calm = False
        engine_random = Random(f"{scenario.seed}/engine")
        self._around = Surroundings(
            self.loop,
            engine_random,
            self.network,
            self.rpc,
            self.wires,
            self.model,
            lambda: not self.is_calm and engine_random.random() < scenario.bad_logits,
        )
        self.plans = {plan.worker_id: plan for plan in scenario.workers}
        self.workers: dict[str, SimWorker] = {}
        self.routers: dict[str, SimRouter] = {}
        self.controller = SimController()
        self.deaths: set[tuple[str, int]] = set()
        self.disturbed: set[str] = set()  # places whose silence or loss has a cause outside the project
        self.clients = Clients(self)
        self._progress = Progress(self)
        self._lives = dict.fromkeys([*self.plans, *self.router_names], 0)
        self._controller_process = Process("controller")

    @property
    def router_names(self) -> list[str]:
        return [f"router{number}" for number in range(self.scenario.num_routers)]

    def start(self) -> None:
        """Everything that is up at the beginning."""
        self.rpc.listen(CONTROLLER, self._controller_process, (self.controller,))
        for worker_id in self.plans:
            self.start_worker(worker_id)
        for name in self.router_names:
            self.start_router(name)
        for request in self.scenario.requests:
            self.loop.at(request.arrival_s, None, self.clients.arrive, request)
        self._look()

    def process_of(self, name: str) -> Process | None:
        """The living process at a place."""
        owner = self.workers.get(name) or self.routers.get(name)
        return None if owner is None or owner.process.is_dead else owner.process

    def start_worker(self, worker_id: str) -> None:
        plan = self.plans[worker_id]
        life = self._next_life(worker_id)
        generation = life * 1000 + self._random.randrange(1000)
        # A successor sometimes gets the port of the one before.
        port = 1 if self._random.random() < 0.3 else life
        process = self._process(worker_id)
        self._in_controller(self.controller.starting, worker_id, plan.role)
        self.loop.soon(process, self._load_worker, plan, generation, f"{worker_id}:{port}", process)

    def start_router(self, name: str) -> None:
        life = self._next_life(name)
        process = self._process(name)
        self.loop.soon(process, self._load_router, name, life, process)

    def crash_worker(self, worker_id: str, silent: bool, restart_s: float | None, notice_s: float) -> None:
        """The process is gone at once, with all that it knew."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.process.is_dead:
            return
        self._end_process(worker.process, worker.info.worker.address, silent)
        self.deaths.add((worker_id, worker.info.worker.generation))
        self.wires.unlink(worker.info.link_address.get("shm", ""))
        self.trace.count("worker deaths")
        self.loop.at(
            self.loop.now_s + notice_s,
            self._controller_process,
            self.controller.dead,
            worker_id,
            worker.info.worker.generation,
        )
        if restart_s is not None:
            self.loop.at(self.loop.now_s + max(restart_s, notice_s + 0.01), None, self.start_worker, worker_id)

    def crash_router(self, name: str, silent: bool, restart_s: float) -> None:
        router = self.routers[name]
        if router.process.is_dead:
            return
        self._end_process(router.process, "", silent)
        self.trace.count("router deaths")
        self.clients.router_died(name)
        self.loop.at(self.loop.now_s + restart_s, None, self.start_router, name)

    def freeze(self, name: str, seconds: float) -> None:
        process = self.process_of(name)
        if process is None:
            return
        self.disturbed.add(name)
        self.trace.count("freezes")
        self.trace.add(name, f"freezes for {seconds:.2f} s")
        self.loop.freeze(process)
        for connection in self.network.of(process):
            self.network.watch(connection, lambda: process.is_frozen, f"{name} is frozen")
        self.loop.at(self.loop.now_s + seconds, None, self.loop.thaw, process)

    def _look(self) -> None:
        self._progress.look()
        self.loop.at(self.loop.now_s + 1.0, None, self._look)

    def _end_process(self, process: Process, address: str, silent: bool) -> None:
        self.disturbed.add(process.name)
        self.trace.add(process.name, "dies" + (" without a word" if silent else ""))
        self.loop.kill(process)
        if address:
            self.rpc.close(address, silent)
        for connection in self.network.of(process):
            connection.end_died(process, silent)

    def _load_worker(self, plan: WorkerPlan, generation: int, address: str, process: Process) -> None:
        """In the new process."""
        worker = SimWorker(plan, generation, address, process, self._around, self._worker_gave_up)
        self.workers[plan.worker_id] = worker
        self.trace.add(plan.worker_id, f"starts as generation {generation} at {address}")
        self.loop.create_task(worker.serve(self._worker_ready), name="serve")

    def _worker_ready(self, worker: SimWorker) -> None:
        self._in_controller(self.controller.ready, worker.info)

    def _worker_gave_up(self, worker: SimWorker, why: str) -> None:
        """As the actor's host does: it tells its requests, then the process ends and is replaced."""
        self.trace.add(worker.plan.worker_id, "gives up")
        self.loop.at(self.loop.now_s + 0.05, None, self.crash_worker, worker.plan.worker_id, False, 1.0, 0.2)

    def _load_router(self, name: str, life: int, process: Process) -> None:
        """In the new process."""
        number = self.router_names.index(name)
        router = SimRouter(name, 100 * (number + 1) + life, process, self.scenario, self.rpc)
        self.routers[name] = router
        self.trace.add(name, f"starts with epoch {router.epoch}")
        task = self.loop.create_task(router.fleet.run(), name="fleet")
        task.add_done_callback(lambda ended: self.trace.violate(name, f"the fleet's watch ended: {ended!r}"))

    def _process(self, name: str) -> Process:
        drift = self._random.uniform(-0.01, 0.01)
        offset_s = self._random.uniform(0.0, 1e6)
        process = Process(name, offset_s, 1.0 + (drift if "drift" in self.scenario.kinds else 0.0))
        if "slowness" in self.scenario.kinds and self._random.random() < 0.4:
            self.disturbed.add(name)
            process.slowness = self._random.choice((3.0, 20.0))
        return process

    def _next_life(self, name: str) -> int:
        self._lives[name] += 1
        return self._lives[name]

    def _in_controller(self, function: Callable[..., object], *arguments: object) -> None:
        self.loop.soon(self._controller_process, function, *arguments)

    def _on_loop_error(self, text: str) -> None:
        self.trace.violate("loop", text)


class LogWatch(logging.Handler):
    """Errors that production code logs as bugs of its own are violations; the rest can be shown with the trace."""

    def __init__(self, trace: Trace, show: bool) -> None:
        super().__init__(logging.DEBUG if show else logging.ERROR)
        self._trace = trace
        self.shown: list[tuple[int, str]] = []
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "pdserve.proto.status" and record.levelno >= logging.ERROR:
            self._trace.violate("log", f"an internal error: {record.exc_info[1]!r}" if record.exc_info else "?")
        elif self._show:
            self.shown.append((len(self._trace.lines), f"{record.name}: {record.getMessage()}"))
