"""Limit the threads of numerical libraries to the processors of this process, not of the whole host.

Called before numpy is imported, since its libraries read their variables then. Standard library only.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

#: Several libraries keep a pool each, and platforms allow as few as 128 processes and threads.
MAX_THREADS = 24
#: Variables of OpenMP (PyTorch among others), OpenBLAS, MKL, numexpr and ITK.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
#: How often a thread of GNU OpenMP (used by PyTorch) polls for work before it sleeps. By default it polls for milliseconds, and so keeps a
#: processor from others: beside one busy process on two processors the 2-D member took twice as long (docs/adr/0012).
OMP_SPIN_COUNT = "1000"
_QUOTA_V2 = Path("/sys/fs/cgroup/cpu.max")
_QUOTA_V1 = Path("/sys/fs/cgroup/cpu")


def limit_threads() -> None:
    """Set the thread variables that the user has not set."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(min(available_processors(), MAX_THREADS)))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN_COUNT)


def thread_variables(count: int) -> dict[str, str]:
    """Return the environment variables that limit numerical libraries to `count` threads."""
    return dict.fromkeys(VARIABLES, str(count))


def available_processors() -> int:
    """Return the number of processors in the affinity mask, or fewer if a cgroup quota says so (docker run --cpus)."""
    processors = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, min(processors, math.ceil(quota))) if quota else processors


def _cgroup_quota() -> float | None:
    """Return the cgroup's CPU quota in processors; None without a limit."""
    try:
        if _QUOTA_V2.is_file():
            granted, period = _QUOTA_V2.read_text().split()
        else:
            granted = (_QUOTA_V1 / "cpu.cfs_quota_us").read_text()
            period = (_QUOTA_V1 / "cpu.cfs_period_us").read_text()
        return int(granted) / int(period) if int(granted) > 0 else None
    except (OSError, ValueError):  # no such files, or "max"
        return None
