"""Damaged files, two hundred of them; `python -m benchmarks.fuzz_inputs` makes ten thousand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import REPOSITORY


@pytest.mark.slow
def test_damaged_files_end_in_a_mask_or_a_clean_refusal() -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz_inputs", "--tries", "200", "--seed", "1", "--networks", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    masks, refused = (int(done.stdout.rsplit(word, 1)[0].split()[-1]) for word in (" mask,", " refused,"))
    assert masks > 10, done.stdout
    assert refused > 50, done.stdout
