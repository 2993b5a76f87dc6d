"""Sparse fine-tuning: moving the entries of sparse deltas to where they matter, while training."""

from .reselector import SELECTIONS, Reselector
from .timetable import SCHEDULES, Timetable

__all__ = ["SCHEDULES", "SELECTIONS", "Reselector", "Timetable"]
