"""The parent of the worker process: starts it, gives it one case at a time, and cleans up when it ends."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from ensemble.errors import MembersFailed, UsageError, WeightsBroken
from ensemble.folders import exclusive_writer
from ensemble.serve.output_folder import OutputFolder
from ensemble.serve.worker import CaseDone, CaseFailed, InvokeRequest, WorkerConfig, WorkerReady, serve_requests
from ensemble.text import TrustedLines

log = logging.getLogger(__name__)

#: How long a worker may take to end by itself after SIGTERM. The platform's SIGKILL comes 5 s after its SIGTERM.
GRACE_S = 1.0
#: How many calls wait for their turn at a time; more of them are refused at once.
MAX_WAITING = 16
_HUNG_UP = "the caller has disconnected"


class ServerUnavailable(Exception):
    """The server can't accept a case now; the message states the reason."""


class Supervisor:
    """One worker and the requests that wait for it. All methods except `start` run in the event loop's thread."""

    def __init__(self, worker_config: WorkerConfig) -> None:
        self.ready: WorkerReady | None = None
        """Set while the worker can take a case on."""
        self.broken: CaseFailed | None = None
        """Set when the members can't be loaded; nothing follows after that but the end."""
        self.on_broken: Callable[[], None] = lambda: None
        """Called then."""
        self._worker_config = worker_config
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._started = 0.0
        self._folder = OutputFolder()
        self._stopping = False
        self._settled = asyncio.Event()  # ready, broken or stopping
        self._gone = asyncio.Event()  # the worker has ended
        self._turn = asyncio.Lock()
        self._waiting = 0  # calls for it
        self._answer: asyncio.Future[CaseDone | CaseFailed] | None = None

    def start(self) -> None:
        """Start a worker, which loads in the background."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._started = time.monotonic()
        self._gone.clear()
        self._process = context.Process(
            target=serve_requests, args=(theirs, self._worker_config), daemon=True, name="worker"
        )
        self._process.start()
        theirs.close()
        self._connection = ours

    def attach(self) -> None:
        """Start listening to the worker."""
        assert self._connection is not None
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)

    async def settled(self, seconds: float) -> bool:
        """Wait up to so many seconds until the worker is ready or has failed. Returns whether it is ready."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), seconds)
        return self.ready is not None

    async def segment(
        self, job: InvokeRequest, longest_wait_s: float, gone: asyncio.Future[None] | None = None
    ) -> CaseDone | CaseFailed:
        """Segment a case when those before it are done.

        `gone` is done when nobody waits for the answer any more: the call then loses its turn, unless its case is being segmented.
        Raises ServerUnavailable when the wait takes too long or is in vain, when too many wait already, or when all ends.
        """
        until = time.monotonic() + longest_wait_s
        await self._take_turn(longest_wait_s, gone)
        try:
            await _first_of(self._settled.wait(), gone, max(until - time.monotonic(), 0))
            if self.ready is None and not _is_done(gone):
                raise ServerUnavailable("the server is ending" if self._stopping else "the members are not loaded yet")
            if _is_done(gone):
                raise ServerUnavailable(_HUNG_UP)
            with exclusive_writer(
                job.output_root
            ):  # here, since what the worker leaves when it dies must be cleaned up under it, too
                return await self._run(job)
        except UsageError as error:
            log.error("error: %s", error)
            return CaseFailed.of(error)
        finally:
            self._turn.release()

    async def _take_turn(self, longest_wait_s: float, gone: asyncio.Future[None] | None) -> None:
        if not self._turn.locked():  # a free turn is taken without waiting, also with a timeout of 0 s
            await self._turn.acquire()
            return
        if self._waiting >= MAX_WAITING:
            raise ServerUnavailable(f"{self._waiting} requests are already waiting")
        self._waiting += 1
        try:
            had = await _first_of(self._turn.acquire(), gone, longest_wait_s)
        finally:
            self._waiting -= 1
        if not had:
            raise ServerUnavailable(
                _HUNG_UP if _is_done(gone) else f"other cases took longer than {longest_wait_s:g} s"
            )

    async def stop(self) -> None:
        """End the worker, even if busy; its current case fails."""
        self._stopping = True
        self.ready = None
        self._settled.set()
        if self._process is None or self._gone.is_set():
            return
        self._process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), GRACE_S)
        if not self._gone.is_set():
            self._process.kill()
            await self._gone.wait()

    async def _run(self, job: InvokeRequest) -> CaseDone | CaseFailed:
        assert self._connection is not None
        try:
            self._folder.begin(job.output_root)
        except OSError as error:
            found = f"{error.strerror}: {error.filename}"
            return CaseFailed("outputs of an earlier case can't be removed", UsageError.exit_code, {"found": found})
        self._answer = asyncio.get_running_loop().create_future()
        with suppress(OSError):  # it has just died; reading from the pipe reports this
            self._connection.send(job)
        try:
            answer = await self._answer
        finally:
            self._answer = None
        if isinstance(answer, CaseDone):
            self._folder.keep()
        else:
            self._folder.restore()
        if self._stopping and isinstance(answer, CaseFailed):
            raise ServerUnavailable(answer.what)
        return answer

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self._lost()
            return
        if isinstance(message, WorkerReady):
            total = time.monotonic() - self._started
            parts = {"process": round(total - sum(message.seconds.values()), 3)} | message.seconds
            self.ready = WorkerReady(parts, message.members)
            self._settled.set()
            log.info(
                "ready after %.1f s (%s); members: %s",
                total,
                ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items()),
                ", ".join(message.members),
            )
        elif self._answer is not None:
            self._answer.set_result(message)
        else:
            self._break(message)

    def _lost(self) -> None:
        """Handle the end of the worker: by our request, a failed load, or a kill."""
        assert self._connection is not None
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        self._process.join()
        loaded, self.ready = self.ready is not None, None
        self._gone.set()
        if self._stopping:
            failure = CaseFailed("the server was stopped during this case")
        else:
            failure = CaseFailed("the segmenting process died", MembersFailed.exit_code, _cause(self._process.exitcode))
            log.error("error: %s", TrustedLines(failure))
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(failure)
        if self._stopping or self.broken:
            return
        if loaded:
            self._settled.clear()
            self.start()
            self.attach()
        else:
            self._break(CaseFailed("the members could not be loaded", WeightsBroken.exit_code, failure.details))

    def _break(self, failure: CaseFailed) -> None:
        self.broken = failure
        self._settled.set()
        self.on_broken()


def _is_done(gone: asyncio.Future[None] | None) -> bool:
    return gone is not None and gone.done()


async def _first_of(wanted: Coroutine[Any, Any, Any], gone: asyncio.Future[None] | None, seconds: float) -> bool:
    """Wait for an event, until a timeout or until the caller is gone. Returns whether it came."""
    task: asyncio.Future[Any] = asyncio.ensure_future(wanted)
    either = {task} if gone is None else {task, gone}
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        task.cancel()
    return task.done()


def _cause(exit_code: int | None) -> dict[str, str]:
    """Return how a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return {"found": f"it ended with exit code {exit_code}", "do": "the log may say more"}
    name = signal.Signals(-exit_code).name
    memory = "; the operating system does so when memory runs out" if name == "SIGKILL" else ""
    return {"found": f"ended by {name}{memory}", "do": "give the container more memory" if memory else "see the log"}
