"""On a GPU nothing waits for the device: selection, scores, layers and the loss run where no tensor has a value."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

import peft_kernels
from peft_kernels import LoraConfig, elimination, ops
from peft_kernels.nn import (
    elimination_options,
    kept_tokens,
    llama_attention,
    selections,
    selective_layer,
    token_elimination,
    token_scores,
)
from peft_kernels.nn.kept_tokens import Kept
from peft_kernels.ops import (
    counted_labels,
    cross_entropy,
    sampled_linear,
    selective_loss,
    token_linear,
    token_selection,
    token_tune,
    wta_crs,
)
from peft_kernels.ops import token_elimination as token_rows

from ..support.without_values import DEVICE, WAITS, device_without_values, valueless
from .models import BLOCK, build, eliminated, layers_of

BATCH, LENGTH, HIDDEN = 2, 22, 16
EACH_BACKEND = pytest.mark.parametrize("backend", [None, "reference"])


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_found(name, monkeypatch):
    with device_without_values(monkeypatch):
        x = torch.empty(3, 4, device=DEVICE)
        x + torch.zeros((), device=DEVICE) * 2 + torch.arange(4, device=x.device)  # these wait for nothing
        with pytest.raises(
            Exception, match=r"copies between|(?i:meta).*(?i:tensor|kernel|output)|converted to|no data"
        ):
            WAITS[name](x)


def scores_on_the_device(hidden):
    return hidden[:, : hidden.shape[1] // BLOCK * BLOCK, 0].unflatten(1, (-1, BLOCK)).amax(2)


def model_with(dropout=0.0, **options):
    """Two layers with adapters, of which both eliminate tokens."""
    model = build(dtype=torch.float32, num_hidden_layers=2)
    peft_kernels.inject(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout), seed=1)
    eliminated(model, **{"layers": [0, 1], "keep_ratio": 0.5, "select_every": 2, **options})
    if options.get("score") == "predictor":
        elimination.set_predictors(model, {0: scores_on_the_device, 1: scores_on_the_device})
    return model


def masks():
    """Attention masks by kind, made on the device."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=DEVICE).tril()[None, None]
    return {
        "causal": None,
        "bool": seen.expand(BATCH, 1, -1, -1),
        "added": torch.zeros(BATCH, 1, LENGTH, LENGTH, device=DEVICE).masked_fill(~seen, torch.finfo().min),
    }


def trained(model, mask):
    """Forward and backward of both layers in a row; the gradients of what trains."""
    layers = layers_of(valueless(model))
    x = torch.empty(BATCH, LENGTH, HIDDEN, device=DEVICE, requires_grad=True)
    tables = tuple(torch.empty(1, LENGTH, 6, device=DEVICE) for _ in range(2))
    layers[0].elimination.selections.given.give(torch.empty(BATCH, LENGTH, device=DEVICE))
    y = x
    for layer in layers:
        y = layer(y, attention_mask=masks()[mask], position_embeddings=tables)
    wanted = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    return y, wanted, torch.autograd.grad(y.sum(), wanted, allow_unused=True)


CASES = [
    ({"score": "attention"}, "causal"),
    ({"score": "attention", "select_every": 1}, "added"),
    ({"score": "norm"}, "bool"),
    ({"score": "random"}, "causal"),
    ({"score": "predictor"}, "added"),
    ({"score": "gradient"}, "causal"),
    ({"score": "norm", "apply_to": "mlp"}, "causal"),
    ({"score": "norm", "apply_to": "attention"}, "bool"),
    ({"score": "norm", "block_size": 1, "keep_ratio": 0.3}, "causal"),
    ({"score": "norm", "keep_ratio": 1.0}, "causal"),
    ({"score": "norm", "keep_ratio": 0.0}, "causal"),
    ({"score": "norm", "threshold": 0.5}, "added"),
    ({"score": "attention", "threshold": 0.5, "keep_ratio": None}, "causal"),
]


@pytest.mark.parametrize(
    ("options", "mask", "backend"),
    [*((*case, None) for case in CASES), *((*case, "reference") for case in CASES[:3])],
    ids=str,
)
def test_layers_train(options, mask, backend, monkeypatch):
    model = model_with(0.1 if backend is None else 0.0, **options)  # the reference takes seconds for its masks
    with device_without_values(monkeypatch, backend):
        y, wanted, grads = trained(model, mask)
        assert y.shape == (BATCH, LENGTH, HIDDEN) and y.device == DEVICE
        assert all(grad is None or grad.shape == of.shape for grad, of in zip(grads, wanted, strict=True))
    counted = layers_of(model)[1].elimination
    assert counted.calls == 1 and not counted.dense_calls
    assert sum(grad is not None for grad in grads) == (1 if options.get("keep_ratio") == 0 else len(wanted))


def test_a_threshold_may_be_a_tensor_of_the_device(monkeypatch):
    model = model_with(score="norm")
    with device_without_values(monkeypatch):
        limit = torch.empty((), device=DEVICE)
        for layer in layers_of(model):
            own = layer.elimination
            own.options = selections.EliminationOptions(0.5, BLOCK, "norm", threshold=limit)
        assert trained(model, "causal")[0].shape == (BATCH, LENGTH, HIDDEN)


