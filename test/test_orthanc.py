"""The way through a real archive, as deploy/hospital sets it up (see orthanc_trip.py, which runs in a network namespace of its own)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.mark.slow
def test_there_and_back_refused_killed_and_full_through_a_real_orthanc(tmp_path: Path) -> None:
    if shutil.which("Orthanc") is None or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here (unshare -n)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ISLES_")}
    command = ["unshare", "-n", sys.executable, str(REPOSITORY / "test" / "orthanc_trip.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    logs = [
        (tmp_path / name).read_text(errors="replace")[-4000:]
        for name in ("listen.log", "orthanc.log")
        if (tmp_path / name).exists()
    ]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
