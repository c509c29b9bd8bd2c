"""Batches on Ray: several nodes on this machine, one of which is taken away; processes that die; and what is said without Ray."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from batch_runs import comparable, run_batch, write_dataset
from ensemble.batch import on_ray

#: The acceptance run has 300.
CASES = int(os.environ.get("CLUSTER_CASES", "9"))
pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((on_ray._LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, at a loopback address."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    for name, value in on_ray._SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parent.parent}")
    monkeypatch.setattr(on_ray, "_LOOK_S", 0.2)

    def common() -> dict[str, Any]:
        # ports that are told are not waited for: on a busy machine a node's own processes take longer to start than Ray waits
        ports = free_ports(4)
        names = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port", "metrics_export_port")
        return {
            "include_dashboard": False,
            "node_ip_address": on_ray._LOOPBACK,
            "object_store_memory": 80 * 2**20,
            **dict(zip(names, ports, strict=True)),
        }

    made = Cluster()
    try:
        made.removable = [started(made, **common()) for _ in range(2)][1]
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def started(made: Any, **settings: Any) -> Any:
    """A node of one CPU. Ray gives its own processes 15 seconds to start, which is little on a busy machine: three attempts."""
    for _ in range(3):
        try:
            return made.add_node(num_cpus=1, **settings)
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    pytest.skip("this machine is too busy for Ray to start a node in the time that it allows")


def test_a_cluster_that_loses_a_node_makes_what_one_process_makes(tmp_path: Path, weights: Path, cluster: Any) -> None:
    data, out, whole, diary = (
        write_dataset(tmp_path / "data", good=CASES),
        tmp_path / "out",
        tmp_path / "whole",
        tmp_path / "d",
    )
    assert run_batch(data, whole, weights) == 5

    def take_away() -> None:
        deadline = time.monotonic() + 120 + 2 * CASES
        while len(list(out.glob("sub-*/report.json"))) < CASES // 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        cluster.remove_node(cluster.removable, allow_graceful=False)

    thief = threading.Thread(target=take_away)
    thief.start()
    assert run_batch(data, out, weights, ray=cluster.address, ray_cpus=1, seconds=0.1, diary=diary) == 5
    thief.join()
    assert comparable(out, device=False) == comparable(whole, device=False)
    asked = Counter(diary.read_text().splitlines())
    assert len(asked) == CASES + 1
    assert sum(asked.values()) <= CASES + 1 + on_ray._AT_A_TIME, (
        "what the lost node had in work, at most, was done again"
    )
