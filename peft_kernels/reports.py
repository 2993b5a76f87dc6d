"""What `inject` and `accelerate` did, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        path: where it sits in the model.
        kind: its class, by name.
        reason: why it does not run fused; None when it does.
    """

    path: str
    kind: str
    reason: str | None = None

    @property
    def fused(self) -> bool:
        """Whether it runs on our kernels."""
        return self.reason is None


@dataclass(frozen=True)
class _LayersReport:
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    verdict: ClassVar[str] = "fused"
    """What is said of a layer without a reason against it."""

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """The layers that run fused."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """The layers that do not, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.fused)

    def _grouped(self) -> list[str]:
        """One line per (name, reason), most frequent first; a name is a path's last component."""
        groups: Counter[tuple[str, str]] = Counter()
        example: dict[tuple[str, str], str] = {}
        for layer in self.layers:
            key = (layer.path.rpartition(".")[2], layer.reason or self.verdict)
            groups[key] += 1
            example.setdefault(key, layer.path)
        ordered = sorted(groups.items(), key=lambda item: (item[0][1] != self.verdict, -item[1]))
        width = max((len(name) for (name, _), _ in ordered), default=0)
        return [
            f"  {count:>5} x {name:<{width}}  {reason}" + (f"  ({example[name, reason]})" if count == 1 else "")
            for (name, reason), count in ordered
        ]

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {len(self.fused)} of {len(self.layers)} layers {self.verdict}"
        return "\n".join([head, *self._grouped(), *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class AccelerationReport(_LayersReport):
    """What `accelerate` found: every adapter layer of the model, fused or left alone with the reason.

    A layer left alone because of its present state (adapter disabled, merged, two adapters active, a hook inside it)
    is looked at again in every call, and runs fused as soon as the reason is gone.
    """


@dataclass(frozen=True)
class InjectionReport(_LayersReport):
    """What `inject` did: every linear layer of the model, replaced or left alone with the reason.

    Attributes:
        trainable_parameters: number of parameters that train.
        all_parameters: number of parameters of the model, adapter included.
    """

    trainable_parameters: int = field(default=0, kw_only=True)
    all_parameters: int = field(default=0, kw_only=True)

    def print_trainable_parameters(self) -> None:
        """Prints the counts in the form PEFT prints them."""
        share = 100 * self.trainable_parameters / max(self.all_parameters, 1)
        print(
            f"trainable params: {self.trainable_parameters:,d} || all params: {self.all_parameters:,d} "
            f"|| trainable%: {share:.4f}"
        )


@dataclass(frozen=True)
class SamplingReport(_LayersReport):
    """What `inject` with a `WTACRSConfig` did: every linear layer, sampling or left alone with the reason.

    Attributes:
        keep_ratio: share of the rows of its input that a sampling layer keeps for its weight gradient.
    """

    keep_ratio: float = field(default=1.0, kw_only=True)

    verdict: ClassVar[str] = "sampling"

    def __str__(self) -> str:
        return f"{super().__str__()}\n  each keeps {self.keep_ratio:g} of its input's rows for the weight gradient"


@dataclass(frozen=True)
class EliminatedLayer:
    """One decoder layer and the tokens that it selected.

    Kept tokens are those that a layer computed for; with TokenTune, those that it kept activations of.

    Attributes:
        path: where it sits in the model.
        kind: its class, by name, as it was before.
        reason: why it treats all tokens alike; None where it selects some.
        keep: its keep ratio.
        score: what it chooses tokens by.
        threshold: blocks with a smaller score are not kept either; None where there is none.
        apply_to: which half of it computes for kept tokens alone; None with TokenTune.
        own_parts: parts that run as the modules they are, and may keep more for backward, with the reason.
        calls: calls in training that selected tokens.
        tokens, kept_tokens: of these calls, in all.
        dense_calls: calls in training for all tokens although it should have been some, by reason.
    """

    path: str
    kind: str
    reason: str | None = None
    keep: float | None = None
    score: str | None = None
    apply_to: str | None = None
    threshold: float | None = None
    own_parts: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    dense_calls: dict[str, int] = field(default_factory=dict)

    @property
    def selects(self) -> bool:
        """Whether it selects tokens in training."""
        return self.reason is None

    @property
    def eliminates(self) -> bool:
        """Whether it computes for some tokens alone in training."""
        return self.selects

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.path}: dense, {self.reason}"
        line = f"{self.path}: keep={self.keep:g} by {self.score}"
        if self.threshold is not None:
            line += f" of at least {self.threshold:g}"
        if self.apply_to is not None:
            line += f", {self.apply_to}"
        if self.calls:
            line += f", {self.calls} calls, {self.kept_tokens} of {self.tokens} tokens kept"
        parts = [f"; {count} dense calls: {reason}" for reason, count in self.dense_calls.items()]
        parts += [f"; {name} runs as it is: {reason}" for name, reason in self.own_parts.items()]
        return line + "".join(parts)


@dataclass(frozen=True)
class _TokenReport:
    layers: tuple[EliminatedLayer, ...]

    _what: ClassVar[str]

    @property
    def selecting(self) -> tuple[EliminatedLayer, ...]:
        """The layers that select tokens in training."""
        return tuple(layer for layer in self.layers if layer.selects)

    @property
    def dense(self) -> tuple[EliminatedLayer, ...]:
        """The layers that do not, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.selects)

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {len(self.selecting)} of {len(self.layers)} decoder layers {self._what}"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])


@dataclass(frozen=True)
class EliminationReport(_TokenReport):
    """Every decoder layer of a model, and whether it computes for some tokens alone in training."""

    _what = "eliminate tokens"

    @property
    def eliminating(self) -> tuple[EliminatedLayer, ...]:
        """The layers that do."""
        return self.selecting


@dataclass(frozen=True)
class TokenTuneReport(_TokenReport):
    """Every decoder layer of a model, and whether it has gradients for selected tokens alone in training."""

    _what = "have gradients for selected tokens alone"
