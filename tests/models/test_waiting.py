"""Between the batches of an extraction, nothing of ours reads from the device."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import probekit
from probekit.models import devices, forward, load, pooling
from probekit.models.processor import PreparedImage

POOLINGS = ("mean", "max", "last", "image_mean", "text_mean", "token:3")
STAGES = ("lm", "vision", "projector")
# What makes the CPU wait for a GPU, by the name of the tensor's method.
READS = ["__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu"]
READS += ["nonzero", "unique", "equal", "masked_select", "repeat_interleave"]
PACKAGE = Path(probekit.__file__).parent


class OnDevice(torch.Tensor):
    """A tensor that stands for one on a GPU, as do all that are computed from it."""

    reads: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        is_read = name in READS or (name == "to" and "cpu" in args)
        if is_read or (name == "__getitem__" and _reads_an_index(args[1])):
            cls.reads[_caller()] += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def _reads_an_index(index) -> bool:
    """Masks are counted on the device; indices of the CPU are copied there and waited for."""
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            return True
        if isinstance(part, (torch.Tensor, np.ndarray)) and not isinstance(part, OnDevice):
            return True
    return False


def _caller() -> str:
    """The file that reads: the first frame outside of torch and of this one."""
    frame = sys._getframe(1)
    torch_folder = str(Path(torch.__file__).parent)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_folder):
        frame = frame.f_back
    return frame.f_code.co_filename


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """What is read from now on, by file, with every copy to a device as an OnDevice."""

    def copy(device, tensor, dtype=None):
        return devices.copy_to(device, tensor, dtype).as_subclass(OnDevice)

    for module in (forward, load, pooling):
        monkeypatch.setattr(module, "copy_to", copy)
    OnDevice.reads.clear()
    return OnDevice.reads


@pytest.mark.parametrize("stages", [("lm",), STAGES], ids="+".join)
@pytest.mark.parametrize("way", ["shared", "plain", "encoded"])
def test_no_pass_waits_for_the_device(vlm, prepared: list[PreparedImage], reads, way, stages):
    """What waits in a pass is transformers' own."""
    states = forward.run_pooled(vlm, prepared, poolings=POOLINGS, stages=stages, way=way)
    assert all(isinstance(values, OnDevice) for values in states.values())
    ours = {file: count for file, count in reads.items() if Path(file).is_relative_to(PACKAGE)}
    assert not ours


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: bool((values > 1).any()),
        lambda values: values[values > 1],
        lambda values: values[torch.tensor([0])],
        lambda values: values[np.array([0])],
        lambda values: (2 * values).tolist(),
        lambda values: values.to("cpu"),
        lambda values: values.masked_select(values > 1),
    ],
)
def test_a_read_is_noticed(reads, monkeypatch, read):
    monkeypatch.setattr(sys.modules[__name__], "__file__", "elsewhere")
    read(load.copy_to("cpu", torch.arange(4)))
    assert reads.total() == 1
