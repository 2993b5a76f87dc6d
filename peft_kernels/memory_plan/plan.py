"""What a training step holds at its peak, part by part, and the longest sequence that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .activations import layer_bytes, workspace_bytes
from .settings import CHUNK_BYTES, DTYPE_BYTES, StepSettings
from .shape import ModelShape

_FULL_LOGITS = 12  # bytes per logit at the peak: bfloat16, its float32 softmax, that one's gradient, cast again
_POSITION = 4  # bytes of an index


@dataclass(frozen=True)
class Component:
    """One part of the whole.

    Attributes:
        name: what it is.
        bytes: how large.
        note: how it comes about.
    """

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of one step at its peak."""

    shape: ModelShape
    step: StepSettings
    components: tuple[Component, ...]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(component.bytes for component in self.components)


def plan_memory(shape: ModelShape, step: StepSettings) -> MemoryPlan:
    """What `step` holds at its peak, part by part; calculated, nothing is run.

    Peaks of the parts do not all fall together, so the sum is an upper bound by as much as the workspace of the layers
    and that of the loss share.
    """
    weights = shape.parameters * step.bytes
    components = [Component("weights", weights, f"{shape.parameters / 1e6:,.0f}M parameters in {step.dtype}")]
    components += _trained(shape, step)
    components += _activations(shape, step)
    components.append(Component("workspace of a layer", workspace_bytes(shape, step), "the widest moment of backward"))
    components.append(_loss(shape, step))
    return MemoryPlan(shape, step, tuple(components))


def _trained(shape: ModelShape, step: StepSettings) -> list[Component]:
    count = step.trained(shape)
    if step.method == "full":
        return [
            Component("gradients", count * step.bytes, f"in {step.dtype}"),
            Component("optimizer", 2 * count * step.bytes, f"two moments in {step.dtype}"),
        ]
    size = DTYPE_BYTES[step.adapter_dtype]
    positions = count * _POSITION if step.method == "sparse_delta" else 0
    originals = count * step.bytes if step.method in ("sparse_delta", "s2ft") else 0
    note = f"{count / 1e6:,.1f}M numbers in {step.adapter_dtype}"
    if positions:
        note += ", their positions, what the weights held there"
    elif originals:
        note += ", and what the weights held there"
    return [
        Component("adapter", count * size + positions + originals, note),
        Component("gradients", count * size, f"in {step.adapter_dtype}"),
        Component("optimizer", 2 * count * size, f"two moments in {step.adapter_dtype}"),
    ]


def _activations(shape: ModelShape, step: StepSettings) -> list[Component]:
    eliminating = step.eliminating(shape)
    dense = shape.layers - eliminating
    plain, less = layer_bytes(shape, step, False), layer_bytes(shape, step, True)
    if step.checkpointing:
        inputs = shape.layers * step.batch_size * step.seq_len * shape.hidden * step.bytes
        largest = max(plain.total if dense else 0, less.total if eliminating else 0)
        return [
            Component("checkpoints", inputs, f"the input of each of {shape.layers} layers, all tokens"),
            Component("activations of a layer", largest, "formed again, one layer at a time"),
        ]
    parts = []
    for name in ("attention", "mlp", "adapter", "positions"):
        size = dense * getattr(plain, name) + eliminating * getattr(less, name)
        if size:
            parts.append(Component(f"activations: {_NAMES[name]}", size, _kept(step, name, dense, eliminating)))
    return parts


_NAMES = {"attention": "attention", "mlp": "MLP", "adapter": "adapter", "positions": "positions"}


def _kept(step: StepSettings, name: str, dense: int, eliminating: int) -> str:
    if not eliminating:
        return f"all tokens in {dense} layers"
    if name == "positions":
        return "which tokens are kept"
    if name == "adapter":
        return "what the gradients of what trains need"
    kept = step.kept(step.keep_attention if name == "attention" else step.keep_mlp)
    return f"{kept} of {step.seq_len} tokens in {eliminating} layers, all in {dense}"


def _loss(shape: ModelShape, step: StepSettings) -> Component:
    tokens = step.batch_size * step.seq_len
    hidden = tokens * shape.hidden * step.bytes
    if step.logits == "full":
        size = _FULL_LOGITS if step.bytes == 2 else 3 * step.bytes
        return Component("loss", tokens * shape.vocabulary * size, f"all logits, {size} bytes each at the peak")
    rows = min(tokens, max(1, CHUNK_BYTES // (shape.vocabulary * step.bytes)))
    chunk = rows * shape.vocabulary * step.bytes
    return Component("loss", chunk + 2 * hidden, f"logits of {rows} tokens at a time, gradient of hidden states")


def longest_sequence(shape: ModelShape, step: StepSettings, budget: int) -> int:
    """The most tokens per sequence, a multiple of the block size, whose step fits into `budget` bytes; 0 if none."""

    def fits(blocks: int) -> bool:
        return plan_memory(shape, replace(step, seq_len=blocks * step.block_size)).total <= budget

    return _largest(fits) * step.block_size


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all smaller ones do; 0 if not even 1 does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
