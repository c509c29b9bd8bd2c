"""What would a hundred thousand studies take on a cluster, and where does it stop to scale?

    python -m benchmarks.hundred_thousand [--cases 100000] [--plot FILE]      simulate; prints the tables of docs/cluster.md
    python -m benchmarks.hundred_thousand --measure [cases search files group] --work SCRATCH [--niceness -15]      write costs.json anew

Measured (`costs.json`), on copies of the sample case: CPU seconds of a case with one worker and two, and until a worker is ready; files
and bytes of a case; operations on a file system, counted by strace: calls that name a path below data set or results (an upper bound:
clients of network file systems remember some answers), `fsync`, `flock`; size and CPU seconds of a list of made-up cases; seconds and
memory of summary and page. Assumed: what stands in `Assumed`.

The simulation is one of discrete events. Workers compute for themselves and share one queue: that of the metadata server. Tasks of an
array read a list first, or look through the whole data set, then work on their share; actors of a Ray cluster get one case after the
other. Nodes die by chance; a task is requeued, an actor's case goes to another.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from benchmarks import summary_scale, workers
from benchmarks.batch_throughput import write_copies
from ensemble.batch.case_list import write_case_list
from ensemble.batch.find import find_cases
from ensemble.batch.layouts import FoundCase
from ensemble.batch.run import BatchCases
from ensemble.batch.selection import CaseSelection
from ensemble.batch.slurm import MOST_SHARDS
from ensemble.types import Modality

COSTS = Path(__file__).resolve().with_name("costs.json")
NODES = (1, 4, 16, 32, 64, 128)


@dataclass(frozen=True)
class Assumed:
    """What was not measured."""

    cores: int = 32
    """Workers of one thread on a node."""
    task_hours: float = 1.0
    spread: float = 0.35
    """Standard deviation of the logarithm of a case's seconds: matrices and slices differ between hospitals."""
    operations_s: float = 5000.0
    """What the metadata server answers in a second, to all."""
    latency_s: float = 0.0005
    """Latency of one answer of an idle server."""
    node_hours: float = 1000.0
    """Mean time until a node dies."""
    requeue_s: float = 300.0


@dataclass(frozen=True)
class Way:
    """How cases are given out."""

    name: str
    tasks: bool
    """In tasks of a SLURM array, a share each; else one after the other, to actors of a Ray cluster."""
    found: Literal["list", "tree", "worklist"]
    """Where each task finds the cases, and so how often the file system is asked for it. Before a list is written, and on Ray, the folders
    are looked through once."""


WAYS = (
    Way("SLURM, folders", True, "list"),
    Way("SLURM, worklist", True, "worklist"),
    Way("Ray, folders", False, "tree"),
    Way("--shard, no list", True, "tree"),
)


@dataclass(frozen=True)
class Told:
    """What came out."""

    hours: float
    """Until the last result is there."""
    busy: float
    """Share of the workers' time that went into cases."""
    server: float
    """Share of the time in which the metadata server had something to do."""
    losses: int


class _Server:
    """Answers one operation after the other, in the order in which they are asked."""

    def __init__(self, assumed: Assumed) -> None:
        self._assumed = assumed
        self._free, self.worked = 0.0, 0.0

    def asked(self, now: float, operations: float) -> float:
        """Return the time at which a number of operations of one process are answered."""
        service = operations / self._assumed.operations_s
        self._free = max(self._free, now) + service
        self.worked += service
        return max(self._free, now + operations * self._assumed.latency_s)


class _Step(IntEnum):
    """What a worker does next."""

    TAKE = 0
    """Get a share of the cases; without one it rests."""
    FIND = 1
    """Find the cases."""
    COMPUTE = 2
    WRITE = 3


