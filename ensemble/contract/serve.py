"""Invoke mode of the contract: a server with the networks in memory. HTTP itself is in `http`, the networks are in `worker`."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from ensemble.contract.supervisor import Supervisor
from ensemble.contract.worker import Job, Setup
from ensemble.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the server listens, and where cases come from and go to."""

    input_root: Path
    output_root: Path
    host: str
    port: int
    longest_wait_s: float
    """How long a call waits while others are served."""


def serve(setup: Setup, place: Place) -> int:
    """Serve until SIGTERM or SIGINT, or until the members prove unloadable. Returns the exit code.

    Raises UsageError when the port can't be had.
    """
    listening = _listen(place.host, place.port)  # at once: who calls now is answered as soon as the rest is there
    supervisor = Supervisor(setup)
    supervisor.start()  # so that torch is imported there while FastAPI is imported here
    from ensemble.contract.http import Server, application

    server = Server(application(supervisor, Job(place.input_root, place.output_root), place.longest_wait_s), supervisor)
    log.info("listening on %s:%d", *listening.getsockname())
    server.run(sockets=[listening])
    if (broken := supervisor.broken) is not None:
        where = broken.details.get("where") or broken.details.get("found", "")
        log.error("ended with exit code %d: %s: %s", broken.exit_code, broken.what, where.replace("\n", " "))
        return broken.exit_code
    return 128 + server.ended_by


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:  # the latter for a number that is none of a port
        listening.close()
        raise UsageError(
            "the port can't be opened",
            where=f"{host}:{port}",
            found=getattr(error, "strerror", None) or str(error),
            do="end the program that has it, or name another with --port",
        ) from error
    return listening
