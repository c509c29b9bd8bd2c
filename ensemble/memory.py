"""Keep freed memory in the process, and distinguish out-of-memory errors from bugs. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import re
import sys

from ensemble.errors import OutOfMemory, UserError

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


#: How libraries say it that have no class of errors for it: PyTorch's allocators, CUDA's, ONNX Runtime, ITK, the C++ library, oneDNN, the
#: dynamic linker; and threads that find no room for their stacks.
_SAID = re.compile(
    r"out of memory|(not enough|insufficient) memory|(can't|cannot|unable to|failed to) allocate|bad_alloc|bad allocation"
    r"|DefaultCPUAllocator|ALLOC_FAILED|could not create a primitive(?! descriptor)|could not create a memory|failed to map segment"
    r"|unable to (join|create) thread|can't start new thread",
    re.I,
)
MORE_MEMORY = "give the process more memory (docker run --memory), or stop other programs"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, whichever library raised it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    plain = isinstance(error, RuntimeError | ImportError) or type(error).__module__.startswith("onnxruntime")
    return plain and _SAID.search(str(error)) is not None


def as_user_error(error: Exception) -> Exception:
    """Convert an out-of-memory error to a UserError; return any other error unchanged."""
    if isinstance(error, UserError) or not is_out_of_memory(error):
        return error
    found = (str(error) or type(error).__name__).splitlines()[0]
    return OutOfMemory("there is not enough memory", found=found[:200], do=MORE_MEMORY)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the kernel (on Linux; does nothing elsewhere).

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
