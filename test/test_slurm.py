"""A batch as SLURM jobs: what the scripts say, and a real SLURM on this machine in which a task is killed and requeued."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_runs import comparable, rows, write_bids, write_case
from conftest import shared
from ensemble.cli import main
from ensemble.options import parse_options, to_arguments
from nnunet_folders import FolderSpec, build_folder

#: The acceptance run has 300.
CASES = int(os.environ.get("CLUSTER_CASES", "12"))


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with one tiny network."""
    root = tmp_path_factory.mktemp("weights")
    build_folder(root / "tiny", FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0)))
    return root


def test_options_are_restated_so_that_they_parse_to_the_same(tmp_path: Path) -> None:
    given = [
        *(
            "--weights",
            "w",
            "--members",
            "a,b",
            "--device",
            "cpu",
            "--precision",
            "fp32",
            "--session",
            "torch",
            "--tta",
            "none",
        ),
        *("--fusion", "mean", "--min-disputed-ml", "0.5", "--member-weights", "a=2,b=0.25", "--min-lesion-ml", "0"),
        *("--min-members", "2", "--skull-strip", "never", "--registration", "never", "--brain-ml", "100,2500.5"),
        *(
            "--allow-torchscript",
            "--save-probabilities",
            "--save-member-masks",
            "--findings",
            "on",
            "--atlas",
            "at las",
        ),
        *("--save-mni", "--dicom", "--dicom-probability", "--no-resume", "--report", "--verbose"),
    ]
    options = parse_options(["slurm", "d", "o", *given], {})
    names = set(vars(options)) - {"scripts", "command"}
    words = to_arguments(options, names)
    again = parse_options(["slurm", "d", "o", *words], {})
    for name in names - {"dataset", "out"}:
        value = getattr(options, name)
        assert getattr(again, name) == (value.absolute() if isinstance(value, Path) else value), name
    by_default = parse_options(["slurm", "d", "o"], {})
    assert to_arguments(by_default, names) == []
    changed = {name for name in names if getattr(options, name) != getattr(by_default, name)}
    assert changed == {word[2:].replace("-", "_") for word in given if word.startswith("--")} - {"no_resume"} | {
        "resume"
    }


@pytest.mark.parametrize("how", [[], ["--apptainer", "/images/i s.sif", "--gpu"], ["--docker", "isles:1", "--gpu"]])
def test_the_scripts_are_bash_and_quote_what_they_name(tmp_path: Path, member: Path, how: list[str]) -> None:
    data, out = tmp_path / "the data", tmp_path / "o'ut"
    write_case(data / "a")
    (tmp_path / "elsewhere").mkdir()
    write_case(tmp_path / "elsewhere" / "b")
    (data / "b").symlink_to(tmp_path / "elsewhere" / "b")
    scripts = tmp_path / "s p"
    command = ["slurm", str(data), str(out), "--scripts", str(scripts), "--weights", str(member), "--memory-gb", "3.5"]
    assert main([*command, "--hours", "2.5", "--shards", "7", "--tta", "none", *how]) == 0
    for name in ("participant.sbatch", "group.sbatch", "submit.sh"):
        subprocess.run(["bash", "-n", scripts / name], check=True)
    text = (scripts / "participant.sbatch").read_text()
    assert re.findall(r"#SBATCH --(?:array|mem|time)=(\S+)", text) == ["1-7", "3500M", "150"]
    assert ("--gres=gpu:1" in text) == ("--gpu" in how)
    words = shlex.split(text.splitlines()[-1])
    at = words.index("batch")
    options = parse_options([*words[at:-1], "1/7"], {})
    assert (options.dataset, options.out, options.tta, options.weights) == (data, out, "none", member)
    mounted = {
        word.removesuffix(":ro").partition(":")[0] for word in words[:at] if word.count(":") and word.startswith("/")
    }
    if how:
        assert mounted >= {str(data), str(tmp_path / "elsewhere" / "b"), str(member), str(out)}
        assert how[1] in words[:at]
        assert not re.search("--nv|--gpus", (scripts / "group.sbatch").read_text())
    assert main([*command, "--apptainer", "a", "--docker", "b"]) == 2


