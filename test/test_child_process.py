"""A process that works for a parent is set up like the parent, cleans up when it must end, and does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from child_processes import fail, report, sleep, start, talk_to_nobody
from conftest import REPOSITORY
from ensemble.serve import worker


def test_it_keeps_freed_memory_logs_and_leaves_ctrl_c_to_the_parent(capfd: pytest.CaptureFixture[str]) -> None:
    process, pipe = start(report)
    faults, deaf = pipe.recv()
    process.join()
    assert process.exitcode == 0
    assert faults < 1000, "16384 pages of 4 KiB would have been mapped anew"
    assert deaf
    said = capfd.readouterr().out
    assert "a detail" in said
    assert "small talk" not in said


def test_a_bug_is_told_and_gives_1(capfd: pytest.CaptureFixture[str]) -> None:
    process, _ = start(fail)
    process.join()
    assert process.exitcode == 1
    assert "ZeroDivisionError" in capfd.readouterr().out


def test_a_parent_that_has_gone_is_no_bug(capfd: pytest.CaptureFixture[str]) -> None:
    process, _ = start(talk_to_nobody)
    process.join()
    assert process.exitcode == 1
    assert capfd.readouterr().out == ""


def test_sigterm_ends_it_as_an_error_would() -> None:
    process, pipe = start(sleep)
    pipe.recv()
    process.terminate()
    assert pipe.recv() == "cleaned up"
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM


def test_it_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import child_processes as t\nif __name__ == '__main__':\n"
        "    process, pipe = t.start(t.sleep)\n    print(pipe.recv(), flush=True)\n    process.join()\n"
    )
    paths = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'test'}"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | paths)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_the_server_hosts_its_process_by_this(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    monkeypatch.setattr(worker, "run_child", lambda work, level: levels.append(level))
    worker.serve_requests(None, worker.WorkerConfig(None, None, None, log_level=7))  # type: ignore[arg-type]
    assert levels == [7]
