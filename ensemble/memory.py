"""Keep freed memory inside the process. Standard library only; called once, by a program, not by the library."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of giving each back to the kernel (Linux only; elsewhere nothing happens).

    A network on the CPU allocates hundreds of megabytes of activations a window, gigabytes a training step; with glibc's defaults
    each is mapped anew and every page faults again. That took two thirds of a training step's time where it was measured (5.4 s
    against 1.95 s), and more time than the arithmetic in a network's cheap layers. The process keeps its peak of memory.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)