def simulate(cases: int, nodes: int, way: Way, costs: Mapping[str, Any], assumed: Assumed, seed: int = 0) -> Told:
    """Simulate a number of cases on a number of nodes."""
    chance, server, workers = random.Random(seed), _Server(assumed), nodes * assumed.cores
    mean, start, operations = (costs[name] for name in ("case_cpu_s", "start_cpu_s", "operations_a_case"))
    asks = costs["operations_to_find_a_case"]
    once, find = asks["tree"] * cases * (way.found == "list" or not way.tasks), asks[way.found] * cases
    tasks = min(max(1, math.ceil(cases * mean / 3600 / assumed.task_hours)), MOST_SHARDS)
    shares = Counter(chance.randrange(tasks) for _ in range(cases))  # by a digest of the name, so by chance
    waiting = [shares[task] for task in range(tasks)] if way.tasks else [1] * cases
    at_first = server.asked(0.0, once) + start * (not way.tasks)
    events = [(at_first, number, _Step.TAKE, 0) for number in range(workers)]
    worked, ended, losses = 0.0, 0.0, 0
    while events:
        now, worker, step, left = heapq.heappop(events)
        if step is _Step.FIND:
            heapq.heappush(events, (server.asked(now, find), worker, _Step.COMPUTE, left))
            continue
        if step is _Step.WRITE:
            ended, left = server.asked(now, operations), left - 1
            heapq.heappush(events, (ended, worker, _Step.COMPUTE if left else _Step.TAKE, left))
            continue
        if step is _Step.TAKE:
            if not waiting:
                continue
            left = waiting.pop()
            if way.tasks:
                heapq.heappush(events, (now + start, worker, _Step.FIND, left))
                continue
        seconds = mean * chance.lognormvariate(-(assumed.spread**2) / 2, assumed.spread)
        if (
            chance.random() < seconds / 3600 / assumed.node_hours
        ):  # its node dies, and with it each of its workers' cases
            losses += 1
            waiting.append(left)
            heapq.heappush(events, (now + seconds / 2 + assumed.requeue_s, worker, _Step.TAKE, 0))
            continue
        worked += seconds
        heapq.heappush(events, (now + seconds, worker, _Step.WRITE, left))
    return Told(ended / 3600, worked / ended / workers, server.worked / ended, losses)


def table(
    cases: int, costs: Mapping[str, Any], assumed: Assumed, nodes: Sequence[int] = NODES
) -> tuple[list[str], dict[str, list[Told]]]:
    """Return the lines of the table, in Markdown, and what was simulated, by way."""
    told = {way.name: [simulate(cases, count, way, costs, assumed) for count in nodes] for way in WAYS}
    lines = [f"| nodes | workers | {' | '.join(told)} |", f"| ---: | ---: | {' | '.join('---' for _ in told)} |"]
    for row, count in enumerate(nodes):
        cells = [
            f"{one[row].hours:.1f} h, {one[row].busy:.0%} busy, server {one[row].server:.0%}" for one in told.values()
        ]
        lines.append(f"| {count} | {count * assumed.cores} | {' | '.join(cells)} |")
    return lines, told


def sizes(cases: int, costs: Mapping[str, Any], assumed: Assumed) -> list[str]:
    """Return the lines of the table of what lies on the file system in the end, and of the last step."""
    of_list, group, growth = costs["list"], costs["group"], cases / costs["group"]["results"]
    asked = cases * (costs["operations_to_group_a_case"] + costs["operations_to_find_a_case"]["tree"])
    entries, size = (
        [cases * costs[f"{what}_a_case{kind}"] for kind in ("", "_report")] for what in ("entries", "bytes")
    )
    memory_mb = group["peak_mb"] + (cases - group["results"]) / 1000 * group["mb_a_thousand"]
    look = cases * costs["operations_to_find_a_case"]["tree"]
    rows = [
        ("CPU hours (single-threaded)", f"{cases * costs['case_cpu_s'] / 3600:,.0f}"),
        ("files and folders of results", f"{entries[0]:,.0f}; with `--report` {entries[1]:,.0f}"),
        ("additional files in `.batch/` while the batch runs", f"{2 * cases:,.0f} (a lock and a record per case)"),
        ("size of results", f"{size[0] / 1e9:,.1f} GB; with `--report` {size[1] / 1e9:,.0f} GB"),
        (
            "file system operations, without searching the dataset",
            f"{cases * costs['operations_a_case']:,.0f}",
        ),
        ("file system operations of one search of the dataset", f"{look:,.0f}"),
        (
            "list of cases that `slurm` writes",
            f"{cases / of_list['cases'] * of_list['mb']:.0f} MB; each task reads it in"
            f" {cases / of_list['cases'] * of_list['read_cpu_s']:.0f} CPU s",
        ),
        ("`group`", f"{growth * group['summary_cpu_s']:.0f} CPU s; {memory_mb:,.0f} MB of memory"),
        ("`group`, waiting for the file system", f"{asked * assumed.latency_s / 60:.0f} min"),
        ("`summary.csv`, `index.html`", f"{growth * group['csv_mb']:.0f} MB, {growth * group['page_mb']:.0f} MB"),
    ]
    return ["| quantity | for all studies |", "| --- | --- |", *(f"| {what} | {said} |" for what, said in rows)]


