"""Invoke mode of the contract: a server that keeps the networks loaded. HTTP is in `http`, the networks are in `worker`."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import UsageError
from ensemble.logging_setup import write_final_error_line
from ensemble.serve.supervisor import Supervisor
from ensemble.serve.worker import InvokeRequest, WorkerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Address of the server, and the folders of inputs and outputs."""

    input_root: Path
    output_root: Path
    host: str
    port: int
    longest_wait_s: float
    """How long a call waits while others are served."""


def serve(worker_config: WorkerConfig, server_config: ServerConfig) -> int:
    """Run the HTTP server until SIGTERM or SIGINT, or until loading the members fails. Returns the exit code.

    Raises UsageError when the port can't be opened.
    """
    listening = open_listening_socket(
        server_config.host, server_config.port
    )  # at once, so that a caller waits until the server is ready
    supervisor = Supervisor(worker_config)
    supervisor.start()  # so that torch is imported there while FastAPI is imported here
    from ensemble.serve.http import InvokeServer, build_application

    server = InvokeServer(
        build_application(
            supervisor, InvokeRequest(server_config.input_root, server_config.output_root), server_config.longest_wait_s
        ),
        supervisor,
    )
    log.info("listening on %s", _address(*listening.getsockname()[:2]))
    server.run(sockets=[listening])
    if (broken := supervisor.broken) is not None:
        where = broken.details.get("where") or broken.details.get("found", "")
        said = f"ended with exit code {broken.exit_code}: {broken.what}: {' '.join(where.split())}"
        log.error("%s", said)
        write_final_error_line(said)
        return broken.exit_code
    return 128 + server.ended_by


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a host's first address, IPv4 or IPv6; `::` accepts both. Raises UsageError."""
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((address[0], port, *address[2:]))  # getaddrinfo takes ports modulo 65536
        listening.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:  # the latter two for what is no port, or no name
        if listening is not None:
            listening.close()
        raise UsageError(
            "the port can't be opened",
            where=_address(host, port),
            found=getattr(error, "strerror", None) or str(error),
            do="stop the program that uses it, or choose another port with --port",
        ) from error
    return listening


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
