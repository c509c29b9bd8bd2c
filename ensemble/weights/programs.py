"""Inspect the pickle of a checkpoint as a program without running it: what it calls, and how much memory it would allocate.

torch's own restricted unpickler runs no code of a file, but makes as much memory as it is asked for.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from typing import Any, BinaryIO

from ensemble.weights.pickles import MAX_MADE_BYTES, ForbiddenName

#: What trainers' checkpoints name: tensors and their storages, types, devices, dictionaries, numpy scalars.
_NAMED = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.\w+Storage|torch\.storage\.\w+Storage|torch\.(device|bool|b?float\d\w*|u?int\d+|half|double|long|short|complex\d+)"
    r"|collections\.OrderedDict|_codecs\.encode|numpy\.dtype|numpy\.dtypes\.\w+|numpy\.(_core|core)\.multiarray\.scalar"
)
_DICTIONARY, _ENCODE = "collections.OrderedDict", "_codecs.encode"
#: Of one item of a dictionary, roughly.
_ITEM_BYTES = 100
_NOTHING, _MARK, _VALUE = "()", "(", ""


def refuse_excessive_allocation(program: BinaryIO) -> None:
    """Raise UnpicklingError for a pickle that would allocate far more than it holds. Reads one pickle to its end.

    Raises ForbiddenName for a name that no checkpoint needs; UnpicklingError for calls that would make far more than the file holds, and
    for what is no pickle.
    """
    stack: list[str] = []
    memo: dict[int, str] = {}
    longest = encoded = filled = 0
    try:
        for opcode, argument, position in pickletools.genops(program):
            if isinstance(argument, str | bytes):
                longest = max(longest, len(argument))
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and isinstance(argument, int):
                memo[argument] = stack[-1]
                continue
            if opcode.name == "REDUCE":
                arguments, function = stack[-1], stack[-2]
                encoded += function == _ENCODE
                if (
                    function == _DICTIONARY and arguments != _NOTHING
                ):  # Python 2 wrote a dictionary as a list of its items
                    filled += _ITEM_BYTES * (
                        position or 0
                    )  # a list can't have more items than the program has bytes so far
                if filled + encoded * longest > MAX_MADE_BYTES:
                    raise pickle.UnpicklingError("it would expand to far more than a checkpoint")
            _pop(stack, opcode)
            stack += _pushed(opcode, argument, memo)
    except (IndexError, KeyError, ValueError, RecursionError) as error:
        raise pickle.UnpicklingError(f"not the pickle of a checkpoint: {error}") from error


def _pop(stack: list[str], opcode: pickletools.OpcodeInfo) -> None:
    """Remove from the stack what an opcode consumes."""
    taken = opcode.stack_before
    if pickletools.markobject in taken:
        while stack.pop() != _MARK:
            pass
        taken = taken[: taken.index(pickletools.markobject)]
    if taken:
        del stack[-len(taken) :]


def _pushed(opcode: pickletools.OpcodeInfo, argument: Any, memo: dict[int, str]) -> list[str]:
    """Return what an opcode leaves on the stack, as far as needed: names, empty tuples and marks."""
    if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
        name = str(argument).replace("__builtin__ ", "builtins ").replace(" ", ".")
        if not _NAMED.fullmatch(name):
            raise ForbiddenName(name.removeprefix("builtins."))
        return [name]
    if opcode.name in ("BINGET", "LONG_BINGET", "GET"):
        return [memo[argument]]
    if opcode.name == "EMPTY_TUPLE":
        return [_NOTHING]
    if opcode.name == "MARK":
        return [_MARK]
    return [_VALUE] * len(opcode.stack_after)
