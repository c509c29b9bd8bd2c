"""Keep freed memory inside the process, as at inference."""

from ensemble.memory import keep_freed_memory

__all__ = ["keep_freed_memory"]
