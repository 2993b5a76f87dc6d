"""Peak memory of one training step, counted exactly in bytes of tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from .arms import Arm
from .loop import forward_backward
from .settings import Settings

MEASURE = {
    "cpu": "bytes of tensors held at once above the level before the step, from the memory events of torch.profiler",
    "cuda": "torch.cuda.max_memory_allocated above the level before the step",
}


def peak_step_bytes(arm: Arm, batches: list[Tensor], settings: Settings) -> int:
    """The most bytes that forward and backward of one step hold at once, above what is held before the step.

    The step is extra: its gradients are dropped, so the weights, the optimizer and the timings are left as they are.
    The arm must not hold gradients.
    """
    device = batches[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward_backward(arm, batches, settings, step=0)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = _profiled_peak(arm, batches, settings)
    arm.optimizer.zero_grad(set_to_none=True)
    return peak


def _profiled_peak(arm: Arm, batches: list[Tensor], settings: Settings) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        forward_backward(arm, batches, settings, step=0)
    return peak_of_profile(profile)


def peak_of_profile(profile: torch.profiler.profile) -> int:
    """The highest level that the recorded allocations and releases of CPU memory reach above their start."""
    kineto: Any = profile.profiler
    events = kineto.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
