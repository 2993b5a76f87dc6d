"""Offers: what layers keep instead of their input, that gradients do not change, and when what was formed is let go."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops
from peft_kernels.ops import recompute

from ..support.accuracy import assert_same_bits
from ..support.token_elimination import rows_of

HIDDEN, RANK = 16, 4
TOKENS = 24
TWICE = ("lora", "sparse_delta", "s2ft", "attach_delta")  # have second derivatives
LAYERS = (*TWICE, "quantized", "linear")
POSITIONS = torch.tensor([0, 3, 40, 41, 250])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class Recorder:
    """A recipe that counts how often it was used, and sees whether what it formed still lives."""

    formed: list[weakref.ref] = field(default_factory=list)

    def watch(self, form):
        def watched(*sources):
            result = form(*sources)
            self.formed.append(weakref.ref(result))
            return result

        return watched

    def alive(self):
        return [reference() is not None for reference in self.formed]


class Block:
    """q, k and v of the normalized kept rows, each by another kind of layer if wanted."""

    def __init__(self, kinds=("lora",) * 3, dtype=torch.float32, train_x=True):
        self.kinds, self.recorder = kinds, Recorder()
        self.x = normal(2, TOKENS // 2, HIDDEN, dtype=dtype).requires_grad_(train_x)
        self.norm = normal(HIDDEN, seed=1).requires_grad_()
        self.rows = rows_of("sequences", TOKENS)
        self.weights = [normal(HIDDEN, HIDDEN, dtype=dtype, seed=2 + i) / 4 for i in range(len(kinds))]
        self.trained = [self._trained(i, kind) for i, kind in enumerate(kinds)]

    def _trained(self, i, kind):
        if kind == "lora":
            return [
                normal(RANK, HIDDEN, seed=10 + i).requires_grad_(),
                normal(HIDDEN, RANK, seed=20 + i).requires_grad_(),
            ]
        if kind in ("sparse_delta", "attach_delta", "quantized"):
            return [normal(5, seed=10 + i).requires_grad_()]
        if kind == "s2ft":
            return [self.weights[i][[1, 3]].detach().float().requires_grad_()]
        return [self.weights[i].requires_grad_()]

    def leaves(self):
        return [self.x] * self.x.requires_grad + [self.norm] + [t for ts in self.trained for t in ts]

    def layer(self, i, h):
        weight, own = self.weights[i], self.trained[i]
        if self.kinds[i] == "lora":
            return ops.lora_linear(h, weight, None, *own, 0.5)
        if self.kinds[i] == "sparse_delta":
            return ops.sparse_delta_linear(h, weight, None, own[0], POSITIONS)
        if self.kinds[i] == "attach_delta":
            return ops.attach_delta(F.linear(h, weight), h, own[0], POSITIONS)
        if self.kinds[i] == "quantized":
            dequantize = lambda dtype: weight.detach().to(dtype, copy=True)  # noqa: E731
            return ops.quantized_sparse_delta_linear(h, dequantize, None, own[0], POSITIONS)
        if self.kinds[i] == "s2ft":
            return ops.s2ft_linear(h, weight, None, own[0], torch.tensor([1, 3]), "output")
        return ops.gather_linear_scatter(h[0], weight, None, self.rows, gathered=True)[None]

    def parts(self, x, offer=True, run=None):
        """The residual and what each layer gives; `run(i, function, h)` calls a layer, unless it is None."""
        residual, h, (kept, rstd) = ops.split_rms_norm(x * 1, self.rows, self.norm, 1e-6)
        sources, form = recompute.norm_recipe(kept, rstd, self.norm)
        with recompute.offered(h, sources, self.recorder.watch(form)) if offer else nullcontext():
            run = run or (lambda i, layer, h: layer(h))
            return residual, [run(i, partial(self.layer, i), h[None])[0] for i in range(len(self.kinds))]

    def __call__(self, x, offer=True, run=None):
        residual, parts = self.parts(x, offer, run)
        return ops.scatter_add_rows(residual, torch.stack(parts).sum(0).to(residual.dtype), self.rows)

    def gradients(self, y, **options):
        return torch.autograd.grad(y.float().square().sum(), self.leaves(), **options)


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        result = call()
    return result, {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}


@DTYPES
@pytest.mark.parametrize("kinds", [*((kind,) * 3 for kind in LAYERS), LAYERS], ids="-".join)
def test_gradients_are_those_without_an_offer_and_the_input_is_formed_once(kinds, dtype):
    block = Block(kinds, dtype)
    expected = block.gradients(block(block.x, offer=False))
    assert not block.recorder.formed
    found = block.gradients(block(block.x))
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right)
    assert block.recorder.alive() == [False]


@DTYPES
@pytest.mark.parametrize("kind", LAYERS)
def test_the_input_is_not_kept(kind, dtype):
    block = Block((kind,) * 3, dtype)
    count, size = block.rows.shape[0], block.x.element_size()
    _, with_offer = saved_by(lambda: block(block.x))
    _, without = saved_by(lambda: block(block.x, offer=False))
    assert sum(without.values()) - sum(with_offer.values()) == count * HIDDEN * size
    # What is left: the norm's rows and scale, LoRA's hidden, and tensors that were there before.
    before = {t.untyped_storage().data_ptr() for t in (block.rows, block.norm, POSITIONS, *block.weights)}
    before |= {t.untyped_storage().data_ptr() for ts in block.trained for t in ts}
    own = sum(size for key, size in with_offer.items() if key not in before)
    hidden = 3 * count * RANK * 4 if kind == "lora" else 0
    indices = 3 * 2 * 8 if kind == "s2ft" else 0
    assert own == count * HIDDEN * size + count * 4 + hidden + indices


def mlp(gate, up, factors, weight, offer, recorder):
    h = ops.swiglu(gate, up)
    sources, form = recompute.swiglu_recipe(gate, up)
    with recompute.offered(h, sources, recorder.watch(form)) if offer else nullcontext():
        return ops.lora_linear(h, weight, None, *factors, 0.5)


@DTYPES
def test_a_gated_activation_is_formed_from_gate_and_up(dtype):
    gate, up = (normal(3, 7, HIDDEN, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    factors = normal(RANK, HIDDEN, seed=2).requires_grad_(), normal(HIDDEN, RANK, seed=3).requires_grad_()
    weight, recorder = normal(HIDDEN, HIDDEN, dtype=dtype, seed=4), Recorder()
    wanted = [gate, up, *factors]

    def call(offer):
        return mlp(gate, up, factors, weight, offer, recorder)

    expected = torch.autograd.grad(call(False).square().sum(), wanted)
    y, saved = saved_by(lambda: call(True))
    for left, right in zip(torch.autograd.grad(y.square().sum(), wanted), expected, strict=True):
        assert_same_bits(left, right)
    assert recorder.alive() == [False]
    for tensor in (gate, up, weight, *factors):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) == 21 * RANK * 4, "LoRA's hidden and nothing else"


def test_a_graph_that_is_kept_gives_the_same_again():
    block = Block()
    y = block(block.x)
    first, second = block.gradients(y, retain_graph=True), block.gradients(y)
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left, right)
    assert block.recorder.alive() == [False, False], "formed once in each pass"


@pytest.mark.parametrize("used", [(0,), (2,), (0, 1)], ids=str)
def test_layers_that_do_not_run_hold_nothing_back(used):
    block = Block()
    residual, parts = block.parts(block.x)
    loss = sum(parts[i].square().sum() for i in used) + residual.sum()
    wanted = [t for i in used for t in block.trained[i]]
    found = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert block.recorder.alive() == [False], "let go of at the end of the pass, while the graph lives"
    everything = torch.autograd.grad(sum(part.square().sum() for part in parts), wanted)
    for left, right in zip(found, everything, strict=True):
        assert_same_bits(left, right)
    assert block.recorder.alive() == [False, False]


@DTYPES
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing_over_an_offer(kind, use_reentrant, dtype):
    block = Block((kind,) * 3, dtype)
    expected = block.gradients(block(block.x, offer=False))
    checkpoint(block, block.x, use_reentrant=use_reentrant).float().square().sum().backward()
    for tensor, right in zip(block.leaves(), expected, strict=True):
        assert_same_bits(tensor.grad, right)
    assert block.recorder.alive() == [False]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("checkpointed", [LAYERS, LAYERS[::2]], ids=["all", "some"])
def test_checkpointing_inside_an_offer(checkpointed, use_reentrant, autocast):
    """By the time a layer runs again the offer is over: it must not have been taken at first."""

    def run(i, layer, h):
        return checkpoint(layer, h, use_reentrant=use_reentrant) if LAYERS[i] in checkpointed else layer(h)

    block = Block(LAYERS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = block.gradients(block(block.x, offer=False))
        y = block(block.x, run=run)
    y.square().sum().backward()
    for tensor, right in zip(block.leaves(), expected, strict=True):
        assert_same_bits(tensor.grad, right)
    assert block.recorder.alive() == [False] * (checkpointed != LAYERS)


def test_layers_under_hooks_of_their_own_keep_their_input():
    h, recorder, seen = normal(6, HIDDEN), Recorder(), []
    with (
        recompute.offered(h, (h.clone(),), recorder.watch(torch.clone)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t),
    ):
        lora_of(h)()
    assert h.data_ptr() in seen and not recorder.formed


@pytest.mark.parametrize("kinds", [*((kind,) * 3 for kind in LAYERS), LAYERS], ids="-".join)
def test_under_autocast_the_input_is_cast_and_formed_once_and_not_kept(kinds):
    block = Block(kinds)
    with torch.autocast("cpu", torch.bfloat16):
        without, saved_without = saved_by(lambda: block(block.x, offer=False))
        y, saved = saved_by(lambda: block(block.x))
    expected = block.gradients(without)
    assert not block.recorder.formed
    for left, right in zip(block.gradients(y), expected, strict=True):
        assert_same_bits(left, right)
    assert len(block.recorder.formed) == 1
    own_copies = len(kinds) * block.rows.shape[0] * HIDDEN * 2
    assert sum(saved_without.values()) - sum(saved.values()) == own_copies


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpointing_over_an_offer_under_autocast(use_reentrant):
    block = Block(LAYERS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block.gradients(block(block.x, offer=False))
        y = checkpoint(block, block.x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for tensor, right in zip(block.leaves(), expected, strict=True):
        assert_same_bits(tensor.grad, right)
    assert len(block.recorder.formed) == 1


def test_a_cast_is_one_copy_for_each_dtype_of_what_is_on_offer():
    h = normal(6, HIDDEN).requires_grad_()
    with recompute.offered(h, (h.detach(),), torch.clone):
        one, other, half = (
            recompute.cast(x, dtype)
            for x, dtype in ((h, torch.bfloat16), (h.view(2, 3, HIDDEN), torch.bfloat16), (h, torch.float16))
        )
        assert one.data_ptr() == other.data_ptr() != half.data_ptr()
        assert recompute.cast(h, torch.float32) is h
        another = recompute.cast(h[:5], torch.bfloat16)
        with torch.no_grad():
            h.add_(1)
        changed = recompute.cast(h, torch.bfloat16)
    after = recompute.cast(h, torch.bfloat16)
    assert_same_bits(other, (h - 1).detach().to(torch.bfloat16).view(2, 3, HIDDEN))
    assert len({tensor.data_ptr() for tensor in (one, half, another, changed, after)}) == 5
    assert_same_bits(changed, after)
    for copy in (one, other, half, after):
        grad = torch.randn(copy.shape, generator=torch.Generator().manual_seed(1)).to(copy.dtype)
        assert_same_bits(torch.autograd.grad(copy, h, grad)[0], grad.float().view(6, HIDDEN))


def test_a_pass_that_fails_lets_go_of_what_it_formed():
    block = Block()
    residual, parts = block.parts(block.x)
    loss = sum(part.square().sum() for part in parts) + residual.sum()
    failing = parts[0].register_hook(lambda grad: pytest.fail("a hook's error"))  # behind the others
    with pytest.raises(pytest.fail.Exception, match="a hook's error"):
        block.gradients(loss, retain_graph=True)
    assert block.recorder.alive() == [False], "while the graph lives"
    failing.remove()
    found = block.gradients(loss)
    residual, parts = block.parts(block.x, offer=False)
    expected = block.gradients(sum(part.square().sum() for part in parts) + residual.sum())
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right)
    assert block.recorder.alive() == [False, False]


def test_saved_tensors_may_be_kept_elsewhere():
    block = Block()
    expected = block.gradients(block(block.x, offer=False))
    with torch.autograd.graph.save_on_cpu():
        y = block(block.x)
    for left, right in zip(block.gradients(y), expected, strict=True):
        assert_same_bits(left, right)


def test_two_threads_go_back_through_one_graph():
    block = Block()
    y = block(block.x)
    expected = block.gradients(y, retain_graph=True)
    found = [[] for _ in range(4)]
    passes = [
        threading.Thread(target=lambda own=own: own.extend(block.gradients(y, retain_graph=True))) for own in found
    ]
    for thread in passes:
        thread.start()
    for thread in passes:
        thread.join()
    for gradients in found:
        for left, right in zip(gradients, expected, strict=True):
            assert_same_bits(left, right)
    assert not any(block.recorder.alive())


@pytest.mark.parametrize("kind", TWICE)
def test_second_derivatives_are_refused_where_they_would_need_the_input(kind):
    block = Block((kind,))
    with pytest.raises(RuntimeError, match=r"not kept but offered by recompute\.offered"):
        block.gradients(block(block.x), create_graph=True)


@pytest.mark.parametrize("kind", TWICE)
def test_second_derivatives_of_a_constant_input(kind):
    def second(offer):
        block = Block((kind,), train_x=False)
        block.norm.requires_grad_(False)
        _, h, (kept, rstd) = ops.split_rms_norm(normal(TOKENS, HIDDEN), None, block.norm, 1e-6)
        sources, form = recompute.norm_recipe(kept, rstd, block.norm)
        with recompute.offered(h, sources, form) if offer else nullcontext():
            y = block.layer(0, h)
        first = torch.autograd.grad(y.square().sum(), block.trained[0], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), block.trained[0])

    for left, right in zip(second(True), second(False), strict=True):
        torch.testing.assert_close(left, right)


def lora_of(x, seed=0):
    weight, factors = normal(HIDDEN, HIDDEN), (normal(RANK, HIDDEN).requires_grad_(), normal(HIDDEN, RANK))
    return lambda: ops.lora_linear(x, weight, None, *factors, 1.0).square().sum().backward()


def doubled(offered_tensor, x, change=None):
    """How often the recipe of `offered_tensor` is used by a layer that is called with `x`."""
    recorder = Recorder()
    source = offered_tensor.clone()
    with recompute.offered(offered_tensor, (source,), recorder.watch(torch.clone)):
        if change is not None:
            change()
        lora_of(x)()
    return len(recorder.formed)


def test_an_offer_is_of_one_tensor_as_it_is():
    h = normal(6, HIDDEN)
    assert doubled(h, h) == doubled(h, h[None]) == doubled(h, h.view(2, 3, HIDDEN)) == doubled(h, h.detach()) == 1
    assert doubled(h, h.clone()) == doubled(h, h[:5]) == doubled(h, h.t().contiguous().view(6, HIDDEN)) == 0
    assert doubled(h, h, change=lambda: h.add_(1)) == 0, "what was changed since is not what the recipe makes"
    assert doubled(h[:3], h[3:]) == 0


def test_an_offer_ends_with_its_context_even_after_an_error():
    h, recorder = normal(6, HIDDEN), Recorder()
    with pytest.raises(KeyError), recompute.offered(h, (h.clone(),), recorder.watch(torch.clone)):
        raise KeyError
    lora_of(h)()
    assert not recorder.formed


def test_the_inner_of_two_offers_is_taken():
    h, inner, outer = normal(6, HIDDEN), Recorder(), Recorder()
    with recompute.offered(h, (h.clone(),), outer.watch(torch.clone)):
        with recompute.offered(h, (h.clone(),), inner.watch(torch.clone)):
            lora_of(h)()
        lora_of(h)()
    assert len(inner.formed) == len(outer.formed) == 1


def test_an_offer_holds_for_its_own_thread():
    h, recorder = normal(6, HIDDEN), Recorder()
    with recompute.offered(h, (h.clone(),), recorder.watch(torch.clone)):
        thread = threading.Thread(target=lora_of(h))
        thread.start()
        thread.join()
    assert not recorder.formed


def test_a_changed_source_is_found_in_backward():
    h = normal(6, HIDDEN)
    source = h.clone()
    factors = normal(RANK, HIDDEN).requires_grad_(), normal(HIDDEN, RANK)
    with recompute.offered(h, (source,), torch.clone):
        y = ops.lora_linear(h, normal(HIDDEN, HIDDEN), None, *factors, 1.0)
    source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_offers_of_nothing_and_under_inference_do_nothing():
    empty = torch.empty(0, HIDDEN)
    assert doubled(empty, empty) == 0
    with torch.inference_mode():
        h = normal(6, HIDDEN) * 1
        with recompute.offered(h, (h,), torch.clone):
            ops.lora_linear(h, normal(HIDDEN, HIDDEN), None, normal(RANK, HIDDEN), normal(HIDDEN, RANK), 1.0)


def test_a_tensor_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match=r"tensor must be contiguous, got strides \[1, 6\]"):
        recompute.offered(normal(HIDDEN, 6).t(), (), Tensor.clone)


def test_functional_transforms_do_without():
    block = Block()
    leaves = [leaf.detach() for leaf in block.leaves()]

    def loss(offer):
        def run(x, norm, *factors):
            block.norm, block.trained = norm, [factors[:2], factors[2:4], factors[4:]]
            return block(x, offer).square().sum()

        return torch.func.grad(run, argnums=tuple(range(8)))(*leaves)

    for left, right in zip(loss(True), loss(False), strict=True):
        torch.testing.assert_close(left, right)
