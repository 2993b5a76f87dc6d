"""Training with our layers is training with PEFT's: loss curves over 20 steps of AdamW, at no dropout, in float32."""

from __future__ import annotations

import copy

import pytest
import torch

import peft_kernels as pk

peft = pytest.importorskip("peft")

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 20


@pytest.fixture(autouse=True)
def one_thread():
    """Twenty steps of a model this small spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(model, steps=STEPS, accumulate=1, autocast=False):
    """The loss of every micro-batch while AdamW trains whatever requires gradients, on the same tokens each step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 64, (accumulate, 2, 12), generator=generator)
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


@pytest.fixture
def pair(llama, tmp_path):
    """PEFT's model and ours, over equal base weights, from one initial adapter."""

    def make(dtype=torch.float32, **options):
        options = {"r": 4, "lora_alpha": 16, "target_modules": SEVEN, **options}
        torch.manual_seed(1)
        theirs = peft.get_peft_model(llama(dtype=dtype), peft.LoraConfig(**options))
        theirs.save_pretrained(str(tmp_path))
        ours = llama(dtype=dtype)
        pk.inject(ours, pk.LoraConfig(**options))
        pk.load_adapter(ours, tmp_path)
        return theirs, ours

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}],
    ids=["plain", "rsLoRA and ranks", "saved head"],
)
def test_loss_curves_agree_to_rounding(pair, options):
    theirs, ours = pair(**options)
    accelerated = copy.deepcopy(theirs)
    pk.accelerate(accelerated)
    expected = losses(theirs)
    assert expected[-1] < 0.9 * expected[0], "nothing was learned, so nothing is compared"
    for curve in (losses(ours), losses(accelerated)):
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=0)


def test_gradient_accumulation_agrees(pair):
    theirs, ours = pair()
    torch.testing.assert_close(losses(ours, 6, 3), losses(theirs, 6, 3), rtol=1e-4, atol=0)


def test_bfloat16_with_float32_adapters_trains_as_peft_s(pair):
    theirs, ours = pair(dtype=torch.bfloat16)
    assert {value.dtype for name, value in ours.named_parameters() if "lora_" in name} == {torch.float32}
    torch.testing.assert_close(losses(ours, 8), losses(theirs, 8), rtol=0.01, atol=0)


def test_autocast_trains_as_peft_s(pair):
    theirs, ours = pair()
    torch.testing.assert_close(losses(ours, 8, autocast=True), losses(theirs, 8, autocast=True), rtol=0.01, atol=0)


def test_dropout_trains_as_well_as_peft_s(pair):
    theirs, ours = pair(lora_dropout=0.2)
    torch.manual_seed(5)
    expected, found = losses(theirs), losses(ours)
    assert not torch.equal(found, expected), "masks are drawn differently"
    torch.testing.assert_close(found[-4:].mean(), expected[-4:].mean(), rtol=0.05, atol=0)


def test_the_trained_adapter_means_the_same_to_peft(pair, llama, tmp_path, tokens):
    _, ours = pair()
    losses(ours, 4)
    ours.eval()
    pk.save_adapter(ours, tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "trained"))
    torch.testing.assert_close(loaded(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-5)
    plain = copy.deepcopy(ours)
    pk.eject(plain, merge=True)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(plain(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)
