"""What the driver of a batch on Ray does when processes die, a case is held, or nobody is there: with a stand-in for Ray."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from batch_runs import rows, run_batch, write_case
from conftest import tree
from ensemble.batch import on_ray, run
from ensemble.batch.case_loop import CaseOutcome
from ensemble.errors import MembersFailed, UsageError, UserError, WeightsBroken
from ensemble.options import parse_options

Behaviour = Callable[[str, int], Any]


class Died(Exception):
    """An actor's process has died."""


class Stand:
    """As much of Ray as the driver uses: calls are carried out when they are asked about, one node a name."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=type("Bug", (Exception,), {}))

    def __init__(self, behave: Behaviour, nodes: dict[str, dict[str, float]], ready: Any = None) -> None:
        self.behave, self._nodes, self._ready = behave, nodes, ready
        self.asked: Counter[str] = Counter()
        self.together: list[tuple[str, ...]] = []
        self.options_of: list[dict[str, Any]] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True, "Resources": resources} for name, resources in self._nodes.items()]

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, **options: Any) -> Any:
        self.options_of.append(options)
        return SimpleNamespace(remote=lambda *arguments: self._actor())

    def _actor(self) -> Any:
        queue: list[str] = []

        def segment(placed: Any) -> Callable[[], Any]:
            name = placed[0].name
            queue.append(name)
            self.together.append(tuple(queue))

            def answer() -> Any:
                queue.remove(name)
                self.asked[name] += 1
                return self.behave(name, self.asked[name])

            return answer

        calls = {"ready": lambda: lambda: self._ready, "segment": segment, "leave": lambda: lambda: None}
        return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})

    def wait(self, asked: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        return asked[:num_returns], asked[num_returns:]

    def get(self, answer: Callable[[], Any]) -> Any:
        said = answer()
        if isinstance(said, Died):
            raise said
        return said

    def kill(self, actor: Any) -> None:
        pass


@pytest.fixture
def on_stand(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Stand, Callable[[], int]]]:
    """Gives a stand-in, and a batch of the cases a to d on it."""
    monkeypatch.setattr(on_ray, "_only_on", lambda node: node)
    for name in "abcd":
        write_case(tmp_path / "data" / name)
    monkeypatch.setattr(on_ray, "_HELD_S", 0.0)
    monkeypatch.setattr(on_ray, "_LOOK_S", 0.0)

    def make(behave: Behaviour, nodes: dict[str, dict[str, float]] | None = None, ready: Any = None) -> Any:
        stand = Stand(behave, nodes or {"n": {"CPU": 1.0}}, ready)

        @contextmanager
        def connected(address: str) -> Iterator[Stand]:
            yield stand

        monkeypatch.setattr(on_ray, "_connected", connected)
        return stand, lambda: run_batch(tmp_path / "data", tmp_path / "out", weights, ray="auto")

    return make


def done(name: str, attempt: int) -> CaseOutcome:
    return CaseOutcome(name, "done")


def test_a_process_that_dies_costs_a_retry(tmp_path: Path, on_stand: Any) -> None:
    def behave(name: str, attempt: int) -> CaseOutcome:
        if name == "b" and attempt == 1:
            raise Died("the node died")
        return done(name, attempt)

    stand, start = on_stand(behave)
    assert start() == 0
    assert stand.asked == Counter(a=1, b=2, c=1, d=1) or stand.asked == Counter(a=2, b=2, c=1, d=1)
    assert len(stand.options_of) == 2, "another actor in its place"
    assert max(map(len, stand.together)) == on_ray._AT_A_TIME


def test_the_last_cases_do_not_wait_behind_others(on_stand: Any) -> None:
    """One actor must not hold two cases while another, which may still load its networks, has none."""
    stand, start = on_stand(done, {name: {"CPU": 1.0} for name in ("n", "m", "l")})
    assert start() == 0
    assert stand.asked == Counter("abcd")
    assert sum(len(queue) > 1 for queue in stand.together) <= 1, "of four cases on three actors, one is a second one"


def test_a_case_that_kills_each_process_fails_alone(tmp_path: Path, on_stand: Any) -> None:
    def behave(name: str, attempt: int) -> CaseOutcome:
        if name == "b":
            raise Died("Worker exit type: NODE_OUT_OF_MEMORY")
        return done(name, attempt)

    stand, start = on_stand(behave)
    assert start() == 137
    found = rows(tmp_path / "out")
    assert [case for case, row in found.items() if row["status"] == "failed"] == ["b"]
    assert "died 3 times" in found["b"]["message"]
    assert "NODE_OUT_OF_MEMORY" in found["b"]["message"]
    assert stand.asked["b"] == 3
    assert [queue for queue in stand.together if "b" in queue][-1] == ("b",), "a suspect goes alone"


def test_the_only_process_may_die_between_two_looks(on_stand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one GPU nobody is left for a moment, which ended the batch unless a look at the nodes was just due."""
    monkeypatch.setattr(on_ray, "_LOOK_S", 0.05)
    stand, start = on_stand(lambda name, attempt: Died("killed") if attempt == 1 else done(name, attempt))
    assert start() == 0
    assert set(stand.asked) == set("abcd")


