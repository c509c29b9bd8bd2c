"""The commands of docs/cluster.md, one after the other, on a small dataset; submit.sh and the cluster have tests of their own."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_runs import _load, write_bids
from conftest import REPOSITORY
from ensemble.batch import estimate, run
from ensemble.batch.case_loop import segment_cases
from ensemble.cli import main
from ensemble.progress import SilentWatcher

PAGE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("python process.py ")
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python process.py ")
]


def test_they_run(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_bids(tmp_path / "data", {"01": ("",), "02": ("",), "03": ("",)})

    def segment_here(address: str, cpus: int, job: Any, session: Any, cases: Any, load: Any, tell: Any) -> None:
        segment_cases(job, session, cases, load, SilentWatcher(), tell)

    monkeypatch.setattr(run, "load_from_config", partial(_load, diary=None, seconds=0.0))
    monkeypatch.setattr(run, "segment_on_ray", segment_here)
    monkeypatch.setattr(estimate, "family_of", lambda spec: SimpleNamespace(networks=lambda folder: []))
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        words = [
            {
                "DATASET": str(data),
                "BIDS_DIR": str(data),
                "OUT": "out",
                "OUT_DIR": "bids-out",
                "HOST:PORT": "h:6379",
            }.get(word, word)
            for word in shlex.split(command)
        ]
        assert main([*words, "--weights", str(weights), "--device", "cpu"]) == 0, command
    for out in ("out", "bids-out"):
        assert (tmp_path / out / "index.html").is_file()
        assert len(list((tmp_path / out).glob("sub-*/report.json"))) == 3
    assert (tmp_path / "isles-slurm" / "submit.sh").is_file()


def test_every_option_of_its_tables_is_one() -> None:
    from ensemble.options import command_parser

    known = {
        word
        for name in ("bids-app", "batch", "slurm")
        for action in command_parser(name)._actions
        for word in action.option_strings
    }
    ours = re.sub(r"```Dockerfile.*?```|`docker run .*?`|`python -m benchmarks.*?`", "", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"--[a-z][a-z_-]+", ours)) - known <= {
        "--rm", "--gpus", "--network", "--user", "--partition", "--account", "--head", "--generate"
    }  # fmt: skip
