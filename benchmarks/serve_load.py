"""The server under load and from cold: start to ready by its parts, latencies of many calls, and memory.

    python -m benchmarks.serve_load [--calls 200] [--minutes 20] [--input DIR] [any other option of `process.py serve`]

Starts `process.py serve` on loopback, waits for GET /health to answer 200, calls POST /invoke with the same case again and again (the
sample case without mirroring unless told otherwise), and prints what it took. Memory is the resident set of the server and its worker
together. Exit code 1 when a call fails, when memory after the last call exceeds that after the tenth by 50 MB or more, or when the last
quarter of the calls is slower than the calls 2 to a quarter by more than a third (medians).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_GROWTH_MB = 50


def main() -> int:
    """Run the load test; the exit code says whether it held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=20, help="stop calling after this long")
    parser.add_argument("--input", type=Path, default=ROOT / "test" / "sample" / "input")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / "log", str(Path(folder) / "output")
        command = [sys.executable, str(ROOT / "process.py"), "serve", "--host", "127.0.0.1", "--port", "0"]
        command += ["--input", str(options.input), "--output", output, *(more or ["--tta", "none"])]
        started = time.perf_counter()
        with log.open("wb") as stream, subprocess.Popen(command, stdout=stream) as server:
            try:
                port = _port(server, log)
                bound = time.perf_counter() - started
                _print_start(port, bound, started)
                return _load(server, port, options.calls, options.minutes * 60)
            finally:
                server.terminate()
                server.wait()


def _print_start(port: int, bound: float, started: float) -> None:
    print(f"listening after {bound:.1f} s")
    while (answer := _ask(port, "GET", "/health"))[0] != 200:
        pass
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in answer[1]["seconds"].items())
    print(f"cold start to 200: {time.perf_counter() - started:.1f} s ({parts})")


def _load(server: subprocess.Popen[bytes], port: int, calls: int, most_seconds: float) -> int:
    seconds: list[float] = []
    memory: list[float] = []
    until = time.perf_counter() + most_seconds
    while len(seconds) < calls and time.perf_counter() < until:
        started = time.perf_counter()
        status, body = _ask(port, "POST", "/invoke")
        seconds.append(time.perf_counter() - started)
        memory.append(_resident_mb(server.pid))
        if status != 201:
            print(f"call {len(seconds)} failed: {status} {body}")
            return 1
        if len(seconds) in (1, 2, 10) or len(seconds) % 25 == 0:
            print(f"call {len(seconds)}: {seconds[-1]:.2f} s, {memory[-1]:.0f} MB", flush=True)
    if len(seconds) < max(20, calls):
        print(f"time is up after {len(seconds)} of {calls} calls")
    ordered, quarter = sorted(seconds[1:]), len(seconds) // 4
    first, last = statistics.median(seconds[1 : quarter + 1]), statistics.median(seconds[-quarter:])
    growth = memory[-1] - memory[min(9, len(memory) - 1)]
    print(
        f"{len(seconds)} calls: first {seconds[0]:.2f} s, then median {statistics.median(ordered):.2f} s,"
        f" 95 % {ordered[int(0.95 * len(ordered))]:.2f} s, slowest {ordered[-1]:.2f} s"
    )
    print(f"median of the first quarter {first:.2f} s, of the last {last:.2f} s")
    print(f"memory: {memory[-1]:.0f} MB, {growth:+.0f} MB since the tenth call (limit {MAX_GROWTH_MB} MB)")
    return int(growth >= MAX_GROWTH_MB or last > first * 4 / 3)


def _port(server: subprocess.Popen[bytes], log: Path) -> int:
    while server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("listening on"):
                return int(line.rsplit(":", 1)[1])
        time.sleep(0.01)
    raise SystemExit(f"the server ended before it listened:\n{log.read_text()}")


def _ask(port: int, method: str, path: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def _resident_mb(pid: int) -> float:
    """Of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in [str(pid), *children])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    sys.exit(main())
