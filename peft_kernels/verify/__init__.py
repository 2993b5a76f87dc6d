"""Checks every operator x backend x dtype that this machine can run against the reference, for `peft-kernels verify`.

Operators and backends are looked up in `peft_kernels.backends`; inputs come from one module per family. The rule: the
error against the reference in float64 is at most twice the error of the reference on inputs rounded to the tested
dtype, both as root mean square and at its largest, give or take the rounding of the result. Dropout masks must be equal
bit for bit.
"""

from .check import Outcome, verify

__all__ = ["Outcome", "verify"]
