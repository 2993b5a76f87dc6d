"""Predictors of block scores: what `score="predictor"` asks instead of a layer's queries and keys.

`ops.block_scores` takes `T^2 / 2 * heads * D` multiply-adds, and the queries and keys of all tokens before that. A
predictor takes `T H rank + 2 n rank size + n^2 size` for n blocks, which is less than one of the layer's own
projections.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.decoder_layer import missing_parts
from ..planning import unwrapped
from .model import eliminating_layers, set_predictors

_EPS = 1e-6


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def parameter_shapes(hidden_size: int, rank: int, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a `BlockPredictor`'s parameters by name."""
    shapes: dict[str, tuple[int, ...]] = {"first.weight": (rank, hidden_size), "first.bias": (rank,)}
    for name in ("queries", "keys"):
        shapes.update({f"{name}.weight": (size, rank), f"{name}.bias": (size,)})
    return shapes


def _inverse_rms(hidden: Tensor) -> Tensor:
    """`[..., 1]`, of float32 `[..., H]`."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return (norm.square() / hidden.shape[-1] + _EPS).rsqrt()


class BlockPredictor(nn.Module):
    """Block scores from the hidden states that go into a layer.

        u = x / rms(x);  f[a] = max over i in block a of relu(first u_i)
        S[a, b] = relu(queries f[a] . keys f[b]);  score[b] = sum over a >= b of S[a, b]

    which is `ops.block_scores` of heads that are one, and of queries and keys that a block has one each. Of an
    unfinished last block there is a query and no score, as there. It is told neither padding nor where documents end.

    Args:
        hidden_size: H.
        rank: neurons of the first layer.
        size: channels of queries and keys.
        block_size: tokens per block.
        generator: of the initial weights; torch's where it is None.

    Raises:
        TypeError, ValueError: an argument is no integer of at least 1.

    Source: Wang et al., "LeMo", 2025 (JENGA, USENIX ATC 2025), section 4.2: low-rank predictors, `S = qx kx^T`.
    """

    def __init__(
        self, hidden_size: int, rank: int, size: int, block_size: int, generator: torch.Generator | None = None
    ) -> None:
        named = {"hidden_size": hidden_size, "rank": rank, "size": size, "block_size": block_size}
        for name, value in named.items():
            check_count(name, value)
        super().__init__()
        self.block_size = block_size
        self.first = nn.utils.skip_init(nn.Linear, hidden_size, rank)
        self.queries = nn.utils.skip_init(nn.Linear, rank, size)
        self.keys = nn.utils.skip_init(nn.Linear, rank, size)
        with torch.no_grad():
            self.first.weight.normal_(std=hidden_size**-0.5, generator=generator)
            self.first.bias.zero_()
            for layer in (self.queries, self.keys):
                layer.weight.normal_(std=0.4 * (rank * size) ** -0.5, generator=generator)
                layer.bias.fill_(size**-0.5)  # S begins near 1, where relu has a gradient: blocks in order of age

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.first.in_features

    @property
    def rank(self) -> int:
        """Neurons of the first layer."""
        return self.first.out_features

    @property
    def size(self) -> int:
        """Channels of queries and keys."""
        return self.queries.out_features

    @staticmethod
    def normalized(hidden: Tensor) -> Tensor:
        """u, hidden `[..., H]` over its root mean square, float32."""
        wide = hidden.float()
        return wide * _inverse_rms(wide)

    def features(self, tokens: Tensor) -> Tensor:
        """f, the largest activation of each neuron in each block, an unfinished one included.

        Args:
            tokens: u, float32 `[B, T, H]`.

        Returns:
            `[B, ceil(T / block_size), rank]`; none is negative.
        """
        return self._of_blocks(self.first(tokens))

    def neurons(self, hidden: Tensor) -> Tensor:
        """What the neurons are before relu, float32 `[B, T, rank]`, from hidden `[B, T, H]`."""
        wide = hidden.float()
        # The norm behind the product is a pass over hidden less.
        return (wide @ self.first.weight.T) * _inverse_rms(wide) + self.first.bias

    def _of_blocks(self, neurons: Tensor) -> Tensor:
        """f from what the neurons `[B, T, rank]` are before relu."""
        active, missing = neurons.relu(), -neurons.shape[1] % self.block_size
        if missing:
            active = F.pad(active, (0, 0, 0, missing))  # 0 is the least there is
        return active.unflatten(1, (-1, self.block_size)).amax(2)

    def products(self, features: Tensor, blocks: int) -> Tensor:
        """queries f[a] . keys f[b], `[B, a, b]`, for the first `blocks` keys."""
        return self.queries(features) @ self.keys(features[:, :blocks]).transpose(1, 2)

    def scores(self, features: Tensor, blocks: int) -> Tensor:
        """`[B, blocks]` from f."""
        return self.products(features, blocks).relu().tril().sum(1)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, H]`, of any floating dtype, to float32 `[B, T // block_size]`.

        Raises:
            ValueError: hidden is not such a tensor, or on another device than the parameters.
        """
        weight = self.first.weight
        if not hidden.is_floating_point() or hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden must be floating [B, T, {self.hidden_size}], got {hidden.dtype} {list(hidden.shape)}"
            )
        if hidden.device != weight.device:
            raise ValueError(f"hidden must be on the predictor's device, {weight.device}, got {hidden.device}")
        blocks = hidden.shape[1] // self.block_size
        if blocks == 0:
            return weight.new_zeros(hidden.shape[0], 0)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.scores(self._of_blocks(self.neurons(hidden)), blocks)

    @torch.no_grad()
    def fold(self, center: Tensor, scale: Tensor, gain: float) -> None:
        """Takes into the weights that the first layer saw `(u - center) * scale`, `[H]` each, and a factor of S."""
        self.first.bias -= self.first.weight @ (center * scale)
        self.first.weight *= scale
        for layer in (self.keys.weight, self.keys.bias):
            layer *= gain

    def without(self, dead: Tensor) -> BlockPredictor:
        """A predictor without the neurons where dead, bool `[rank]`, is true; one is left in any case."""
        kept = (~dead).nonzero()[:, 0]
        if len(kept) == 0:
            kept = torch.zeros(1, dtype=torch.int64, device=dead.device)
        scratch = torch.Generator()  # so that torch's is left as it was
        smaller = BlockPredictor(self.hidden_size, len(kept), self.size, self.block_size, scratch).to(kept.device)
        with torch.no_grad():
            smaller.first.weight.copy_(self.first.weight[kept])
            smaller.first.bias.copy_(self.first.bias[kept])
            for name in ("queries", "keys"):
                own, its = self.get_submodule(name), smaller.get_submodule(name)
                its.weight.copy_(own.weight[:, kept])  # type: ignore[operator, index]
                its.bias.copy_(own.bias)  # type: ignore[operator]
        return smaller.requires_grad_(weight_trains(self))

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"


