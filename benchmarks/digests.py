"""What does knowing a checkpoint again save? CPU and wall seconds of its digest at the first start and at later ones.

    python -m benchmarks.digests [--gb 1]

The file is made up, and of holes: its bytes are in memory at once, so a disk's time comes on top. The cache is a folder of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ASK = """
import sys, time
from pathlib import Path
from ensemble.weights.digests import weights_sha256
cpu, wall = time.process_time(), time.perf_counter()
weights_sha256(Path(sys.argv[1]))
print(f"{time.process_time() - cpu:.3f} CPU s, {time.perf_counter() - wall:.3f} s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="the digest of a large checkpoint, by first and later starts")
    parser.add_argument("--gb", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        with path.open("wb") as file:
            file.truncate(int(options.gb * 1e9))
        time.sleep(3)  # what has just been written is not kept
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        for start in ("first start", "second start", "third start"):
            command = [sys.executable, "-c", _ASK, str(path)]
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            print(f"{start}: {told.strip()}")


if __name__ == "__main__":
    main()
