"""`python -m tests.budgets update [part ...]`: measures every kernel anew and writes the committed budgets.

A part is a module of this directory with an `update()` function; without any named, all are updated. Look at the
difference before you commit it: a budget that grew needs a reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from . import nvcc, triton_offline

PARTS: dict[str, Callable[[], None]] = {"cuda": nvcc.update, "triton": triton_offline.update}
"""Part to the function that measures its kernels and rewrites its JSON file."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.budgets")
    parser.add_argument("action", choices=["update"])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for part in arguments.parts or PARTS:
        PARTS[part]()
        print(f"{part}: budgets written")


if __name__ == "__main__":
    main()