def plot(told: Mapping[str, Sequence[Told]], path: Path, nodes: Sequence[int] = NODES) -> None:
    """Plot the hours against the nodes, and the ideal hours without any bottleneck."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, one in told.items():
        axes.loglog(nodes, [each.hours for each in one], marker="o", label=name)
    first = min(one[0].hours * one[0].busy for one in told.values())
    axes.loglog(nodes, [first * nodes[0] / count for count in nodes], "k:", label="nothing but the cases")
    axes.set(xlabel="nodes", ylabel="hours", xticks=nodes, xticklabels=nodes)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=110)


# what is measured


def measure(parts: Sequence[str], work: Path, niceness: int) -> dict[str, Any]:
    """Return the costs of this machine: new ones of some parts. Minutes; `files` needs strace."""
    if "files" in parts and shutil.which("strace") is None:
        sys.exit("strace is needed: apt-get install strace")
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    for part in parts:
        costs |= PARTS[part](work / part, niceness)
    return costs | {"date": time.strftime("%Y-%m-%d"), "machine": workers.machine()}


def _of_cases(work: Path, niceness: int) -> dict[str, Any]:
    told = workers.measure(workers.WAYS[:2], 8, work, ["--tta", "mirror"], niceness)
    return {
        "options": "defaults of batch (all flips, findings, trust), one thread a worker, copies of the sample case",
        "case_cpu_s": told["calls"]["cpu_s_a_case"],
        "start_cpu_s": round(told["one"]["start_cpu_s"] - told["one"]["cpu_s_a_case"], 1),
        "workers": told,
    }


def _of_searches(work: Path, niceness: int) -> dict[str, Any]:
    few, more = (_looks(work / str(count), count) for count in (_FEW, _MORE))
    asked = {name: round((more[name] - few[name]) / (_MORE - _FEW), 2) for name in more}
    return {"operations_to_find_a_case": asked, "list": _made_up_list(work / "data", 100_000)}


def _made_up_list(data: Path, count: int) -> dict[str, float]:
    """Return the size of the list of so many made-up cases, and the CPU seconds in which a task has its share of them."""
    data.mkdir(parents=True, exist_ok=True)
    (data / "README").touch()
    places = [
        (name, data / name / "dwi" / name.replace("/", "_"))
        for name in map("sub-strokecase{:06}/ses-0001".format, range(count))
    ]
    cases = [FoundCase(name, {m: Path(f"{place}_{m}.nii.gz") for m in Modality}) for name, place in places]
    listed = write_case_list(cases, data, data.parent).path
    started = time.process_time()
    BatchCases(data, CaseSelection(shard=(1, 600)), case_list=listed).find(data.parent / "out")
    return {
        "cases": count,
        "mb": round(listed.stat().st_size / 1e6, 1),
        "read_cpu_s": round(time.process_time() - started, 1),
    }


def _looks(root: Path, count: int) -> dict[str, int]:
    """Return how often the file system is asked for the cases of a small data set, by where they are found."""
    shutil.rmtree(root, ignore_errors=True)
    data, out = root / "data", root / "out"
    write_copies(data, count)
    names = [f"p{number:03d}" for number in range(count)]
    rows = [",".join([name, *(f"data/{name}/{m}.mha" for m in Modality)]) for name in names]
    (root / "list.csv").write_text("\n".join([f"case,{','.join(Modality)}", *rows, ""]))
    listed = write_case_list(find_cases(data, out), data, root).path
    places = {
        "tree": f"Path({str(data)!r})",
        "worklist": f"Path({str(root / 'list.csv')!r})",
        "list": f"Path({str(data)!r}), case_list=Path({str(listed)!r})",
    }
    look = "from ensemble.batch.run import *; BatchCases({}).find(Path({!r}))"
    return {name: _operations(root, "-c", look.format(place, str(out))) for name, place in places.items()}


def _of_files(work: Path, niceness: int) -> dict[str, Any]:
    plain, report = (_left_by_a_case(work, options) for options in ([], ["--report"]))
    return plain | {f"{name}_report": report[name] for name in ("entries_a_case", "bytes_a_case")}


def _of_group(work: Path, niceness: int) -> dict[str, Any]:
    fewer, more = (summary_scale.measure(work, count) for count in (2_000, 20_000))
    growth = (more["peak_mb"] - fewer["peak_mb"]) / (more["results"] - fewer["results"]) * 1000
    return {"group": more | {"mb_a_thousand": round(growth, 2)}}


PARTS = {"cases": _of_cases, "search": _of_searches, "files": _of_files, "group": _of_group}
_FEW, _MORE = 2, 6
#: Calls that ask a server's metadata, and those that wait for it.
_ASKS = re.compile(
    rb" (?:open|openat|stat|lstat|newfstatat|statx|access|mkdir|rmdir|rename\w*|unlink\w*|getdents64|fsync|flock|chmod"
    rb"|readlink\w*|utimensat)\("
)


def _left_by_a_case(work: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return what a case leaves on the file system and how often it is asked: the difference between a small and a larger batch."""
    found, searches = [], _of_searches(work, 0)
    tree = searches["operations_to_find_a_case"]["tree"]
    for count in (_FEW, _MORE):
        root = work / str(count)
        folders = [str(root / "data"), str(root / "out")]
        segment = ["-m", "ensemble", "batch", *folders, "--device", "cpu", "--tta", "none", "--shard", "1/1", *options]
        in_batch = _operations(root, *segment)
        in_group = _operations(root, "-m", "ensemble", *folders, "group", "--skip-bids-validation")
        inner = [*(root / "out").glob("sub-*"), *(root / "out").glob("sub-*/**/*")]
        found.append((in_batch, in_group, len(inner), sum(path.stat().st_size for path in inner if path.is_file())))
    few, more = found
    batch, group, entries, size = ((b - a) / (_MORE - _FEW) for a, b in zip(few, more, strict=True))
    return {
        **searches,
        "operations_a_case": round(batch - tree, 1),
        "operations_to_group_a_case": round(group - tree, 1),
        "entries_a_case": entries,
        "bytes_a_case": round(size),
    }


