"""Who selects tokens and who shares a selection: the state of layers that eliminate tokens, beside their parameters."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from . import token_scores
from .asking import in_evaluation
from .decoder_layer import Anatomy
from .elimination_options import EliminationOptions
from .kept_tokens import Kept
from .llama_attention import AttentionPart
from .short_caches import ShortCaches


@torch.compiler.assume_constant_result
def _warn_while_compiling(method: str, reason: str) -> int:
    """Warns once per graph: the compiler calls it while it traces, and keeps what it returns."""
    warnings.warn(f"{method} of a compiled layer does nothing: {reason}", stacklevel=2)
    return 0


def _recomputing() -> bool:
    """Whether this runs within backward, where activation checkpointing computes a forward anew."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def call_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """By what a call of the model is known: its table of cosines, if a layer gets one."""
    tables = inputs.get("position_embeddings")
    return tables[0] if tables else None


def _has_peers() -> bool:
    """Whether processes train together, which wait for each other's gradients and parameters."""
    return dist.is_available() and dist.is_initialized()


class Selections:
    """What the layers of a model share: selections of the calls that are under way, and what scores are drawn from.

    A call of the model is known by its table of cosines, which all its layers get and which activation checkpointing
    gives them again in backward. There every layer finds the selection of its forward, even one that cannot be made
    anew, or that other calls have been between. Selections go with that table. Backward that makes a table of its own,
    because what makes it is checkpointed too, has to make selections anew; those that cannot be are refused.

    Args:
        select_every: so many layers in a row share a selection.
        seed: of random scores; None draws from torch's generator of the device.

    Attributes:
        suspended: whether layers compute for all tokens at present, as in evaluation.
        latest: what `remember` was given last.
    """

    def __init__(self, select_every: int = 1, seed: int | None = None) -> None:
        self.select_every = select_every
        self.seed = seed
        self.given = token_scores.GivenScores()
        self.suspended = False
        self.latest: Kept | None = None
        self.short_caches = ShortCaches()
        self._generators: dict[str, torch.Generator] = {}
        self._by_call: Any = WeakIdKeyDictionary()
        self._compiled: dict[Any, tuple[int, Kept]] = {}

    def __getstate__(self) -> dict[str, Any]:
        generators = {device: generator.get_state() for device, generator in self._generators.items()}
        return {**self.__dict__, "_by_call": None, "_compiled": {}, "latest": None, "_generators": generators}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._by_call = WeakIdKeyDictionary()
        self._generators = {
            device: torch.Generator(device).set_state(saved) for device, saved in state["_generators"].items()
        }

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What random scores on a device are drawn from; None for torch's."""
        if self.seed is None:
            return None
        name = str(device)
        if name not in self._generators:
            self._generators[name] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[name]

    def remember(self, kept: Kept | None) -> None:
        """Keeps a call's selection for whoever asks afterwards; one that backward needs again is not the latest."""
        if not _recomputing():
            self.latest = kept

    def begin(self, call: Tensor | None, leader: int) -> None:
        """Called by a layer before those that follow it: they find nothing that was selected in a call before.

        Else they would where the leader selects nothing in this call, if the table is an old one or there is none.
        """
        if self.select_every == 1 or _recomputing():
            return
        if torch.compiler.is_compiling() or call is None:
            self._compiled.clear()
            return
        self._by_call.get(call, {}).pop(leader, None)

    def find_or_make(
        self,
        call: Tensor | None,
        key: Any,
        index: int,
        make: Callable[[], Kept],
        draw: Callable[[], None],
    ) -> Kept:
        """The selection of a layer in a call.

        Args:
            call: by which the call is known; None where there is nothing.
            key: of the layers that share it, which all select by the same options.
            index: of the layer. The one that made a selection makes it anew in every forward, whatever is there.
            make: makes one.
            draw: draws of torch's generators what `make` drew of them. Called where backward finds what this layer
                made: what is drawn behind it is then what it was in forward.
        """
        if torch.compiler.is_compiling() or call is None:
            if self.select_every == 1:
                return make()
            known = self._compiled
        else:
            known = self._by_call.get(call)
            if known is None:
                known = self._by_call[call] = {}
        if key not in known or (known[key][0] == index and not _recomputing()):
            known[key] = (index, make())
        elif known[key][0] == index:
            draw()
        return known[key][1]


