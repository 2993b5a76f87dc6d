"""`accelerate` on SHiRA and Super-Tuning layers: PEFT's function and gradients, without PEFT's dense copies."""

from __future__ import annotations

import copy

import pytest
import torch

import peft_kernels as pk

from .peft_models import (
    EACH_KIND,
    adapted,
    assert_same_state,
    holds_delta,
    layer_of,
    small,
    sparse,
    tokens,
    twins,
    values_of,
)

STEPS = 24


@pytest.fixture
def fused_calls(monkeypatch):
    """The names of our operators that were called since the test began."""
    sparse.check_peft()  # calls them too, once
    calls = []
    for name in ("sparse_delta_linear", "attach_delta"):
        original = getattr(pk.ops, name)
        spy = lambda *args, _name=name, _original=original, **kw: calls.append(_name) or _original(*args, **kw)  # noqa: E731
        monkeypatch.setattr(pk.ops, name, spy)
    return calls


def backward(model, x, weights):
    """Output, gradient of x and of every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@EACH_KIND
def test_every_layer_runs_fused_and_computes_the_same(kind, fused_calls):
    model, twin, report = twins(adapted(kind))
    assert str(report).splitlines()[0] == "AccelerationReport: 10 of 10 layers fused" and not report.left_alone
    assert {row.kind for row in report.layers} == {
        "peft.tuners.shira.layer.Linear" if kind == "shira" else "peft.tuners.supertuning.layer.Linear"
    }
    torch.testing.assert_close(twin(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert fused_calls == ["attach_delta" if kind == "supra" else "sparse_delta_linear"] * 10


@EACH_KIND
@pytest.mark.parametrize("shape", [(5, 11), (2, 3, 11), (11,), (0, 11)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_outputs_and_gradients_are_peft_s(kind, shape, dtype, tolerance):
    model = small(kind, dtype).to(dtype)
    model, twin, _ = twins(model)
    x, weights = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 7, dtype=dtype)
    (y, dx, grads), (ours, our_dx, our_grads) = (backward(each, x, weights) for each in (model, twin))
    torch.testing.assert_close(ours, y, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(our_dx, dx, rtol=0, atol=10 * tolerance)
    assert grads.keys() == our_grads.keys() and len(grads) == (3 if kind == "supra" else 1)
    for name, grad in grads.items():
        torch.testing.assert_close(our_grads[name], grad, rtol=0, atol=10 * tolerance, msg=name)
    assert_same_state(model, twin)


@EACH_KIND
def test_bfloat16_is_at_least_as_accurate_as_peft_s(kind):
    model, twin, _ = twins(small(kind, torch.bfloat16))
    assert values_of(layer_of(twin)).dtype == torch.float32
    x, weights = torch.randn(64, 11).bfloat16(), torch.randn(64, 7).bfloat16()
    exact = backward(copy.deepcopy(model).double(), x.double(), weights.double())
    errors = []
    for each in (model, twin):
        y, dx, grads = backward(each, x, weights)
        pairs = [(y, exact[0]), (dx, exact[1]), *((grads[name], exact[2][name]) for name in grads)]
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    for theirs, ours in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs + 1e-6, errors


@EACH_KIND
def test_the_weight_is_written_only_when_values_have_changed(kind, monkeypatch):
    _, twin, _ = twins(small(kind))
    layer, writes = layer_of(twin), []
    original = pk.nn.switched.write_delta
    monkeypatch.setattr(pk.nn.switched, "write_delta", lambda *args: writes.append(args) or original(*args))
    x = torch.randn(3, 11)
    for _ in range(3):
        y = twin(x)
    assert len(writes) == 1
    with torch.no_grad():
        values_of(layer).add_(1.0)
    y = twin(x) + twin(x)
    assert len(writes) == 2 and holds_delta(layer)
    y.sum().backward()
    assert len(writes) == 2
    twin(x)
    twin(x)
    assert len(writes) == 3, "an optimizer may have come in between that torch knows nothing of"


class Silent(torch.optim.Optimizer):
    """Changes parameters behind torch's back, as optimizers with kernels of their own do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                before = parameter._version
                parameter.data.sub_(0.01 * parameter.grad)
                assert parameter._version == before, "torch has counted it; nothing is tested"


@EACH_KIND
@pytest.mark.parametrize("reset", [True, False])
def test_an_optimizer_that_torch_knows_nothing_of(kind, reset):
    model, twin, _ = twins(small(kind))
    x = torch.randn(4, 11)
    optimizers = [Silent([p for p in each.parameters() if p.requires_grad]) for each in (model, twin)]
    for _ in range(3):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=reset)
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)


@EACH_KIND
def test_backward_saves_nothing_of_the_weight_s_size(kind):
    model, twin, _ = twins(small(kind, init_weights=False))
    base = layer_of(twin)._modules["base_layer"].weight
    saved = {}
    for name, each in (("theirs", model), ("ours", twin)):
        kept = saved[name] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            each(torch.randn(3, 11, requires_grad=True))

    def dense(tensors, known):
        strided = [tensor for tensor in tensors if tensor.layout == torch.strided]
        return [t for t in strided if t.numel() >= base.numel() and t.data_ptr() != known.data_ptr()]

    assert dense(saved["theirs"], layer_of(model).base_layer.weight), "PEFT keeps a dense weight; nothing is compared"
    assert not dense(saved["ours"], base)


