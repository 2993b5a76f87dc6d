"""What `inject` and `accelerate` did, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
            key = (layer.path.rpartition(".")[2], layer.reason or "fused")
            groups[key] += 1
            example.setdefault(key, layer.path)
        ordered = sorted(groups.items(), key=lambda item: (item[0][1] != "fused", -item[1]))
        width = max((len(name) for (name, _), _ in ordered), default=0)
        return [
            f"  {count:>5} x {name:<{width}}  {reason}" + (f"  ({example[name, reason]})" if count == 1 else "")
            for (name, reason), count in ordered
        ]

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {len(self.fused)} of {len(self.layers)} layers fused"
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
class EliminatedLayer:
    """One decoder layer and the tokens that it computed for.

    Attributes:
        path: where it sits in the model.
        kind: its class, by name, as it was before.
        reason: why it computes for all tokens; None where it eliminates some.
        keep: its keep ratio.
        score: what it chooses tokens by.
        threshold: blocks with a smaller score are not kept either; None where there is none.
        apply_to: which half of it computes for kept tokens alone.
        own_parts: parts that run as the modules they are, and may keep more for backward, with the reason.
        calls: calls in training that computed for kept tokens alone.
        tokens, kept_tokens: of these calls, in all.
        dense_calls: calls in training that computed for all tokens although they should not have, by reason.
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
    def eliminates(self) -> bool:
        """Whether it computes for some tokens alone in training."""
        return self.reason is None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.path}: dense, {self.reason}"
        threshold = "" if self.threshold is None else f" of at least {self.threshold:g}"
        line = f"{self.path}: keep={self.keep:g} by {self.score}{threshold}, {self.apply_to}"
        if self.calls:
            line += f", {self.calls} calls, {self.kept_tokens} of {self.tokens} tokens kept"
        parts = [f"; {count} dense calls: {reason}" for reason, count in self.dense_calls.items()]
        parts += [f"; {name} runs as it is: {reason}" for name, reason in self.own_parts.items()]
        return line + "".join(parts)


@dataclass(frozen=True)
class EliminationReport:
    """Every decoder layer of a model, and whether it computes for some tokens alone in training."""

    layers: tuple[EliminatedLayer, ...]

    @property
    def eliminating(self) -> tuple[EliminatedLayer, ...]:
        """The layers that do."""
        return tuple(layer for layer in self.layers if layer.eliminates)

    @property
    def dense(self) -> tuple[EliminatedLayer, ...]:
        """The layers that do not, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.eliminates)

    def __str__(self) -> str:
        head = f"{type(self).__name__}: {len(self.eliminating)} of {len(self.layers)} decoder layers eliminate tokens"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])
