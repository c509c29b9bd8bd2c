"""Measure the memory of the calling process."""

from __future__ import annotations

from pathlib import Path


def peak_mb() -> float:
    """The most that was resident so far. Not getrusage's figure, which begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