def losses(model, optimizer, steps=STEPS, accumulate=1, autocast=False):
    """The loss of every micro-batch, on the same tokens in each step."""
    model.train()
    data = torch.randint(0, 64, (accumulate, 2, 12), generator=torch.Generator().manual_seed(3))
    curve = []
    for _ in range(steps):
        for batch in data:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=batch, labels=batch).loss
            (loss / accumulate).backward()
            curve.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(curve, dtype=torch.float64)


def trained(model, kind=torch.optim.AdamW, **options):
    """An optimizer over everything that trains."""
    return kind([p for p in model.parameters() if p.requires_grad], lr=5e-3, **options)


@pytest.fixture
def one_thread():
    """Steps of a model this small spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@EACH_KIND
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_loss_curves_are_peft_s(kind, weight_decay, one_thread):
    model, twin, _ = twins(adapted(kind, init_weights=True))
    expected = losses(model, trained(model, weight_decay=weight_decay))
    found = losses(twin, trained(twin, weight_decay=weight_decay))
    assert expected[-1] < 0.98 * expected[0], "nothing was learned, so nothing is compared"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for (name, theirs), ours in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        if "base_layer" in name:
            assert torch.equal(ours, theirs), f"{name}: training has changed the base model"
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


@EACH_KIND
def test_gradient_accumulation_is_peft_s(kind, one_thread):
    model, twin, _ = twins(adapted(kind))
    expected = losses(model, trained(model), 5, 3)
    torch.testing.assert_close(losses(twin, trained(twin), 5, 3), expected, rtol=1e-5, atol=0)


@EACH_KIND
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_trains_as_peft_s(kind, autocast, one_thread):
    model, twin, _ = twins(adapted(kind, torch.float32 if autocast else torch.bfloat16, init_weights=True))
    expected = losses(model, trained(model), 8, autocast=autocast)
    torch.testing.assert_close(losses(twin, trained(twin), 8, autocast=autocast), expected, rtol=0.01, atol=0)


@EACH_KIND
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(kind, reentrant):
    _, model, _ = twins(adapted(kind, **({"lora_dropout": 0.3} if kind == "supra" else {})))

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) == (30 if kind == "supra" else 10)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


@EACH_KIND
@pytest.mark.parametrize("warm", [True, False])
def test_compiles_without_a_graph_break_and_trains(kind, warm):
    model, twin, _ = twins(small(kind))
    x = torch.randn(3, 11)
    if warm:
        twin(x)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.01) for each in (model, twin)]
    for step in range(3):
        outputs = []
        for each, optimizer in zip((model, compiled), optimizers, strict=True):
            outputs.append(each(x))
            outputs[-1].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(outputs[1], outputs[0], msg=f"step {step}")
    torch.testing.assert_close(twin(x), model(x))
    assert torch.equal(layer_of(twin).base_layer.weight, layer_of(model).base_layer.weight)
    torch.testing.assert_close(compiled(x), model(x))


@EACH_KIND
def test_double_backward_is_that_of_the_dense_formula(kind):
    model = small(kind).double()
    dense = copy.deepcopy(layer_of(model))
    pk.accelerate(model)
    x = torch.randn(3, 11, dtype=torch.float64)

    def formula(inputs):
        weight, values = dense.base_layer.weight, values_of(dense)
        if kind == "shira":
            rows, columns = dense.shira_indices["default"].long()
        else:
            positions = dense.supertuning_indices["default"].long()
            rows, columns = positions // 11, positions % 11
        y = inputs @ weight.index_put((rows, columns), values, accumulate=True).t() + dense.base_layer.bias
        if kind == "supra":
            hidden = inputs @ dense.supertuning_lora_A["default"].weight.t()
            y = y + 5 / 3 * (hidden @ dense.supertuning_lora_B["default"].weight.t())
        return y

    second = []
    for function, layer in ((formula, dense), (model, layer_of(model))):
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        inputs = x.clone().requires_grad_()
        first = torch.autograd.grad(function(inputs).pow(3).sum(), (inputs, *trained), create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in first), (inputs, *trained)))
    for expected, found in zip(*second, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@EACH_KIND
def test_torch_func_transforms_go_through_peft(kind, fused_calls):
    _, twin, _ = twins(small(kind))
    x = torch.randn(4, 11)
    expected = twin(x)
    fused_calls.clear()
    torch.testing.assert_close(torch.func.vmap(twin)(x), expected)
    assert not fused_calls
    gradient = torch.func.grad(lambda values: torch.func.functional_call(twin, values, (x,)).sum())
    parameters = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    found = gradient(parameters)
    twin(x).sum().backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


@EACH_KIND
def test_accelerating_twice_and_restoring(kind, fused_calls):
    model, twin, report = twins(small(kind))
    layer = layer_of(twin)
    twin(torch.randn(2, 11))
    assert pk.accelerate(twin) == report and isinstance(layer, sparse.SparseLayer)
    assert pk.restore(twin) == 1 and type(layer) is type(layer_of(model)) and pk.restore(twin) == 0
    assert vars(layer).keys() == vars(layer_of(model)).keys()
    assert_same_state(model, twin)
    fused_calls.clear()
    x = torch.randn(3, 11)
    assert torch.equal(twin(x), model(x)) and not fused_calls