def _kept(positions: Tensor, tokens: int, counts: Tensor | None = None) -> Kept:
    """A selection; of nothing it has a row that fills up, where other processes wait for the layer to run."""
    if positions.shape[1] == 0 and _has_peers():
        positions = positions.new_full((positions.shape[0], 1), -1)
        counts = positions.new_zeros(positions.shape[0])
    return Kept(positions, tokens, counts)


@dataclass
class Sharing:
    """Layers that share a selection.

    Attributes:
        options: how all of them eliminate: a selection by the options of one would not be that of another.
        leader: number of the layer that selects, the first of them.
    """

    options: EliminationOptions
    leader: int


@dataclass
class LayerElimination:
    """One layer's part: how it eliminates, its place among the others, and what happened so far.

    Attributes:
        sharing: the layers that it shares selections with, all by the same options.
        anatomy: what is known of its parts.
        selections: shared by the model's layers.
        index: its number among the model's decoder layers.
        arguments: names of its class's arguments behind the hidden states.
        predictor: for score="predictor".
        method: what it does with selected tokens, for messages.
        least_keep: the smallest ratio of the schedule that moves `options.keep`; None without one.
        calls: calls in training that computed for some tokens alone.
        tokens, kept_tokens: of those calls, before and after; a tensor where only the device knows.
        dense_calls: calls in training that were for all tokens though they should not have been, by reason.
        latest: of the latest call that was not a recomputation: `(B, T)`, and the rows that it computed, int32 with
            negative ones for none; None for all of them.
    """

    sharing: Sharing
    anatomy: Anatomy
    selections: Selections
    index: int
    arguments: tuple[str, ...]
    predictor: Callable[[Tensor], Tensor] | None = None
    method: str = "token elimination"
    least_keep: float | None = None
    calls: int = 0
    tokens: int = 0
    kept_tokens: int | Tensor = 0
    dense_calls: Counter[str] = field(default_factory=Counter)
    latest: tuple[tuple[int, int], Tensor | None] | None = None

    @property
    def options(self) -> EliminationOptions:
        """How it eliminates; to set them sets those of all layers that it shares selections with."""
        return self.sharing.options

    @options.setter
    def options(self, options: EliminationOptions) -> None:
        self.sharing.options = options

    @property
    def leader(self) -> int:
        """Number of the layer whose selection it uses; its own where that is `index`."""
        return self.sharing.leader

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments behind the hidden states, by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def note_dense(self, reason: str) -> None:
        """Counts a call that was for all tokens, and warns when it is the first one with this reason."""
        if torch.compiler.is_compiling():
            _warn_while_compiling(self.method, reason)
            return
        if _recomputing():
            return
        self.dense_calls[reason] += 1
        if self.dense_calls[reason] == 1:
            warnings.warn(f"{self.method} of layer {self.index} does nothing: {reason}", stacklevel=4)

    def note_call(self, tokens: int, kept: int | Tensor) -> None:
        """Counts a call; under torch.compile calls are not counted."""
        if torch.compiler.is_compiling() or _recomputing():
            return
        self.calls += 1
        self.tokens += tokens
        self.kept_tokens = self.kept_tokens + kept

    def remember(self, x: Tensor, kept: Kept | None) -> None:
        """Keeps which tokens of x `[B, T, H]` this call is for, None for all; not under torch.compile."""
        if not torch.compiler.is_compiling() and not _recomputing():
            self.latest = (x.shape[0], x.shape[1]), None if kept is None else kept.rows

    def nothing_to_drop(self, tokens: int) -> str | None:
        """Why a selection of so many tokens would be all of them; None when it would not, or when all are asked for."""
        options = self.options
        if options.threshold is not None or options.ratio in (0, 1):
            return None
        blocks = tokens // options.block_size
        if blocks < 2:
            return f"its sequences are shorter than two blocks of {options.block_size} tokens"
        if ops.kept_tokens(tokens, options.ratio, options.block_size) == tokens:
            return f"keep={options.ratio}, rounded up to whole blocks, is all of them"
        return None

    def grown_to_all(self, tokens: int) -> bool:
        """Whether all of so many tokens are kept because a schedule has come that far, which began with fewer."""
        least, size = self.least_keep, self.options.block_size
        return least is not None and ops.kept_tokens(tokens, least, size) < tokens

    def select(self, layer: nn.Module, x: Tensor, inputs: Mapping[str, Any]) -> Kept | None:
        """The selection for x `[B, T, H]`; None keeps everything."""
        options = self.options
        if options.threshold is None:
            reason = self.nothing_to_drop(x.shape[1])
            if options.ratio == 1 or (reason is not None and self.grown_to_all(x.shape[1])):
                self.note_call(x.shape[:2].numel(), x.shape[:2].numel())
                return None
            if reason is not None:
                self.note_dense(reason)
                return None
        call = call_of(inputs)
        kept = self.selections.find_or_make(
            call,
            self.leader,
            self.index,
            lambda: self._make(layer, x, inputs, call),
            lambda: self._draw(layer, x, inputs, call),
        )
        if options.bounds_scores and kept.is_all and layer.training:  # else thresholds are being tried
            self.note_dense("no block of this call scores below its threshold")
            return None
        self.note_call(x.shape[:2].numel(), kept.positions.numel() if kept.counts is None else kept.counts.sum())
        return kept

    @torch.no_grad()
    def _make(self, layer: nn.Module, x: Tensor, inputs: Mapping[str, Any], call: Tensor | None) -> Kept:
        options = self.options
        tokens = x.shape[1]
        scores = None if options.ratio == 0 else self.scores(layer, x.detach(), inputs, call)
        if scores is None:
            scores = x.new_zeros(x.shape[0], tokens // options.block_size, dtype=torch.float32)
        positions, counts = ops.select_tokens(
            scores, options.ratio, options.block_size, options.threshold, tokens=tokens
        )
        if options.threshold is None:
            return _kept(positions, tokens)
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():  # the count is the host's
            most, least = int(counts.max()), int(counts.min())
            positions = positions[:, :most].contiguous()
            return _kept(positions, tokens, None if least == most else counts)
        return _kept(positions, tokens, counts)

    @torch.no_grad()
    def _draw(self, layer: nn.Module, x: Tensor, inputs: Mapping[str, Any], call: Tensor | None) -> None:
        score = self.options.score
        ours = score == "random" and self.selections.seed is None
        if self.options.keep != 0 and (ours or callable(score) or score == "predictor"):
            self.scores(layer, x.detach(), inputs, call)

    def scores(self, layer: nn.Module, x: Tensor, inputs: Mapping[str, Any], call: Tensor | None) -> Tensor:
        options = self.options
        size, score = options.block_size, options.score
        if score == "attention":
            attention, part = layer.get_submodule("self_attn"), self.anatomy.attention
            assert isinstance(part, AttentionPart)  # asked before
            norm = layer.get_submodule("input_layernorm")
            with in_evaluation((norm, attention)):  # dropout would make noise, and draw what backward does not draw
                return token_scores.attention_scores(attention, part, norm(x), inputs, size)
        if score == "norm":
            return token_scores.norm_scores(x, inputs, size)
        if _recomputing() and (score == "gradient" or (score == "random" and self.selections.seed is not None)):
            raise RuntimeError(
                f"layer {self.index} cannot select the same tokens again in backward by score={score!r}: checkpoint "
                "layer by layer, as transformers does, so that layers get the rotary embeddings of their forward again"
            )
        if score == "random":
            return token_scores.random_scores(x, inputs, size, self.selections.generator(x.device))
        if score == "gradient":
            given = self.selections.given.take(call, x.shape[0], x.shape[1])
            return token_scores.token_scores(given, inputs, size)
        predictor = score if callable(score) else self.predictor
        if predictor is None:
            raise RuntimeError(
                f'score="predictor" needs a predictor for layer {self.index}, got none; give it to TokenElimination or '
                "elimination.set_predictors"
            )
        return token_scores.predicted_scores(predictor, x, inputs, size)
