"""`slurm DATASET OUT`: write a batch as a SLURM job array, one shard of the cases per task, and a final job that writes the summary."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ensemble
from ensemble.batch.case_list import write_case_list
from ensemble.batch.estimate import CostModel, estimate_case
from ensemble.batch.run import BatchCases
from ensemble.batch.selection import Placed
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import UsageError
from ensemble.folders import unwritable_error
from ensemble.members.manifest import find_members
from ensemble.outputs.layouts.bids import refuse_unsafe_output_folder
from ensemble.program import program_name
from ensemble.threads import VARIABLES, thread_variables

log = logging.getLogger(__name__)

ARRAY, GROUP, SUBMIT = "participant.sbatch", "group.sbatch", "submit.sh"
#: Number of cases whose headers are read for the estimate; seconds per case without an estimate; most tasks (SLURM's MaxArraySize: 1001).
_SAMPLE, _USUAL_SECONDS, MOST_SHARDS = 40, 60.0, 1000
#: Factors by which requested time and memory exceed the estimate.
_MARGIN_TIME, _MARGIN_MEMORY = 3.0, 1.5
_SET_UP = """\
set -euo pipefail
export {threads}
scratch=$(mktemp -d "${{TMPDIR:-/tmp}}/isles-ensemble-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch
"""
_ARRAY = """\
#!/bin/bash
# Written by `{program} slurm`. {submit} submits it. A task that is killed and requeued goes on where it ended.
# {cases}
#SBATCH --job-name=isles-ensemble
#SBATCH --array=1-{shards}
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem={memory_mb}M
#SBATCH --time={minutes}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/%A_%a.log
{directives}
{set_up}{command} batch {arguments} --shard "$SLURM_ARRAY_TASK_ID/{shards}"
"""
_GROUP = """\
#!/bin/bash
# Written by `{program} slurm`: the summary, when all tasks of the array have ended, well or not.
# {cases}
#SBATCH --job-name=isles-ensemble-group
#SBATCH --mem=4000M
#SBATCH --time=120
#SBATCH --output={logs}/group_%j.log
{directives}
{set_up}{command} {dataset} {out} group{group_words}
"""
_SUBMIT = """\
#!/bin/bash
# Written by `{program} slurm`. Submits the array, and the summary behind it; further options go to both calls of sbatch.
# {cases}
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
array=$(sbatch --parsable "$@" "$here/{array}")
array=${{array%%;*}}
group=$(sbatch --parsable --dependency="afterany:$array" "$@" "$here/{group}")
echo "{cases}"
echo "array $array, summary ${{group%%;*}}: squeue --job $array,${{group%%;*}}"
"""


@dataclass(frozen=True)
class SlurmResources:
    """The resources that one task of a SLURM job array requests."""

    shards: int | None = None
    """Number of tasks; None to choose it so that each takes about an hour."""
    cpus: int = 4
    gpu: bool = False
    memory_gb: float | None = None
    """Memory per task; None for 1.5 times the estimate."""
    hours: float | None = None
    """Time limit; None for three times the estimate."""
    apptainer: str = ""
    """Image file (.sif) or address that Apptainer runs; empty for none."""
    docker: str = ""
    """Image that Docker runs; empty for none."""


def write_scripts(
    dataset: BatchCases,
    out: Path,
    config: RunConfig,
    extras: ExtraOutputs,
    words: Sequence[str],
    resources: SlurmResources,
    folder: Path,
) -> None:
    """Write both jobs and the script that submits them into `folder`; `words` are the options passed to the tasks.

    A folder is searched here, once: the jobs read what was found from a list beside the scripts. Raises as `batch` does.
    """
    if resources.apptainer and resources.docker:
        raise UsageError("--apptainer and --docker can't be used together", do="give one of the two")
    refuse_unsafe_output_folder(out, dataset.path)
    dataset = replace(dataset, path=dataset.path.absolute())
    _, selected = dataset.find(out)
    model = CostModel.of(find_members(config.weights_folder, config.members), config, extras, "cpu", out)
    seconds, memory_mb = _expected(selected, out, model, resources)
    shards = resources.shards or min(max(1, math.ceil(seconds / 3600)), len(selected), MOST_SHARDS)
    hours = resources.hours or max(1.0, _MARGIN_TIME * seconds / shards / 3600)
    folder, results = folder.absolute(), out.absolute()
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        listed, cases = _listed(dataset.path, selected, folder)
    except OSError as error:
        raise unwritable_error(folder, error) from error
    of_group = [*listed, *(word for word in words if word == "--parquet")]
    words = [*words, *listed]
    parts = {
        "program": program_name(),
        "submit": SUBMIT,
        "array": ARRAY,
        "group": GROUP,
        "shards": shards,
        "cpus": resources.cpus,
        "set_up": _set_up(resources.cpus),
        "memory_mb": math.ceil((resources.memory_gb or _MARGIN_MEMORY * memory_mb / 1000) * 1000),
        "minutes": math.ceil(60 * hours),
        "logs": _in_directive(logs),
        "directives": "#SBATCH --gres=gpu:1" if resources.gpu else "#",
        "cases": cases,
        "group_words": "".join(f" {shlex.quote(word)}" for word in of_group),
        "dataset": shlex.quote(str(dataset.path)),
        "out": shlex.quote(str(results)),
        "arguments": shlex.join([str(dataset.path), str(results), *words]),
    }
    mounts = _mounts(dataset.path, selected, words)
    array = parts | {"command": _command(resources, mounts, results, gpu=resources.gpu)}
    group = parts | {
        "command": _command(resources, mounts, results, gpu=False),
        "directives": "#",
        "set_up": _set_up(1),
    }
    try:
        if resources.docker or resources.apptainer:
            results.mkdir(parents=True, exist_ok=True)  # a mounted folder must exist
        for name, text in (
            (ARRAY, _ARRAY.format(**array)), (GROUP, _GROUP.format(**group)), (SUBMIT, _SUBMIT.format(**parts))
        ):  # fmt: skip
            path = folder / name
            path.write_text(
                "\n".join(line for line in text.split("\n") if line != "#"), encoding="utf-8", errors="surrogateescape"
            )
            path.chmod(0o755)
    except OSError as error:
        raise unwritable_error(folder, error) from error
    log.info("%d cases in %d tasks of about %.1f h, %d CPUs, %d MB", len(selected), shards, seconds / shards / 3600, resources.cpus,
             parts["memory_mb"])  # fmt: skip
    log.info("%s", cases)
    log.info("check the scripts, then submit: %s", shlex.quote(str(folder / SUBMIT)))


def _listed(dataset: Path, selected: Sequence[Placed], folder: Path) -> tuple[list[str], str]:
    """Return the options by which the jobs take the cases that are found now, and a sentence on it for people. Raises OSError.

    A worklist is such a list already.
    """
    if not dataset.is_dir():
        return [], "The cases are those of the worklist."
    listed = write_case_list([case for case, _ in selected], dataset, folder)
    again = f"If any joined or were mended since, call {program_name()} slurm again."
    return ["--case-list", str(listed.path)], f"The cases are those of {listed.searched}. {again}"


def _expected(
    selected: Sequence[Placed], out: Path, model: CostModel, resources: SlurmResources
) -> tuple[float, float]:
    """Estimate from a sample the total time (s) of all cases, run one after the other, and the memory (MB) of the largest."""
    some = selected[:: max(1, len(selected) // _SAMPLE)]
    ready = [case for case in (estimate_case(placed, out, model) for placed in some) if case.problem is None]
    memory = max((case.memory_bytes / 1e6 for case in ready), default=2000.0)
    if resources.gpu or not ready:
        return _USUAL_SECONDS * len(selected), memory
    cpu = [model.cpu_seconds(case.size, case.spacing_mm) for case in ready]
    return sum(cpu) / len(cpu) * len(selected) / resources.cpus, memory


def _command(resources: SlurmResources, mounts: Iterable[str], out: Path, *, gpu: bool) -> str:
    """Return the command that runs the program, as shell words."""
    if resources.apptainer:
        binds = [word for place in mounts for word in ("--bind", f"{place}:{place}:ro")]
        words = ["apptainer", "run", *(["--nv"] if gpu else []), *binds, "--bind", f"{out}:{out}"]
        inside = '--bind "$scratch:/tmp" --env TMPDIR=/tmp'  # Apptainer passes on all other exported variables
        return f"{shlex.join(words)} {inside} {shlex.quote(resources.apptainer)}"
    if resources.docker:
        binds = [word for place in mounts for word in ("--volume", f"{place}:{place}:ro")]
        words = ["docker", "run", "--rm", "--network", "none", *binds, "--volume", f"{out}:{out}"]
        inside = '--user "$(id -u):$(id -g)" --volume "$scratch:/tmp" --env TMPDIR=/tmp'
        inside += "".join(f" --env {name}" for name in VARIABLES)
        inside += ' --gpus "\\"device=$CUDA_VISIBLE_DEVICES\\""' * gpu
        return f"{shlex.join(words)} {inside} {shlex.quote(resources.docker)}"
    if program_name() == "isles-ensemble":
        return shlex.quote(str(Path(sys.argv[0]).absolute()))
    return shlex.join([sys.executable, str(Path(ensemble.__file__).resolve().parent.parent / "process.py")])


def _set_up(cpus: int) -> str:
    """Return the shell lines with which every job begins."""
    return _SET_UP.format(threads=" ".join(f"{name}={value}" for name, value in thread_variables(cpus).items()))


def _mounts(dataset: Path, selected: Sequence[Placed], words: Sequence[str]) -> list[str]:
    """Return the folders to mount into a container: the dataset, the targets of its links, and the paths in the options."""
    root = dataset if dataset.is_dir() else dataset.parent
    found = {str(path.resolve().parent) for case, _ in selected for path in case.files.values()}
    outside = {place for place in found if not Path(place).is_relative_to(root.resolve())}
    if outside and (common := os.path.commonpath(outside)) != "/":
        outside = {common}
    named = {word for word in words if word.startswith("/") and Path(word).exists()}
    return sorted({str(root), *outside, *named})


def _in_directive(path: Path) -> str:
    """Return a path as an #SBATCH line takes it: `%` is a placeholder there, and spaces end it."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text
