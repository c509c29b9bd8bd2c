"""The server among strangers: silent, slow and garbled connections, callers that hang up, and what its log keeps of them."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import write_contract_case
from ensemble.serve.limits import MAX_CONNECTIONS, RateLimitFilter, max_connections
from ensemble.serve.supervisor import MAX_WAITING, ServerUnavailable, Supervisor
from ensemble.serve.worker import CaseDone, InvokeRequest, WorkerReady
from test_serve import Running, serving, slow_weights, weights  # noqa: F401

HOSTILE = 1000
#: Open files that the server may have.
FILES = 256
MAX_GROWTH = 50 << 20


@contextmanager
def many_files(number: int) -> Iterator[None]:
    """So many open files for this process, as far as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"this process may not open {number} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident(server: Running) -> int:
    return 4096 * int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])


def connect(server: Running, says: bytes) -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    if says:
        with suppress(OSError):
            stranger.sendall(says)
    return stranger


STRANGERS = {
    "silent": b"",
    "half a request": b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    "a body without end": b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\nabc",
    "kept alive": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.slow
def test_a_thousand_strangers_do_not_keep_health_from_answering(tmp_path: Path, weights: Path) -> None:  # noqa: F811
    with many_files(HOSTILE + 500), serving(tmp_path, weights, "--members", "first", "--tta", "none") as server:
        server.await_ready()
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        before, lines = resident(server), len(server.lines)
        with ExitStack() as open_ones:
            kinds = list(STRANGERS.values())
            for number in range(HOSTILE):
                open_ones.enter_context(connect(server, kinds[number % len(kinds)]))
                if number % 100 == 99:
                    assert server.ask("GET", "/health")[0] == 200  # among all of them, none of which has gone
            assert resident(server) - before < MAX_GROWTH
        assert server.ask("GET", "/health")[0] == 200
        assert len(server.lines) - lines < 20, server.lines[lines:]


@pytest.mark.slow
def test_strangers_that_keep_all_descriptors_are_told_of_once(tmp_path: Path, weights: Path) -> None:  # noqa: F811
    """The limit sinks below what the server holds: nothing can be accepted then, and everything again afterwards."""
    with serving(tmp_path, weights, "--members", "first", "--tta", "none") as server:
        server.await_ready()
        lines = len(server.lines)
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (8, hard))
        with ExitStack() as open_ones:
            for _ in range(20):
                open_ones.enter_context(connect(server, b""))
            time.sleep(3)
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (FILES, hard))
            assert server.ask("GET", "/health")[0] == 200
        said = [line for line in server.lines[lines:] if "out of system resource" in line]
        assert len(said) == 1, server.lines[lines:]


@pytest.mark.slow
def test_callers_that_hung_up_lose_their_turn(tmp_path: Path, slow_weights: Path) -> None:  # noqa: F811
    write_contract_case(tmp_path / "in")
    with serving(tmp_path, slow_weights, "--tta", "none") as server:
        server.await_ready()
        first = server.start_invoke()
        for _ in range(5):
            connect(server, b"POST /invoke HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").close()
        assert server.invoke()[0] == 201
        assert first()[0] == 201
        assert server.lines.count("prepare ...") == 2


def test_only_so_many_calls_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> list[Any]:
        supervisor, job, release = Supervisor(None), InvokeRequest(Path(), Path()), asyncio.Event()  # type: ignore[arg-type]
        supervisor.ready = WorkerReady({}, ())
        supervisor._settled.set()

        async def run(job: InvokeRequest) -> CaseDone:
            await release.wait()
            return CaseDone({})

        monkeypatch.setattr(supervisor, "_run", run)
        calls = [asyncio.create_task(supervisor.segment(job, 60)) for _ in range(1 + MAX_WAITING)]
        await asyncio.sleep(0.05)
        with pytest.raises(ServerUnavailable, match=f"{MAX_WAITING} requests are already waiting"):
            await supervisor.segment(job, 60)
        release.set()
        return await asyncio.gather(*calls)

    assert asyncio.run(ask()) == [CaseDone({})] * (1 + MAX_WAITING)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_turn_is_free_again_when_its_caller_has_gone(monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    async def ask() -> Any:
        supervisor, job = Supervisor(None), InvokeRequest(Path(), Path())  # type: ignore[arg-type]
        release = asyncio.Event()

        async def run(job: InvokeRequest) -> CaseDone:
            await release.wait()
            return CaseDone({})

        monkeypatch.setattr(supervisor, "_run", run)
        if loaded:
            supervisor.ready = WorkerReady({}, ())
            supervisor._settled.set()
            running = asyncio.create_task(supervisor.segment(job, 60))
            await asyncio.sleep(0)
        gone = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(supervisor.segment(job, 60, gone))
        await asyncio.sleep(0.01)
        gone.set_result(None)
        with pytest.raises(ServerUnavailable, match="disconnected"):
            await waiting
        release.set()
        if loaded:
            await running
        supervisor.ready = WorkerReady({}, ())
        supervisor._settled.set()
        return await supervisor.segment(job, 0)

    assert asyncio.run(ask()) == CaseDone({})


def test_connections_leave_room_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, most in ((64, 8), (256, 64), (1 << 20, MAX_CONNECTIONS)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert max_connections() == most


def test_the_log_tells_the_same_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = RateLimitFilter()

    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, message, (), None)

    assert [told.filter(record("a")) for _ in range(3)] == [True, False, False]
    assert told.filter(record("b"))
    now[0] = 61
    again = record("a")
    assert told.filter(again)
    assert again.getMessage() == "a (2 more since the last line like this)"
