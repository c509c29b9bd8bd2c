"""The HTTP server: its two routes, and its shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ensemble.errors import InputRefused
from ensemble.logging_setup import write_final_error_line
from ensemble.serve.limits import RateLimitFilter, limited_protocol_class, max_connections
from ensemble.serve.supervisor import ServerUnavailable, Supervisor
from ensemble.serve.worker import CaseDone, CaseFailed, InvokeRequest

#: How long one call of /health is held while members load; the platform allows 10 s.
HEALTH_HOLD_S = 5.0
#: How many calls of /health are held at a time; more of them are answered at once.
MAX_HELD = 16
#: How long open connections may take at the end; the platform's SIGKILL comes 5 s after its SIGTERM.
SHUTDOWN_S = 3


def build_application(supervisor: Supervisor, job: InvokeRequest, longest_wait_s: float) -> FastAPI:
    """Build the application: GET /health, and POST /invoke, which waits at most `longest_wait_s` for its turn to run `job`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        supervisor.attach()
        yield
        await supervisor.stop()

    # a redirect counts as a failure, and the pages of documentation would load scripts from elsewhere
    app = FastAPI(title="isles-ensemble", lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None)

    held = asyncio.Semaphore(MAX_HELD)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "the members are still loading, or loading failed"}})
    async def health() -> JSONResponse:
        """Answer 200 once a case can be taken on, also while one is being segmented."""
        if supervisor.ready is None and not held.locked():
            async with held:
                await supervisor.settled(HEALTH_HOLD_S)
        if (ready := supervisor.ready) is not None:
            return JSONResponse({"status": "ready", "members": ready.members, "seconds": ready.seconds})
        if supervisor.broken is not None:
            return JSONResponse(_failure(supervisor.broken), 503)
        return JSONResponse({"status": "loading"}, 503)

    @app.post("/invoke", status_code=201, responses={422: {"description": "input refused"}})
    async def invoke(request: Request) -> JSONResponse:
        """Segment the case below the input root. 201 when its outputs are complete; otherwise there are none."""
        gone = asyncio.create_task(_hung_up(request))
        try:
            answer = await supervisor.segment(job, longest_wait_s, gone)
        except ServerUnavailable as error:
            return JSONResponse(
                _failure(CaseFailed(str(error), details={"do": "try again"})), 503, {"Retry-After": "10"}
            )
        finally:
            gone.cancel()
        if isinstance(answer, CaseDone):
            return JSONResponse({"status": "complete"} | answer.summary, 201)
        write_final_error_line(f"error: {answer}")  # the worker has logged it
        return JSONResponse(_failure(answer), 422 if answer.exit_code == InputRefused.exit_code else 500)

    return app


async def _hung_up(request: Request) -> None:
    """Wait until the caller disconnects; discard any data it sends."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(failed: CaseFailed) -> dict[str, Any]:
    return {"status": "failed", "error": {"what": failed.what, **failed.details}, "exit_code": failed.exit_code}


class InvokeServer(uvicorn.Server):
    """The HTTP server. On shutdown it also ends the worker, because requests that wait for the worker would delay it."""

    def __init__(self, app: FastAPI, supervisor: Supervisor) -> None:
        most = max_connections()
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol_class(most),
                backlog=most,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=SHUTDOWN_S,
            )
        )
        for name in ("uvicorn.error", "asyncio"):  # who speak of strangers' mistakes
            logging.getLogger(name).addFilter(RateLimitFilter())
        self.ended_by = 0
        """The signal that ended it."""
        self._supervisor = supervisor
        supervisor.on_broken = self.end

    def end(self, signum: int = 0) -> None:
        """Stop listening, end the worker, and answer waiting requests."""
        self.ended_by = self.ended_by or signum
        self.should_exit = True
        self._farewell = asyncio.get_running_loop().create_task(self._supervisor.stop())

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let signals end the server while it runs; restore the previous handlers afterwards."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self.end, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