@EACH_BACKEND
@pytest.mark.parametrize("fills_up", [False, True])
def test_what_attention_gets_for_kept_tokens(fills_up, backend, monkeypatch):
    with device_without_values(monkeypatch, backend):
        positions = torch.empty(BATCH, 9, dtype=torch.int32, device=DEVICE)
        kept = Kept(positions, LENGTH, torch.empty(BATCH, dtype=torch.int32, device=DEVICE) if fills_up else None)
        ends = torch.empty(4, dtype=torch.int32, device=DEVICE)
        given = {
            "position_embeddings": tuple(torch.empty(1, LENGTH, 6, device=DEVICE) for _ in range(2)),
            "position_ids": torch.empty(BATCH, LENGTH, dtype=torch.int64, device=DEVICE),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
        }
        for mask in (*masks().values(), torch.empty(BATCH, LENGTH, dtype=torch.int64, device=DEVICE)):
            inputs = {**given, "attention_mask": mask}
            found = kept_tokens.gathered_inputs(kept, inputs)
            assert found["position_ids"].shape == (BATCH, 9) and found["cu_seq_lens_q"].shape == (4,)
            starts, _ = kept_tokens.visible_from(inputs, BATCH, LENGTH)
            assert starts.shape == (BATCH, LENGTH)
        packed = {"position_ids": given["position_ids"][:1]}
        assert kept_tokens.visible_from(packed, 1, LENGTH)[0].shape == (1, LENGTH)
        x = torch.empty(BATCH, LENGTH, HIDDEN, device=DEVICE)
        for inputs in (given, packed):
            size = 1 if inputs is packed else BATCH
            assert token_scores.norm_scores(x[:size], inputs, BLOCK).shape == (size, LENGTH // BLOCK)


@EACH_BACKEND
def test_rows_move(backend, monkeypatch):
    with device_without_values(monkeypatch, backend):
        x = torch.empty(BATCH, LENGTH, HIDDEN, device=DEVICE, requires_grad=True)
        weight = torch.empty(HIDDEN, HIDDEN, device=DEVICE, requires_grad=True)
        rows = torch.empty(9, dtype=torch.int32, device=DEVICE)
        y = ops.gather_linear_scatter(x, weight, None, rows, x)
        y = ops.scatter_add_rows(y, ops.gather_linear_scatter(ops.gather_rows(y, rows), weight, None, rows), rows)
        grads = torch.autograd.grad(y.sum(), (x, weight))
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]


@EACH_BACKEND
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_tokens_are_selected(keep, threshold, backend, monkeypatch):
    with device_without_values(monkeypatch, backend):
        q, k = torch.empty(BATCH, 4, 100, 8, device=DEVICE), torch.empty(BATCH, 2, 100, 8, device=DEVICE)
        starts = torch.empty(BATCH, 100, dtype=torch.int32, device=DEVICE)
        scores = ops.block_scores(q, k, 16, starts)
        positions, counts = ops.select_tokens(scores, keep, 16, threshold, tokens=100)
        rows = ops.flat_rows(positions, 100)
        assert rows.shape == (BATCH * ops.kept_tokens(100, keep, 16),) and counts.shape == (BATCH,)


@EACH_BACKEND
@pytest.mark.parametrize(
    "options", [{}, {"shift": True, "chunk_size": 4}, {"logit_softcap": 2.0}, {"token_mask": True}], ids=str
)
def test_the_loss_without_all_logits(options, backend, monkeypatch):
    with device_without_values(monkeypatch, backend):
        hidden = torch.empty(BATCH, 6, 8, device=DEVICE, requires_grad=True)
        weight = torch.empty(11, 8, device=DEVICE, requires_grad=True)
        labels = torch.empty(BATCH, 6, dtype=torch.int64, device=DEVICE)
        if "token_mask" in options:
            options = {"token_mask": labels > 3}
        loss = ops.linear_cross_entropy(hidden, weight, labels, **options)
        grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and [grad.shape for grad in grads] == [(BATCH, 6, 8), (11, 8)]


READS = {"item", "tolist", "nonzero", "masked_select", "cpu", "numpy", "unique", "bincount", "int", "bool", "float"}
READS |= {"tensor", "as_tensor", "from_numpy"}  # of numbers: a copy to the device, which "meta" does not show
ALLOWED = {
    # What the host does with its own tensors, behind a question for the device.
    selections: {"_make": {"int"}},
    elimination_options: {"ratio": {"float"}, "__post_init__": {"float"}},
    cross_entropy: {},
    counted_labels: {"_in_range": {"bool", "int"}, "_computed_rows": {"nonzero"}},
    selective_loss: {},
    token_tune: {},
    sampled_linear: {},
    wta_crs: {},
    # Questions to a module before it is taken over, and numbers of its configuration.
    llama_attention: {"rotary_channels": {"int"}, "attention_part": {"float"}, "_is_like": {"float"}}
    | {"_agrees": {"int", "bool"}, "_is_watched": {"bool"}, "is_causal": {"bool"}},
    kept_tokens: {"visible_from": {"int"}},  # Tensor.int
    selective_layer: {},
    token_elimination: {},
    token_linear: {"_kept_gradient": set()},
    token_rows: {},
    token_scores: {},
    token_selection: {},
}


@pytest.mark.parametrize("module", ALLOWED, ids=lambda module: module.__name__)
def test_the_code_reads_values_where_it_may_and_nowhere_else(module):
    """For what the calls above do not come by; `int(...)` of a number is meant by `ALLOWED` too."""
    found: dict[str, set[str]] = {}
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef):
            called = {
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
            }
            if called & READS:
                found[function.name] = called & READS
    assert found == {name: reads for name, reads in ALLOWED[module].items() if reads}
