"""Run a batch on a Ray cluster or on several GPUs of one machine: one actor per GPU (or per group of CPUs) keeps the networks loaded.

Cases are calls of actors, longest first. Ray places and watches the processes; who may work on a case, and how it is published, is what it
is without Ray (`case_loop`, `claims`): an actor that was given up and lives on can do no harm.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ensemble.batch.case_loop import BatchPlan, CaseOutcome, CaseWorker, record_process_death
from ensemble.batch.claims import BatchClaims
from ensemble.batch.identity import describe_recipe, result_key
from ensemble.batch.selection import Placed
from ensemble.config import Device
from ensemble.errors import MembersFailed, OutOfMemory, UsageError, UserError
from ensemble.folders import unwritable_error
from ensemble.inference.device import resolve_device
from ensemble.logging_setup import set_up_logging
from ensemble.members.manifest import find_members, weight_digests
from ensemble.memory import MORE_MEMORY, keep_freed_memory
from ensemble.pipeline import Ensemble

log = logging.getLogger(__name__)

#: What `--ray` without an address means: a cluster of this machine's own, for as long as the batch.
LOCAL = "local"
#: Cases that an actor has at a time: while one is in the networks, another is read or written.
_AT_A_TIME = 2
#: Seconds between checks for new nodes, and before a case held by another process is tried again.
_LOOK_S, _HELD_S = 2.0, 0.5
#: How often a case may lose its process, or a node one before that is ready.
_LIVES = 3
#: Seconds without any living actor after which the batch ends.
_PATIENCE_S = 300.0
#: Where a cluster of our own listens. Of 127.0.0.1 Ray makes the machine's address, of this one not.
_LOOPBACK = "127.0.0.2"
#: How a cluster of our own starts. Only outcomes go through its shared memory (bytes).
OWN_CLUSTER: dict[str, Any] = {
    "include_dashboard": False,
    "_node_ip_address": _LOOPBACK,
    "object_store_memory": 80 * 2**20,
}
#: Ray's own settings: nothing is reported to its makers.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0"}
INSTALL = "pip install ray"


def is_ray_installed() -> bool:
    """Return whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def gpu_count(device: Device) -> int:
    """Return how many GPUs this process may use."""
    import torch

    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0


def segment_on_ray(
    address: str,
    cpus: int,
    plan: BatchPlan,
    claims: BatchClaims,
    cases: Sequence[Placed],
    load: Callable[[], Ensemble],
    tell: Callable[[CaseOutcome], None],
) -> None:
    """Process all cases on a Ray cluster; returns when every case is done or failed.

    `cpus` are those of one actor. `load` must be picklable. Raises the UserError of an actor, UsageError if there is
    no Ray or no such cluster, MembersFailed when no actor is left.
    """
    with _connected(address) as ray:
        token = plan.root / ".batch" / f"ray-{uuid4().hex}"
        token.touch()
        fleet = _Fleet(ray, plan, load, token, cpus)
        try:
            _share(ray, fleet, plan, claims, cases, tell)
        finally:
            fleet.end()
            with suppress(OSError):
                token.unlink()


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one that ends with the block. Yields the module `ray`; usage reporting is off."""
    if not is_ray_installed():
        raise UsageError("--ray needs Ray, which is not installed", do=f"run {INSTALL}, or leave out --ray")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            ray.init(address="local", **OWN_CLUSTER, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises whatever it likes, Exception itself among it
        found = " ".join(str(error).split())[:300]
        do = "give the address that `ray start --head` printed (HOST:PORT), or auto on a machine of the cluster"
        raise UsageError("the Ray cluster does not answer", where=address, found=found, do=do) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
        yield ray
    finally:
        ray.shutdown()


class _Worker:
    """The Ray actor: keeps the networks loaded and processes one case after the other."""

    def __init__(self, plan: BatchPlan, load: Callable[[], Ensemble], token: Path, threads: int) -> None:
        import SimpleITK as sitk
        import torch

        keep_freed_memory()
        set_up_logging()
        # otherwise a cluster that we start inherits variables by which each process uses the whole machine
        torch.set_num_threads(threads)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        self._plan, self._load, self._token = plan, load, token
        self._claims: BatchClaims | None = None

    def ready(self) -> UserError | None:
        """Load the networks. Returns the error if that fails, or if this node must not take part."""
        plan = self._plan
        try:
            if not self._token.exists():
                raise UsageError("a node of the cluster can't access the output folder", where=f"{_node()}: {plan.root}",
                                 do="use an output folder that all nodes share under the same path")  # fmt: skip
            plan = replace(plan, device=resolve_device(plan.config.device))
            specs = find_members(plan.config.weights_folder, plan.config.members)
            digests = {spec.name: weight_digests(spec) for spec in specs}
            if (own := describe_recipe(specs, digests, plan.config, plan.extras)) != plan.recipe:
                different = [key for key in plan.recipe if own.get(key) != plan.recipe[key]]
                raise UsageError("a node of the cluster has a different version of this program, or different weights", where=_node(),
                                 found=f"different here: {', '.join(different)}",
                                 do="install the same version and weights on every node")  # fmt: skip
            self._claims = BatchClaims(plan.root, result_key(plan.recipe, {}))
            self._cases = CaseWorker(plan, self._claims, self._load)
            self._cases.load()
        except UserError as error:
            return error
        except OSError as error:
            return unwritable_error(plan.root, error)
        return None

    def segment(self, placed: Placed) -> CaseOutcome | UserError | None:
        """Return the outcome of a case, or the error that ends the batch; None if another process has the case."""
        try:
            return self._cases(*placed)
        except UserError as error:
            return error
        except OSError as error:
            return unwritable_error(self._plan.root, error)

    def leave(self) -> None:
        """Release all locks."""
        if self._claims is not None:
            self._claims.leave()


def _node() -> str:
    return os.uname().nodename


@dataclass
class _Member:
    """The driver's record of an actor."""

    slot: tuple[str, int]
    """Its node, and which of the node's actors it is."""
    actor: Any
    ready: bool = False
    cases: list[str] = field(default_factory=list)
    alone: bool = False
    """Whether its case may be what kills its process: it gets no other one meanwhile."""


