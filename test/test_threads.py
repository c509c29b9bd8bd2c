"""Thread pools follow what the process is granted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from ensemble import threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({}, 8),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_the_tighter_of_affinity_and_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "_QUOTA_V2", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_QUOTA_V1", tmp_path / "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.available_processors() == expected


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in threads.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: None)
    threads.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OPENBLAS_NUM_THREADS"] == str(threads.MAX_THREADS)


def test_threads_wait_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*threads.VARIABLES, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(variable, "1")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    threads.limit_threads()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    threads.limit_threads()
    assert os.environ["GOMP_SPINCOUNT"] == threads.OMP_SPIN_COUNT


def test_the_entrypoint_sets_them_before_numpy_is_there() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['process.py', '--version']\n"
        "import ensemble.threads as p\n"
        "def spy():\n    assert 'numpy' not in sys.modules\n    print('limited')\n"
        "p.limit_threads = spy\nrunpy.run_path('process.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("limited"), done.stderr
