"""Read untrusted pickles: plain Python values only; nothing that a pickle names is imported or called.

nnU-Net v1 describes its models in pickles (`plans.pkl`, `*.model.pkl`) of dictionaries, numbers and small numpy arrays. Every name that
numpy 1 or 2 writes for those is answered by a stand-in of ours, which keeps the bytes; any other name ends the reading.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ensemble.errors import WeightsBroken
from ensemble.files import error_in_words, open_file, unreadable_reason
from ensemble.memory import MORE_MEMORY
from ensemble.weights.damage import READ_ERRORS

#: Descriptions of models take some kilobytes; those of large training sets, which list all cases, a few megabytes.
MAX_BYTES = 16 * 2**20
#: Limit (bytes) of the data that a pickle's calls create, since one value can be referenced many times; and the size of a list item.
MAX_MADE_BYTES, _NUMBER_BYTES = 64 * 2**20, 32
_BYTE_ORDERS = ("<", ">", "|", "=")


class ForbiddenName(pickle.UnpicklingError):
    """A pickle refers to something other than plain values."""


def read_pickle(path: Path) -> Any:
    """Return a pickle's plain values: dict, list, tuple, set, str, bytes, numbers, None; numpy values become numbers and lists.

    Raises WeightsBroken, naming the file and what it asked for, for missing, damaged and oversized files and for anything that is no
    plain value.
    """
    try:
        with open_file(path) as file:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise pickle.UnpicklingError(f"{size} bytes, far more than the description of a model takes")
            return _plain(_PlainUnpickler(file, encoding="latin1").load(), {})
    except ForbiddenName as error:
        raise WeightsBroken(
            f"{path.name} contains more than plain values; it was not loaded",
            where=path,
            found=f"it refers to {error}",
            do="use nnU-Net's original file; a description that needs other code can't be trusted",
        ) from error
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            why = unreadable_reason(path, error)
            raise WeightsBroken(
                f"the model description {path.name} {why.what}", where=path, found=why.found, do=why.do
            ) from error
        if isinstance(error, MemoryError):
            raise WeightsBroken(
                f"there is not enough memory to read the model description {path.name}",
                where=path,
                found=f"an intact file needs less than {MAX_MADE_BYTES / 1e6:.0f} MB",
                do=f"{MORE_MEMORY}; if memory is free, the file is damaged: copy or download it again",
            ) from error
        raise WeightsBroken(
            f"the model description {path.name} is damaged",
            where=path,
            found=error_in_words(error)[:200],
            do="copy or download it again",
        ) from error


class _Allowance:
    """The memory that a pickle may still allocate."""

    def __init__(self) -> None:
        self._left = MAX_MADE_BYTES

    def spend(self, size: int) -> None:
        """Raise UnpicklingError if the pickle allocates far more than its size."""
        self._left -= size
        if self._left < 0:
            raise pickle.UnpicklingError("it would expand to far more than the description of a model")


class _Dtype:
    """Stand-in for `numpy.dtype`: a scalar number type whose byte order follows in the pickle."""

    def __init__(self, code: str) -> None:
        self.kind = np.dtype(str(code))
        if self.kind.kind not in "biuf":
            raise pickle.UnpicklingError(f"numpy type {code!r} holds no numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in _BYTE_ORDERS:
            raise pickle.UnpicklingError(f"byte order {state[1]!r}")
        self.kind = self.kind.newbyteorder(state[1])


class _Array:
    """Stand-in for `numpy.ndarray`, created empty and filled by the state that follows in the pickle."""

    def __init__(self, allowance: _Allowance) -> None:
        self.values: Any = []
        self._allowance = allowance

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.values = _numbers(self._allowance, data, dtype, tuple(shape), "F" if fortran else "C")


def _numbers(allowance: _Allowance, data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Any:
    """Return an array's bytes as (nested) lists of numbers. numpy checks that bytes and shape agree."""
    allowance.spend(_NUMBER_BYTES * sum(accumulate(map(abs, shape), mul)))  # lists of lists of none, too
    flat = np.frombuffer(_as_bytes(data), dtype.kind)
    return flat.reshape(shape, order="F" if order == "F" else "C").tolist()


def _as_bytes(data: bytes | str) -> bytes:
    """Return bytes; Python 2 wrote them as text."""
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _dtype(allowance: _Allowance, code: str, *_: Any) -> _Dtype:
    return _Dtype(code)


def _empty_array(allowance: _Allowance, *_: Any) -> _Array:
    return _Array(allowance)


def _array_from_buffer(allowance: _Allowance, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array(allowance)
    array.values = _numbers(allowance, data, dtype, shape, order)
    return array


def _scalar(allowance: _Allowance, dtype: _Dtype, data: bytes | str) -> Any:
    return _numbers(allowance, data, dtype, (1,), "C")[0]


def _latin1(allowance: _Allowance, text: str, encoding: str) -> bytes:
    """Return bytes as pickle protocol 2 encodes them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not admitted")
    allowance.spend(len(text))
    return text.encode("latin1")


def _dictionary(allowance: _Allowance) -> dict[Any, Any]:
    return {}


#: numpy's internal module was `numpy.core` before version 2.
_STAND_INS: Mapping[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": _empty_array,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "collections.OrderedDict": _dictionary,
    "_codecs.encode": _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._allowance = _Allowance()

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Raises ForbiddenName if there is none."""
        try:
            return partial(_STAND_INS[f"{module}.{name}"], self._allowance)
        except KeyError:
            raise ForbiddenName(f"{module}.{name}") from None


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """Return a copy without stand-ins. Shared values are copied once, so that the copy is no larger than the original."""
    if isinstance(value, str | bytes | int | float | complex | bool | type(None)):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, _Array):
        copy: Any = value.values
    elif isinstance(value, dict):
        copy = {_plain(key, known): _plain(item, known) for key, item in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        copy = type(value)(_plain(item, known) for item in value)
    else:
        raise pickle.UnpicklingError(f"a {type(value).__name__} is no plain value")
    known[id(value)] = copy
    return copy
