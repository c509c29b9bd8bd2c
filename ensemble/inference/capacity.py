"""Memory limits: how many windows run through a network at once, and on which device the image's arrays lie."""

from __future__ import annotations

import torch

#: Memory that the activations of one batch of windows may take.
BATCH_BYTES = {"cpu": 1280 * 2**20, "cuda": 4 * 2**30}
#: Most windows at once, by the network's spatial dimensions. CPU milliseconds a window for 1, 2, 4, 8, 16 of them (one thread):
#: 20.8, 17.4, 15.2, 13.7, 12.6 (96x80, 32 features); 1170, 1080 for 1 and 2 (80x96x80, 32 features). PyTorch
#: computes deep 3-D layers by a slow path when a window comes alone; more than two fill the caches (0.24, 0.13, 0.17 s, 64x64x48).
MAX_WINDOWS = {"cpu": {2: 16, 3: 2}, "cuda": {2: 64, 3: 8}}


def window_batch_size(window_bytes: int, dims: int, device: torch.device) -> int:
    """Return how many windows to run at once: as many as fit into memory, at `window_bytes` each, for a network of `dims` dimensions."""
    return max(1, min(MAX_WINDOWS[device.type][dims], BATCH_BYTES[device.type] // window_bytes))


def buffer_device(needed_bytes: int, device: torch.device) -> torch.device:
    """Return the device for image and output buffers: the networks' if they need less than half of its free memory, else the CPU."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed_bytes < free / 2 else torch.device("cpu")