def _operations(below: Path, *arguments: str) -> int:
    """Return how many operations of a Python program name something below a folder, or wait for its disk or locks."""
    log = below / "strace.log"
    calls = [
        "strace",
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-y",
        "-e",
        "trace=%file,%desc",
        "-o",
        str(log),
        sys.executable,
        *arguments,
    ]
    done = subprocess.run(calls, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, arguments
    lines = log.read_bytes().splitlines()  # attributes of a file that is open are at hand
    return sum(
        bool(_ASKS.search(line)) and os.fsencode(below) in line and b"AT_EMPTY_PATH" not in line for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="a hundred thousand studies, simulated from measured costs")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--plot", type=Path, help="also write the picture")
    parser.add_argument(
        "--measure", nargs="*", choices=PARTS, help="write costs.json instead, all of it or these parts"
    )
    parser.add_argument("--work", type=Path, help="with --measure: scratch folder outside the repository")
    parser.add_argument(
        "--niceness", type=int, default=0, help="with --measure: below 0 (as root) before others' processes"
    )
    options = parser.parse_args()
    if options.measure is not None:
        if options.work is None:
            parser.error("--measure needs --work")
        told = measure(options.measure or list(PARTS), options.work, options.niceness)
        COSTS.write_text(json.dumps(told, indent=1) + "\n")
        return
    costs, assumed = json.loads(COSTS.read_text()), Assumed()
    lines, told = table(options.cases, costs, assumed)
    print("\n".join([*lines, "", *sizes(options.cases, costs, assumed)]))
    if options.plot:
        plot(told, options.plot)


if __name__ == "__main__":
    main()
