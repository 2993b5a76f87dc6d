"""Which parameters train when: policies over whole tensors that keep the optimizer's state right."""

from .base import Schedule, ScheduleReport
from .flops import BackwardFlops, TensorCost, profile_backward_flops
from .greentrainer import GreenTrainer
from .hft import HFT
from .lisa import LISA
from .selection import select_tensors

__all__ = [
    "HFT",
    "LISA",
    "BackwardFlops",
    "GreenTrainer",
    "Schedule",
    "ScheduleReport",
    "TensorCost",
    "profile_backward_flops",
    "select_tensors",
]
