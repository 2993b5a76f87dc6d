"""What a LoRA linear must cost at least: the floor that every measured ratio is read against.

With x [M, K], weight [N, K], rank r, e bytes per activation and float32 `hidden` [M, r]:

    operations   frozen forward 2 M N K; forward + backward (dx only) 4 M N K
                 LoRA adds 2 M r (K + N) forward, 6 M r (K + N) forward + backward (hidden, y; grad_hidden, grad_b,
                 grad_a, dx)
    ideal        every byte of the side path hidden behind the GEMM: 1 + added operations / frozen operations
    split        fused kernels beside the GEMM, not hidden by it: `hidden` (one read of x), and backward grad_hidden
                 with grad_b (one read of dy) and grad_a (one read of x); plus `hidden` and `grad_hidden`, written once
                 and read by each kernel that needs them. These cost their traffic or their operations, whichever
                 takes longer. The rank-r products y and dx ride in the GEMM and cost operations only.
    saved        x, which the neighbouring layers usually keep anyway, and `hidden`: e M K + 4 M r

Dropout masks are regenerated, so they add no traffic; their arithmetic is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A LoRA linear: M tokens, K in_features, N out_features, rank r, `element_size` bytes per activation."""

    M: int
    K: int
    N: int
    r: int
    element_size: int

    def frozen_operations(self, backward: bool) -> int:
        """Floating-point operations of the frozen linear."""
        return (4 if backward else 2) * self.M * self.N * self.K

    def added_operations(self, backward: bool) -> int:
        """Floating-point operations that LoRA adds."""
        return (6 if backward else 2) * self.M * self.r * (self.K + self.N)

    def added_bytes(self, backward: bool) -> int:
        """Bytes that the split form moves beside the GEMM."""
        activations = (2 * self.K + self.N) if backward else self.K
        hidden_passes = 6 if backward else 2
        return self.M * (activations * self.element_size + hidden_passes * 4 * self.r)

    def saved_bytes(self) -> int:
        """Bytes kept for backward by a form that saves x and float32 `hidden` only."""
        return self.M * (self.K * self.element_size + 4 * self.r)

    def ideal_ratio(self, backward: bool) -> float:
        """Time relative to the frozen linear when nothing but operations costs time."""
        return 1.0 + self.added_operations(backward) / self.frozen_operations(backward)

    def split_ratio(self, backward: bool, frozen_seconds: float, bytes_per_second: float) -> float:
        """Time relative to the frozen linear in the split form, from two rates measured on the device.

        Args:
            frozen_seconds: time of the frozen linear, which fixes the GEMM's rate.
            bytes_per_second: rate of a large copy, reads and writes counted.
        """
        rate = self.frozen_operations(backward) / frozen_seconds
        in_gemm = 2 * self.M * self.r * ((self.K + self.N) if backward else self.N)
        beside = self.added_operations(backward) - in_gemm
        beside_seconds = max(self.added_bytes(backward) / bytes_per_second, beside / rate)
        return 1.0 + (beside_seconds + in_gemm / rate) / frozen_seconds

    def record(self, seconds: dict[str, float], bytes_per_second: float) -> dict[str, dict[str, float]]:
        """The limits as they go into a result file; `seconds` is the frozen linear's time per mode.

        Modes are `"forward"` and `"forward+backward"`.
        """
        limits = {}
        for mode, frozen_seconds in seconds.items():
            backward = mode == "forward+backward"
            limits[mode] = {
                "frozen_operations": self.frozen_operations(backward),
                "added_operations": self.added_operations(backward),
                "split_added_bytes": self.added_bytes(backward),
                "ideal_ratio": self.ideal_ratio(backward),
                "split_ratio": self.split_ratio(backward, frozen_seconds, bytes_per_second),
            }
        return limits