class _Fleet:
    """The actors on all living nodes."""

    def __init__(self, ray: Any, plan: BatchPlan, load: Callable[[], Ensemble], token: Path, cpus: int) -> None:
        self._ray, self._cpus = ray, cpus
        living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._gpus = plan.config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in living)
        if plan.config.device == "cuda" and not self._gpus:
            raise UsageError("--device cuda, but no node of the cluster has a GPU", do="use --device auto or cpu")
        config = replace(plan.config, device="cuda" if self._gpus else "cpu")
        self._arguments = (replace(plan, config=config), load, token)
        self.members: dict[tuple[str, int], _Member] = {}
        self.starting: dict[Any, _Member] = {}
        self._losses: Counter[tuple[str, int]] = Counter()  # of processes that died before they were ready
        self._looked = self._alive = time.monotonic()
        self.last_loss = ""
        self._look()

    def refresh(self) -> None:
        """Start actors where there is room. Raises MembersFailed if there has been no actor for a long time."""
        now, hopeless = time.monotonic(), False
        if now - self._looked > _LOOK_S:
            self._looked = now
            self._look()
            hopeless = not self.members and max(self._losses.values(), default=0) >= _LIVES
        if any(member.ready for member in self.members.values()):
            self._alive = now
        if hopeless or now - self._alive > _PATIENCE_S:
            raise MembersFailed(
                "no worker process is left on the Ray cluster",
                found=self.last_loss
                or f"no node has the free CPUs (--ray-cpus {self._cpus})" + " and the free GPU" * bool(self._gpus),
                do="correct what ended the last worker process, then run the batch again"
                if self.last_loss
                else "check that nodes are alive and free (ray status), or lower --ray-cpus, then run the batch again",
            )

    def _look(self) -> None:
        for node in (node for node in self._ray.nodes() if node["Alive"]):
            cpus, gpus = int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))
            each = max(1, min(self._cpus, cpus // max(gpus, 1) if self._gpus else cpus))
            for index in range(gpus if self._gpus else cpus // each):
                slot = (node["NodeID"], index)
                if slot not in self.members and self._losses[slot] < _LIVES:
                    self._start(slot, each)

    def _start(self, slot: tuple[str, int], cpus: int) -> None:
        options = {
            "num_cpus": cpus,
            "num_gpus": int(self._gpus),
            "max_concurrency": _AT_A_TIME,
            "scheduling_strategy": _only_on(slot[0]),
        }
        actor = self._ray.remote(_Worker).options(**options).remote(*self._arguments, cpus)
        member = self.members[slot] = _Member(slot, actor)
        self.starting[actor.ready.remote()] = member

    def lost(self, member: _Member, error: Exception) -> None:
        """Handle the death of an actor's process or node."""
        self.last_loss = " ".join(str(error).split())[:300]
        if self.members.get(member.slot) is member:
            log.warning("note: a worker process on the Ray cluster died: %s", self.last_loss)
            del self.members[member.slot]
            self._losses[member.slot] += not member.ready

    def end(self) -> None:
        """End all actors that can still be reached."""
        with suppress(self._ray.exceptions.RayError):
            idle = [member for member in self.members.values() if member.ready and not member.cases]
            if leaving := [member.actor.leave.remote() for member in idle]:
                self._ray.wait(leaving, num_returns=len(leaving), timeout=10)
            for member in self.members.values():
                self._ray.kill(member.actor)


def _only_on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _share(
    ray: Any,
    fleet: _Fleet,
    plan: BatchPlan,
    claims: BatchClaims,
    cases: Sequence[Placed],
    tell: Callable[[CaseOutcome], None],
) -> None:
    """Hand out the cases to the actors until all are done or failed."""
    waiting = deque(sorted(cases, key=_bytes, reverse=True))
    held: deque[tuple[float, Placed]] = deque()
    running: dict[Any, tuple[_Member, Placed]] = {}
    losses: Counter[str] = Counter()
    while waiting or held or running:
        fleet.refresh()
        while held and held[0][0] < time.monotonic():
            waiting.append(held.popleft()[1])
        idle = sum(not member.cases for member in fleet.members.values())
        for member in sorted(fleet.members.values(), key=lambda member: len(member.cases)):
            idle -= not member.cases
            _give(member, waiting, losses, running, idle)
            idle += not member.cases
        for answer in _answers(ray, [*running, *fleet.starting]):
            member, placed = running.pop(answer, None) or (fleet.starting.pop(answer), None)
            try:
                said = ray.get(answer)
            except ray.exceptions.RayTaskError:  # a bug of ours
                raise
            except ray.exceptions.RayError as error:
                fleet.lost(member, error)
                if placed is not None:
                    case = placed[0]
                    losses[case.name] += 1
                    if losses[case.name] < _LIVES:
                        waiting.appendleft(placed)
                    else:
                        tell(record_process_death(plan, claims, *placed, _gave_up(str(error))))
                continue
            if isinstance(said, UserError):
                raise said
            if placed is None:
                member.ready = True
                continue
            member.cases.remove(placed[0].name)
            member.alone = member.alone and bool(member.cases)
            if said is None:
                held.append((time.monotonic() + _HELD_S, placed))
            else:
                tell(said)


def _answers(ray: Any, asked: list[Any]) -> list[Any]:
    """Return the answers that have arrived; an empty list after a short wait."""
    if not asked:
        time.sleep(_HELD_S)
        return []
    done: list[Any] = ray.wait(asked, timeout=_HELD_S)[0]
    return done


def _give(
    member: _Member,
    waiting: deque[Placed],
    losses: Counter[str],
    running: dict[Any, tuple[_Member, Placed]],
    idle: int,
) -> None:
    """Give an actor as many cases as it takes. A case that was lost before runs alone, as it may have killed the process.

    The last cases are left to the `idle` other actors, including those that still load their networks.
    """
    while member.ready and waiting and not member.alone and len(member.cases) < _AT_A_TIME:
        if member.cases and len(waiting) <= idle:
            return
        suspect = losses[waiting[0][0].name] > 0
        if suspect and member.cases:
            return
        placed = waiting.popleft()
        member.alone = suspect
        member.cases.append(placed[0].name)
        running[member.actor.segment.remote(placed)] = (member, placed)


def _gave_up(found: str) -> OutOfMemory:
    return OutOfMemory(
        f"the process that segmented this case died {_LIVES} times",
        found=" ".join(found.split())[:200],
        do=f"if memory ran out, {MORE_MEMORY}, or give each process more of a node (--ray-cpus)",
    )


def _bytes(placed: Placed) -> int:
    """Return the size of a case's images on disk: larger ones take longer."""
    total = 0
    for path in placed[0].files.values():
        with suppress(OSError):
            inner = path.rglob("*") if path.is_dir() else [path]
            total += sum(file.stat().st_size for file in inner if file.is_file())
    return total