def test_a_case_that_somebody_else_has_is_asked_for_again(on_stand: Any) -> None:
    stand, start = on_stand(lambda name, attempt: None if name == "c" and attempt < 4 else done(name, attempt))
    assert start() == 0
    assert stand.asked["c"] == 4


@pytest.mark.parametrize("error", [WeightsBroken("torn"), UsageError("a node does not see the output folder")])
def test_what_no_case_can_help_ends_the_batch(tmp_path: Path, on_stand: Any, error: UserError) -> None:
    for behave, ready in ((done, error), (lambda name, attempt: error, None)):
        _, start = on_stand(behave, ready=ready)
        with pytest.raises(type(error)):
            start()
    assert not (tmp_path / "out" / ".batch").exists()


def test_a_cluster_without_room_or_whose_processes_all_die_is_told(on_stand: Any) -> None:
    _, start = on_stand(done, {"head": {"CPU": 0.0}})
    with patch.object(on_ray, "_PATIENCE_S", 0.0), pytest.raises(MembersFailed, match="no worker process is left"):
        start()
    stand, start = on_stand(done, ready=Died("no module named ensemble"))
    with pytest.raises(MembersFailed, match="no worker process is left") as told:
        start()
    assert told.value.found == "no module named ensemble"
    assert len(stand.options_of) == on_ray._LIVES


def test_nodes_get_an_actor_for_each_gpu_or_for_some_cpus(tmp_path: Path, on_stand: Any) -> None:
    stand, start = on_stand(done, {"n": {"CPU": 2.0}, "m": {"CPU": 1.0}, "head": {"CPU": 0.0}})
    assert start() == 0
    assert [options["num_cpus"] for options in stand.options_of] == [1, 1, 1]
    nodes = {"n": {"CPU": 16.0, "GPU": 2.0}, "m": {"CPU": 8.0}}
    for device, expected in (("auto", [(4, 1), (4, 1)]), ("cpu", [(4, 0)] * 6)):
        stand, _ = on_stand(done, nodes)
        config = SimpleNamespace(device=device)
        job = SimpleNamespace(config=config)
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(on_ray, "replace", lambda thing, **changes: SimpleNamespace(**{**vars(thing), **changes}))
            on_ray._Fleet(stand, job, None, tmp_path, 4)  # type: ignore[arg-type]
        assert [(options["num_cpus"], options["num_gpus"]) for options in stand.options_of] == expected


def test_without_ray_it_is_said_how_to_get_it(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ensemble")
    write_case(tmp_path / "data" / "a")
    for module in (on_ray, run):
        monkeypatch.setattr(module, "is_ray_installed", lambda: False)
    with pytest.raises(UsageError, match="not installed") as told:
        run_batch(tmp_path / "data", tmp_path / "out", weights, ray="local")
    assert "pip install" in told.value.do
    monkeypatch.setattr(run, "gpu_count", lambda device: 2)
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 0
    assert "one of 2 GPUs works. All do with Ray (pip install ray)" in caplog.text
    assert "CUDA_VISIBLE_DEVICES=1 python process.py batch ..., and so on" in caplog.text
    assert ".batch" not in tree(tmp_path / "out")


def test_several_gpus_use_ray(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path / "data" / "a")
    asked: list[Any] = []
    monkeypatch.setattr(run, "gpu_count", lambda device: 2)
    monkeypatch.setattr(run, "is_ray_installed", lambda: True)
    monkeypatch.setattr(run, "segment_on_ray", lambda address, cpus, *rest: asked.append(address))
    run_batch(tmp_path / "data", tmp_path / "out", weights)
    assert asked == [on_ray.LOCAL]


def test_the_address_is_read_and_a_folder_is_none() -> None:
    for words, address in (
        ([], None), (["--ray"], "local"), (["--ray", "auto"], "auto"), (["--ray", "10.0.0.1:6379"], "10.0.0.1:6379"),
        (["--ray", "head.site:6379", "--ray-cpus", "2"], "head.site:6379"), (["--ray", "ray://h:10001"], "ray://h:10001"),
    ):  # fmt: skip
        assert parse_options(["batch", "d", "o", *words], {}).ray == address
    for words in (["--ray", "d", "o"], ["d", "o", "--ray", "somewhere"], ["d", "o", "--ray-cpus", "0"]):
        with pytest.raises(UsageError, match="--ray"):
            parse_options(["batch", *words], {})
