"""Compare two workers of one thread with one.

    python -m benchmarks.workers --work SCRATCH [--cases 14] [--ways one,calls,ray] [--tta none] [--niceness -20]

The same copies of the sample case, each way in processes of its own, which may use as many cores as there are workers: `one` worker;
two `calls` of `batch` on one output folder, as a SLURM array makes them; two actors of a `ray` cluster of this machine. For each: seconds,
and CPU seconds of all its processes, Ray's own among them; to the end of as many cases as there are workers (start), and from there on,
a case.

Wall time means something on an idle machine only, and there the ratio of the rates is the answer. On a loaded one CPU seconds tell: two
workers that take no more of them for a case have twice the rate wherever each has a core, unless they wait for each other. That they don't,
idle cores tell: there are none. `--niceness` below 0 (as root) puts the processes before others'. Exit code 1 where two workers need
15 % more CPU seconds a case than one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.batch_throughput import write_copies

WAYS = ("one", "calls", "ray")
MOST = 1.15
_MARK, _LOOK_S = "BENCHMARK_MARK", 0.1
_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    options = _options()
    if options.child:
        sys.exit(_child(json.loads(options.child)))
    told = measure(options.ways, options.cases, options.work, ["--tta", options.tta], options.niceness)
    print(json.dumps({"machine": machine(), "cases": options.cases, "tta": options.tta, "ways": told}, indent=1))
    sys.exit(max(one.get("cpu_ratio", 0) for one in told.values()) > MOST)


def measure(
    ways: Sequence[str], cases: int, work: Path, options: Sequence[str], niceness: int = 0
) -> dict[str, dict[str, float]]:
    """Return what each way takes; beside `one`, where that is among them, the ratio of CPU seconds and of rates."""
    write_copies(work / "data", cases)
    told = {way: _measure(way, work, options, niceness) for way in ways}
    for way in set(told) - {"one"} if "one" in told else ():
        told[way]["cpu_ratio"] = round(told[way]["cpu_s_a_case"] / told["one"]["cpu_s_a_case"], 3)
        told[way]["rate_ratio"] = round(told["one"]["s_a_case"] / told[way]["s_a_case"], 3)
    return told


def machine() -> str:
    """Return the processor's name and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown processor")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _measure(way: str, work: Path, options: Sequence[str], niceness: int) -> dict[str, float]:
    """Run one configuration and return its costs."""
    out, workers, load = work / "out", 1 if way == "one" else 2, os.getloadavg()[0]
    shutil.rmtree(out, ignore_errors=True)
    mark = uuid4().hex
    job = json.dumps(
        {"way": way, "workers": workers, "data": str(work / "data"), "out": str(out), "options": list(options)}
    )
    cores = sorted(os.sched_getaffinity(0))[:workers]

    def confine() -> None:
        os.sched_setaffinity(0, cores)
        if niceness:
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
            with suppress(OSError):  # where Linux shares time among sessions first, it is theirs that counts
                Path("/proc/self/autogroup").write_text(str(niceness))

    started = time.time()
    calls = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", "--child", job],
            env=os.environ | {"OMP_NUM_THREADS": "1", _MARK: mark},
            stdout=subprocess.DEVNULL,
            preexec_fn=confine,
            start_new_session=True,
        )
        for _ in range(workers if way == "calls" else 1)
    ]
    used: dict[int, float] = {}
    seen = [(started, 0.0, _idle(cores))]
    while any(call.poll() is None for call in calls):
        used |= _cpu_seconds(mark, used)
        seen.append((time.time(), sum(used.values()), _idle(cores)))
        time.sleep(_LOOK_S)
    if any(call.returncode for call in calls):
        sys.exit(f"{way}: exit codes {[call.returncode for call in calls]}")
    done = sorted(path.stat().st_mtime for path in out.glob("sub-*/report.json"))
    first, last = (next(look for look in seen if look[0] >= at) for at in (done[workers - 1], done[-1]))
    counted = len(done) - workers
    return {
        "workers": workers,
        "load_before": round(load, 1),
        "wall_s": round(seen[-1][0] - started, 1),
        "cpu_s": round(seen[-1][1], 1),
        "start_s": round(first[0] - started, 1),
        "start_cpu_s": round(first[1], 1),
        "s_a_case": round((last[0] - first[0]) / counted, 3),
        "cpu_s_a_case": round((seen[-1][1] - first[1]) / counted, 3),
        "cores_had": round((last[1] - first[1]) / (last[0] - first[0]), 2),
        "cores_idle": round((last[2] - first[2]) / (last[0] - first[0]), 2),
    }


def _idle(cores: Sequence[int]) -> float:
    """Return for how long (s) these cores had nothing to do."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return sum(int(line[4]) + int(line[5]) for line in lines if line[0] in {f"cpu{core}" for core in cores}) / _TICK


def _cpu_seconds(mark: str, known: Mapping[int, float]) -> dict[int, float]:
    """Return what each living process that bears the mark has used; children that ended are their own entries."""
    found = {}
    for pid in _marked(mark, known):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = (int(fields[11]) + int(fields[12])) / _TICK
    return found


def _marked(mark: str, known: Mapping[int, float]) -> Iterator[int]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if int(path.name) in known or f"{_MARK}={mark}".encode() in (path / "environ").read_bytes():
                    yield int(path.name)
            except OSError:
                continue


def _child(job: Mapping[str, Any]) -> int:
    """Segment what is there, in one of the ways."""
    from ensemble.cli import main as command

    words = ["batch", job["data"], job["out"], "--device", "cpu", *job["options"]]
    if job["way"] == "ray":
        import ray as cluster

        from ensemble.batch import on_ray

        os.environ.update(on_ray._SETTINGS)
        cluster.init(address="local", num_cpus=job["workers"], log_to_driver=False, **on_ray.OWN_CLUSTER)
        words += ["--ray", "--ray-cpus", "1"]
    return command(words)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="two workers of one thread beside one")
    parser.add_argument("--work", type=Path, help="scratch folder outside the repository")
    parser.add_argument("--cases", type=int, default=14)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS), help=",".join(WAYS))
    parser.add_argument("--tta", choices=("mirror", "gated", "none"), default="none")
    parser.add_argument("--niceness", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.child and options.work is None:
        parser.error("--work is needed")
    return options


if __name__ == "__main__":
    main()
