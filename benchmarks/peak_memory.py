"""Peak memory and time of one whole `python process.py run`, as the operating system counts them.

    python -m benchmarks.peak_memory --dwi DWI --adc ADC [--flair FLAIR] [any other option of `process.py run`]

Prints the peak resident set size of the process (and of the largest of its children), its CPU time and wall time. The output folder
is a temporary one.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 4096


def main() -> int:
    """Run the case; exit code of the run, or 1 when the peak is above the limit that the project keeps on isles22_0009."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "process.py"), "run", "--out", out, *sys.argv[1:]]
        started = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        wall = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_mb = usage.ru_maxrss / 1024  # Linux counts in KiB
    print(f"peak resident memory: {peak_mb:.0f} MB (limit {LIMIT_MB} MB)")
    print(f"CPU time: {usage.ru_utime + usage.ru_stime:.1f} s, wall time: {wall:.1f} s, exit code: {code}")
    return code or int(peak_mb > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
