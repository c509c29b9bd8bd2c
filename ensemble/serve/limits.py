"""Limits on what clients may use: connections, time per request, log lines."""

from __future__ import annotations

import asyncio
import logging
import resource
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

#: How long a connection may be open without a whole request.
REQUEST_S = 10.0
#: Most simultaneous connections, if the limit on open files allows it.
MAX_CONNECTIONS = 256
#: Files that the server itself holds open, at most.
_OWN_FILES = 64
#: Seconds between log lines with the same message.
_REPEAT_S = 60.0


def max_connections() -> int:
    """Return how many connections to serve at once, from the limit on open files (a third: some are accepted before they are counted)."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(MAX_CONNECTIONS, (files - _OWN_FILES) // 3))


def limited_protocol_class(max_open: int) -> type[H11Protocol]:
    """Return an HTTP protocol class that allows `max_open` connections at a time.

    A newcomer beyond them takes the place of the connection that has been longest without a request, be it silent, slow or kept alive;
    where all others have one, the newcomer is dropped. A connection without a whole request is dropped after REQUEST_S.
    """
    waiting: dict[H11Protocol, None] = {}  # connections without a request, the one that has waited longest first

    class BoundedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_request()
            while len(self.connections) > max_open and waiting:
                _drop(next(iter(waiting)), waiting)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._settle()

        def on_response_complete(self) -> None:
            self._await_request()
            super().on_response_complete()  # it may find the next request, which came along with this one
            self._settle()

        def connection_lost(self, exc: Exception | None) -> None:
            self._leave()
            super().connection_lost(exc)

        def _await_request(self) -> None:
            self._leave()
            waiting[self] = None
            self.timer = self.loop.call_later(REQUEST_S, _drop, self, waiting)

        def _settle(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._leave()

        def _leave(self) -> None:
            waiting.pop(self, None)
            if self.timer is not None:
                self.timer.cancel()

    return BoundedProtocol


def _drop(connection: H11Protocol, waiting: dict[H11Protocol, None]) -> None:
    waiting.pop(connection, None)
    connection.connections.discard(connection)
    connection.transport.abort()


class RateLimitFilter(logging.Filter):
    """A log filter that lets a repeated message pass only once a minute, with the number of repeats."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        key = f"{record.levelno} {record.msg} {type(error).__name__}"
        now = time.monotonic()
        last, kept_back = self._told.get(key, (-_REPEAT_S, 0))
        if now - last < _REPEAT_S:
            self._told[key] = last, kept_back + 1
            return False
        self._told[key] = now, 0
        if kept_back:
            record.msg = f"{record.msg} ({kept_back} more since the last line like this)"
        return True
