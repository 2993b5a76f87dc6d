"""Caches that lack tokens because layers eliminated some: nothing may go on from them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class ShortCaches:
    """The caches that lack tokens, each with the call that left them out.

    A call that makes a cache which nobody uses, as in training, is no error. Within `torch.compile` caches are not
    watched.
    """

    def __init__(self) -> None:
        self._left_by: Any = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"_left_by": None}  # copies of caches are other caches

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._left_by = WeakIdKeyDictionary()

    def note(self, cache: Any, call: Tensor | None) -> None:
        """A cache that a call, known by its table of cosines, does not put all tokens into."""
        if cache is not None and call is not None and not torch.compiler.is_compiling():
            self._left_by[cache] = weakref.ref(call)

    def check(self, cache: Any, call: Tensor | None) -> None:
        """Before a layer reads or fills a cache.

        Raises:
            RuntimeError: another call left tokens out of it.
        """
        if cache is None or torch.compiler.is_compiling() or not self._left_by:
            return
        left_by = self._left_by.get(cache)
        if left_by is not None and left_by() is not call:
            raise RuntimeError(
                "past_key_values must hold every token, but comes from a call in which layers eliminated some and "
                "put none there; fill a cache under torch.no_grad()"
            )
