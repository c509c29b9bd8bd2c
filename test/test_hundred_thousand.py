"""The simulation of a large batch on a cluster: what can be computed by hand comes out, and the page of the guide says what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.hundred_thousand import COSTS, NODES, WAYS, Assumed, simulate, sizes, table
from conftest import REPOSITORY

#: Nothing by chance, one core a node, and a file system that costs no time.
PLAIN = Assumed(cores=1, spread=0.0, operations_s=1e12, latency_s=0.0, node_hours=1e12)
MADE_UP: dict[str, Any] = {
    "case_cpu_s": 36.0,
    "start_cpu_s": 10.0,
    "operations_a_case": 100.0,
    "operations_to_find_a_case": {"tree": 20.0, "worklist": 0.0, "list": 0.0},
}
LIST, WORKLIST, RAY, TREE = WAYS


def test_one_worker_takes_what_the_cases_take() -> None:
    for way, starts in ((LIST, 2), (TREE, 2), (WORKLIST, 2), (RAY, 1)):  # 200 cases are two hours: two tasks
        told = simulate(200, 1, way, MADE_UP, PLAIN)
        assert told.hours * 3600 == pytest.approx(200 * 36 + starts * 10, abs=11)
        assert told.busy > 0.99
        assert told.losses == 0


def test_ray_shares_evenly_and_an_array_as_chance_and_the_number_of_its_tasks_will() -> None:
    even, array = (simulate(10_000, 200, way, MADE_UP, PLAIN) for way in (RAY, WORKLIST))
    assert even.hours * 3600 == pytest.approx(10 + 50 * 36, rel=1e-3)
    assert array.hours > 1.2, "of a hundred tasks of an hour, the largest share is what the last one waits for"
    assert array.busy < 0.45, "a hundred of two hundred workers have nothing"


def test_a_file_system_that_can_do_no_more_decides_how_long_it_takes() -> None:
    slow = replace(PLAIN, operations_s=50.0)
    told = simulate(2000, 100, RAY, MADE_UP, slow)
    assert told.hours * 3600 == pytest.approx(2000 * (100 + 20) / 50, rel=0.02)
    assert told.server > 0.98
    # the folders are looked through once before the array, which then has a list
    once, never = simulate(2000, 20, LIST, MADE_UP, slow), simulate(2000, 20, WORKLIST, MADE_UP, slow)
    assert once.hours - never.hours == pytest.approx(20 * 2000 / 50 / 3600, rel=0.02)
    # else each of the 20 tasks looks through all folders
    assert simulate(2000, 20, TREE, MADE_UP, slow).hours > 20 * 2000 * 20 / 50 / 3600
    assert simulate(2000, 20, WORKLIST, MADE_UP, slow).hours < 2


def test_an_answer_takes_its_time_also_when_nobody_else_asks() -> None:
    late = replace(PLAIN, latency_s=0.01)
    assert simulate(100, 1, RAY, MADE_UP, late).hours * 3600 == pytest.approx(20 + 10 + 100 * (36 + 1))


def test_nodes_that_die_cost_time_and_no_case() -> None:
    for way in WAYS:
        told = simulate(2000, 10, way, MADE_UP, replace(PLAIN, node_hours=0.5))
        assert 20 < told.losses < 80
        assert told.busy * told.hours * 10 == pytest.approx(2000 * 36 / 3600), "each case counts once"


def test_the_page_says_what_the_simulation_says() -> None:
    page = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    costs = json.loads(COSTS.read_text())
    lines, _ = table(100_000, costs, Assumed(), NODES[-1:])
    for line in (*lines, *sizes(100_000, costs, Assumed())):
        assert line in page, "python -m benchmarks.hundred_thousand"
    assert costs["date"] in page
