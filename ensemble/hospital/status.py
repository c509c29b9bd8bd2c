"""The status page: which studies arrived, and what happened to each. It shows no patient name or ID."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from typing import Any

import uvicorn

from ensemble import __version__
from ensemble.errors import UsageError
from ensemble.hospital.spool import Spool, StudyJournal
from ensemble.outputs.report.run_report import RESEARCH_USE
from ensemble.serve.limits import RateLimitFilter, limited_protocol_class, max_connections
from ensemble.serve.serve import open_listening_socket

#: Fields of a study that are shown.
_SHOWN = ("uid", "state", "since", "received", "images", "passed_over", "what", "do", "lesions", "lesion_ml", "tries")
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    ".refused,.failed{color:#b00020}.done{color:#1b6e3c}code{font-size:12px}"
)


class StatusServer:
    """Serves GET / (a page), /status.json and /health (200 once the networks are loaded)."""

    def __init__(self, host: str, port: int, spool: Spool, is_ready: Callable[[], bool]) -> None:
        self._spool, self._is_ready = spool, is_ready
        self._socket = open_listening_socket(host, port)
        self.port: int = self._socket.getsockname()[1]
        most = max_connections()
        config = uvicorn.Config(
            self._application,
            http=limited_protocol_class(most),
            backlog=most,
            log_config=None,
            access_log=False,
            interface="asgi3",
            lifespan="off",
            ws="none",
        )
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addFilter(RateLimitFilter())
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="status", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(5.0)

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        code, kind, text = self.answer(scope["method"], scope["path"])
        body = text.encode(errors="replace")
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
        ]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def answer(self, method: str, path: str) -> tuple[int, str, str]:
        """Return status, content type and text of a response."""
        if method not in ("GET", "HEAD"):
            return 405, "text/plain", "GET only\n"
        if path == "/health":
            ready = self._is_ready()
            return (200 if ready else 503), "application/json", json.dumps({"status": "ready" if ready else "loading"})
        if path == "/status.json":
            return 200, "application/json", json.dumps({"studies": [_shown(study) for study in self._spool.studies()]})
        if path == "/":
            return 200, "text/html; charset=utf-8", self._page()
        return 404, "text/plain", "not here\n"

    def _page(self) -> str:
        studies = self._spool.studies()
        counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(s.state for s in studies).items()))
        rows = "".join(_row(study) for study in studies)
        return (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="10">'
            f"<title>Studies</title><style>{_STYLE}</style></head><body><h1>Studies: {counts or 'none'}</h1>"
            f"<p>isles-ensemble {escape(__version__)}; {self._spool.used_bytes / 1e9:.2f} GB of images in the spool;"
            f' the same for programs: <a href="status.json">status.json</a></p><p>{escape(RESEARCH_USE)}</p>'
            "<table><tr><th>study</th><th>state</th><th>since (UTC)</th><th>images</th><th>lesions</th><th>ml</th>"
            f"<th>why</th></tr>{rows}</table></body></html>"
        )


def _shown(study: StudyJournal) -> dict[str, Any]:
    told = asdict(study)
    sent = {to: len(instances) for to, instances in study.sent.items()}
    return {name: told[name] for name in _SHOWN} | {"sent": sent, "turned_away": len(study.turned_away)}


def _row(study: StudyJournal) -> str:
    why = "; ".join(filter(None, (study.what, study.do)))
    ml = "" if study.lesion_ml is None else f"{study.lesion_ml:.2f}"
    lesions = "" if study.lesions is None else str(study.lesions)
    cells = (f"<code>{escape(study.uid)}</code>", f'<span class="{study.state}">{study.state}</span>')
    plain = (study.since, str(study.images), lesions, ml, why)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, *map(escape, plain))) + "</tr>"


def check_ports(*ports: int) -> None:
    """Raise UsageError if two servers would use the same port."""
    given = [port for port in ports if port]
    if len(set(given)) < len(given):
        raise UsageError(
            "--port and --status-port have the same number", found=str(given[0]), do="choose two different ports"
        )