def test_the_tasks_take_the_list_of_a_folder_and_a_worklist_as_it_is(tmp_path: Path, member: Path) -> None:
    write_case(tmp_path / "data" / "a")
    (tmp_path / "list.csv").write_text("case,dwi,adc\na,data/a/dwi.nii.gz,data/a/adc.nii.gz\n")
    for dataset, how, listed in (("data", ["--docker", "isles:1"], True), ("list.csv", [], False)):
        scripts = tmp_path / f"jobs of {dataset}"
        command = ["slurm", str(tmp_path / dataset), str(tmp_path / "out"), "--scripts", str(scripts), *how]
        assert main([*command, "--weights", str(member), "--parquet"]) == 0
        assert "--parquet" in (scripts / "group.sbatch").read_text(), "the summary is what it asks for"
        (path,) = [*scripts.glob("cases-*.jsonl")] or [None]
        assert (path is not None) == listed
        for name in ("participant", "group"):
            words = shlex.split((scripts / f"{name}.sbatch").read_text().splitlines()[-1])
            assert ("--case-list" in words) == listed
            if listed:
                assert words[words.index("--case-list") + 1] == str(path)
                assert f"{path}:{path}:ro" in words, "it is mounted"


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A SLURM of one node; the environment in which its commands find it."""
    script = shared("cluster/slurm_one_machine.sh")
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} here: as root, apt-get install slurmctld slurmd slurm-client munge")
    if os.getuid() != 0:
        pytest.skip("a SLURM of one machine needs root")
    munge, running = Path("/run/munge/munged.pid"), munge_runs()
    done = subprocess.run(
        ["bash", "-c", f"source {script}; slurm_start >&2; echo $SLURM_HOME"],
        capture_output=True,
        text=True,
        check=False,
    )
    home = Path(done.stdout.strip() or "/nonexistent")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
    try:
        assert done.returncode == 0, done.stderr
        yield environment | {"SLURM_CONF": str(home / "slurm.conf")}
    finally:
        for path in (home / "d.pid", home / "ctld.pid", *([] if running else [munge])):
            if path.exists():
                os.kill(int(path.read_text()), 15)
        shutil.rmtree(home, ignore_errors=True)


def munge_runs() -> bool:
    """Whether somebody has started it already."""
    try:
        os.kill(int(Path("/run/munge/munged.pid").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.slow
def test_an_array_with_a_task_that_is_killed_and_requeued_makes_what_one_process_makes(
    tmp_path: Path, member: Path, slurm: dict[str, str]
) -> None:
    data, out, whole = tmp_path / "data", tmp_path / "out", tmp_path / "whole"
    write_bids(data, {f"{number:03d}": ("",) for number in range(CASES)})
    broken = data / "sub-003" / "dwi" / "sub-003_dwi.nii.gz"
    broken.write_bytes(broken.read_bytes()[:3000])
    common = ["--weights", str(member), "--device", "cpu", "--tta", "none"]
    assert main(["batch", str(data), str(whole), *common]) == 3
    scripts = tmp_path / "jobs"
    assert main(["slurm", str(data), str(out), "--scripts", str(scripts), "--shards", "2", "--cpus", "1", *common]) == 0

    def ask(*command: object) -> str:
        return subprocess.run([*map(str, command)], env=slurm, capture_output=True, text=True, check=True).stdout

    said = ask(scripts / "submit.sh", "--hold")
    array = re.findall(r"array (\d+)", said)[0]
    ask("scontrol", "release", array)
    group = re.findall(r"summary (\d+)", said)[0]
    ask("scontrol", "release", group)
    deadline = time.monotonic() + 240 + 3 * CASES
    while len(list(out.glob("sub-*/report.json"))) < max(1, CASES // 10):
        assert time.monotonic() < deadline, ask("squeue")
        time.sleep(0.05)
    ask("scontrol", "requeue", f"{array}_1")
    while ask("squeue", "--noheader", "--job", f"{array},{group}").strip():
        assert time.monotonic() < deadline, ask("squeue")
        subprocess.run(
            ["scontrol", "update", f"JobId={array}_1", "StartTime=now"], env=slurm, capture_output=True, check=False
        )
        time.sleep(0.3)
    logs = {path.name: path.read_text() for path in (scripts / "logs").iterdir()}
    assert logs[f"{array}_1.log"].count(f" cases in {data}") == 2, "it was killed, and began again"
    assert logs[f"{array}_2.log"].count("note: the cases are those of ") == 1, "found once, by slurm"
    assert set(logs) == {f"{array}_1.log", f"{array}_2.log", f"group_{group}.log"}
    assert comparable(out, device=False) == comparable(whole, device=False)
    assert [row["status"] for row in rows(out).values()].count("done") == CASES - 1
