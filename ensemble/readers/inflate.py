"""Read a gzip stream of any number of members incrementally, never more than asked for."""

from __future__ import annotations

import io
import zlib
from typing import BinaryIO

_BLOCK, _MAGIC = 1 << 14, b"\x1f\x8b"


class GzipReader(io.RawIOBase):
    """Reads the contents of a gzip file (RFC 1952).

    Reading raises zlib.error, also where a checksum does not hold; EOFError where the end is missing; ValueError for what stands behind it
    and is neither another member nor padding.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._input, self._stream = file, b"", zlib.decompressobj(31)

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes, at least one before the end."""
        while True:
            if self._stream.eof and not self._begin_member():
                return b""
            self._input = self._input or self._file.read(_BLOCK)
            if not self._input:
                raise EOFError("the compressed stream is incomplete")
            content = self._stream.decompress(self._input, max(size, 0))
            self._input = self._stream.unconsumed_tail
            if content:
                return content

    def exactly(self, size: int) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        content = b""
        while len(content) < size and (more := self.read(size - len(content))):
            content += more
        return content

    def _begin_member(self) -> bool:
        """Return whether another member follows; zero padding is skipped."""
        rest = self._stream.unused_data
        while len(rest := rest.lstrip(b"\0")) < len(_MAGIC) and (more := self._file.read(_BLOCK)):
            rest += more
        if rest and rest[: len(_MAGIC)] != _MAGIC:
            raise ValueError("there is other data after the compressed stream")
        self._input, self._stream = rest, zlib.decompressobj(31) if rest else self._stream
        return bool(rest)
