"""The device of a model: copies to it, and its memory."""

from __future__ import annotations

import gc

import torch

# What torch says on MPS, on a CPU and in CUDA's libraries; only CUDA itself has an exception.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "invalid buffer size",
    "status_alloc_failed",
)


def copy_to(device: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy a tensor to a device, without waiting for what a GPU is doing.

    Parameters
    ----------
    device : str
    tensor : Tensor
    dtype : torch.dtype or None
        That it is changed to; None keeps it.

    Returns
    -------
    Tensor
        The tensor itself where nothing is to be done.
    """
    tensor = tensor.to(dtype=dtype)
    if not device.startswith("cuda") or tensor.is_cuda:
        return tensor.to(device)
    # From pinned memory, which torch keeps until the copy is complete.
    return tensor.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(message in text for message in OUT_OF_MEMORY_MESSAGES)


def free_gpu_bytes(device: str | torch.device) -> int:
    """Return how much of a GPU's memory can be taken, with what torch keeps for later."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_memory() -> None:
    """Give memory back that nothing uses any more, to the device and to the machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
