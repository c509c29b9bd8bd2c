#!/usr/bin/env python3
"""Segment ischemic stroke lesions. Without arguments: the ISLES'22 contract, /input -> /output. See --help."""

import sys

from ensemble.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
