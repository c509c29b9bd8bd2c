"""A GPU that computes on the CPU, for machines without one: it knows on which side each tensor lies, and refuses what CUDA refuses.

Finds tensors left on the wrong side, precisions that don't meet and host reads of device memory. Kernels, speed and rounding are the
CPU's: what a real GPU computes, only a real GPU tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")
#: May take tensors of both sides.
_CROSSING = (
    torch.Tensor.copy_,
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type,
)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_HOST_ONLY = (torch.Tensor.numpy, torch.Tensor.__array__)


class PretendGpu(TorchFunctionMode):
    """While it is entered, tensors can be made on, and moved to, "cuda"."""

    def __init__(self) -> None:
        super().__init__()
        # kept, so that no address is used twice
        self._storages: dict[int, torch.UntypedStorage] = {}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on the GPU."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` as a machine with a GPU would."""
        options = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.holds(args[0]) else func(*args)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(func, args, options)
        tensors = list(_tensors([args, options]))
        # tensors without axes may come from the CPU, not from the GPU
        on_gpu = {self.holds(tensor) for tensor in tensors if tensor.ndim or self.holds(tensor)}
        if func in _HOST_ONLY and on_gpu == {True}:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        mixed = on_gpu == {True, False} and func not in _CROSSING
        if mixed and not (func in _INDEXING and self.holds(args[0])):
            raise RuntimeError(f"Expected all tensors to be on the same device, but got two for {func.__name__}")
        device = options.pop("device", None)
        made_there = device is not None and torch.device(device).type == "cuda"
        if device is not None and not made_there:
            options["device"] = device
        try:
            result = func(*args, **options)
        except NotImplementedError:  # the CPU has no such kernel in half precision
            half = args[0].dtype
            result = func(args[0].float(), *args[1:], **options).to(half)
        if made_there or (device is None and True in on_gpu):
            for tensor in _tensors([result]):
                self._mark(tensor)
        return result

    def _moved(self, func: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]) -> Any:
        tensor, *rest = args
        values = [*rest, options.pop("device", None), options.pop("dtype", None)]
        devices = [torch.device(value) for value in values if isinstance(value, str | torch.device)]
        dtypes = [value for value in values if isinstance(value, torch.dtype)]
        before = self.holds(tensor)
        target = {torch.Tensor.cpu: False, torch.Tensor.cuda: True}.get(func, before)
        if devices:
            target = devices[0].type == "cuda"
        for other in rest:
            if isinstance(other, torch.Tensor):
                target, dtypes = self.holds(other), [other.dtype]
        result: torch.Tensor = tensor.to(dtype=dtypes[0] if dtypes else tensor.dtype, **options)
        if target != before and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            result = result.clone(memory_format=torch.preserve_format)
        if target:
            self._mark(result)
        return result

    def _mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            self._storages[storage.data_ptr()] = storage


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
