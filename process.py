#!/usr/bin/env python3
"""Segment ischemic stroke lesions in brain MRI. Without arguments: the ISLES'22 contract, /input -> /output. See --help."""

import sys

from ensemble.memory import keep_freed_memory
from ensemble.processors import limit_threads

if __name__ == "__main__":
    limit_threads()
    keep_freed_memory()
    from ensemble.cli import main

    sys.exit(main())