def weight_trains(predictor: BlockPredictor) -> bool:
    """Whether its parameters get gradients."""
    return predictor.first.weight.requires_grad


class Predictors(Mapping[int, BlockPredictor]):
    """The predictors of a model, by index of the decoder layer; `elimination.set_predictors` takes it too.

    Args:
        predictors: at least one; all of one block size and one hidden size.
        base_model: name of the model that they were trained on, None where it has none.

    Attributes:
        base_model: see there.

    Raises:
        TypeError, ValueError: they are not that.
    """

    def __init__(self, predictors: Mapping[int, BlockPredictor], base_model: str | None = None) -> None:
        if not predictors:
            raise ValueError("predictors must hold at least one, got none")
        for index, predictor in predictors.items():
            check_count("an index of predictors", index, 0)
            if not isinstance(predictor, BlockPredictor):
                raise TypeError(f"predictors[{index}] must be a BlockPredictor, got {type(predictor).__name__}")
        for name in ("block_size", "hidden_size"):
            found = sorted({getattr(predictor, name) for predictor in predictors.values()})
            if len(found) > 1:
                raise ValueError(f"predictors must be of one {name}, got {found}")
        self._predictors = dict(sorted(predictors.items()))
        self.base_model = base_model

    def __getitem__(self, index: int) -> BlockPredictor:
        return self._predictors[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._predictors)

    def __len__(self) -> int:
        return len(self._predictors)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return next(iter(self.values())).block_size

    @property
    def hidden_size(self) -> int:
        """H."""
        return next(iter(self.values())).hidden_size

    def attach(self, model: nn.Module) -> None:
        """Gives each layer of the model with score="predictor" its predictor, on that layer's device.

        Args:
            model: one that eliminates tokens. Predictors of its other layers are left out.

        Raises:
            ValueError: no layer has this score, one has no predictor here, another block size or another width. Nothing
                has changed.
        """
        model = unwrapped(model)
        layers = {
            layer.elimination.index: layer
            for layer in eliminating_layers(model).values()
            if layer.elimination.options.score == "predictor"
        }
        if not layers:
            raise ValueError('model must have layers that eliminate tokens with score="predictor", and has none')
        missing = sorted(layers.keys() - self.keys())
        if missing:
            raise ValueError(f"predictors must be there for the layers {sorted(layers)}, got none for {missing}")
        for index, layer in layers.items():
            size = layer.elimination.options.block_size
            if size != self.block_size:
                raise ValueError(f"predictors are for blocks of {self.block_size} tokens, layer {index} has {size}")
            check_width(layer, self.hidden_size)
        places = {index: next(layer.parameters()).device for index, layer in layers.items()}
        for index, device in places.items():
            self._predictors[index].to(device)
        set_predictors(model, {index: self[index] for index in layers})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `predictor_config.json` and `predictor_model.safetensors`; see `predictor_files.write`."""
        from .predictor_files import write

        write(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Predictors:
        """Reads what `save` wrote, onto the CPU; see `predictor_files.read` for what it raises."""
        from .predictor_files import read

        return read(directory)


def check_width(layer: nn.Module, hidden_size: int) -> None:
    """Raises ValueError unless a decoder layer's hidden states are so wide."""
    if missing_parts(layer):
        raise ValueError(f"a decoder layer must have all its parts, and has no {missing_parts(layer)}")
    width = layer.get_submodule("input_layernorm").weight.shape[0]
    if width != hidden_size:
        raise ValueError(f"predictors are for hidden states of {hidden_size} channels, the model has {width}")
