"""Load an unmodified `transformers` causal LM, or refuse with one clear line.

`transformers` fills missing weights with random numbers and carries on; here, whatever is not exactly as the
checkpoint promises is a ModelError. The seam at which foreign loading errors are translated. Knows no architectures:
what a model may do is found out by running it (`probe`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pdserve.engine.attention import NAME
from pdserve.engine.checkpoint import Checkpoint, model_hash, open_checkpoint
from pdserve.engine.config import EngineConfig
from pdserve.engine.packed_linear import can_pack, pack_linears
from pdserve.engine.probe import plain_logits, probe
from pdserve.proto.errors import ConfigError, ModelError
from pdserve.proto.kv_blocks import TORCH_DTYPES
from pdserve.proto.types import KVLayout

# What a model may compute in.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that has been seen to run over a paged KV cache.

    It will run over one of `layout`, whose dtype is the model's own or int8: the model was judged without rounding.

    `num_packed_linears` is zero where the weights stayed as they were loaded (a GPU, half precision, by choice).
    """

    model: PreTrainedModel
    hf_config: PreTrainedConfig
    layout: KVLayout
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    num_packed_linears: int

    @property
    def model_hash(self) -> str:
        return self.layout.model_hash


def load_model(path: Path, config: EngineConfig) -> LoadedModel:
    """The model in the directory `path`. Raises ModelError, or ConfigError if `config` asks too much of it."""
    path = Path(path)
    checkpoint = open_checkpoint(path)
    hf_config = _read_config(checkpoint)
    device = resolve_device(config)
    dtype = _resolve_dtype(config, hf_config, device)
    layout = _layout(path, hf_config, dtype, config.block_size, model_hash(checkpoint))
    max_model_len = _max_model_len(path, hf_config, config)
    model = _build(path, TORCH_DTYPES[dtype], device)
    vocab_size = _vocab_size(model)
    plain = plain_logits(model, vocab_size)
    num_packed = pack_linears(model) if config.pack_weights and can_pack() else 0
    probe(model, layout, vocab_size, plain)
    eos_token_ids = _eos_token_ids(model, hf_config)
    kv_layout = layout if config.kv_cache_dtype == "auto" else replace(layout, dtype=config.kv_cache_dtype)
    return LoadedModel(model, hf_config, kv_layout, vocab_size, max_model_len, eos_token_ids, device, num_packed)


def resolve_device(config: EngineConfig) -> torch.device:
    """Raises ConfigError if a GPU is asked for and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda is not available on this machine")
    use_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


def _read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    try:
        with _quiet():
            hf_config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{checkpoint.path / 'config.json'}: {_one_line(error)}") from None
    assert isinstance(hf_config, PreTrainedConfig)
    return hf_config


def _resolve_dtype(config: EngineConfig, hf_config: PreTrainedConfig, device: torch.device) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device.type == "cpu":
        return "float32"
    name = str(hf_config.dtype).removeprefix("torch.") if hf_config.dtype is not None else "bfloat16"
    if name not in DTYPES:
        raise ModelError(f"the checkpoint's dtype is {name}, supported are {', '.join(DTYPES)}")
    return name


def _layout(path: Path, hf_config: PreTrainedConfig, dtype: str, block_size: int, hash_: str) -> KVLayout:
    """Shape of a block, from a configuration that may be absurd."""
    file = path / "config.json"
    num_layers = _positive(file, hf_config, "num_hidden_layers")
    num_heads = _positive(file, hf_config, "num_attention_heads")
    hidden_size = _positive(file, hf_config, "hidden_size")
    _positive(file, hf_config, "vocab_size")
    num_kv_heads = num_heads
    if getattr(hf_config, "num_key_value_heads", None) is not None:
        num_kv_heads = _positive(file, hf_config, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ModelError(f"{file}: {num_heads} attention heads cannot share {num_kv_heads} key/value heads")
    if getattr(hf_config, "head_dim", None) is not None:
        head_dim = _positive(file, hf_config, "head_dim")
    elif hidden_size % num_heads:
        raise ModelError(f"{file}: hidden_size {hidden_size} cannot be divided among {num_heads} attention heads")
    else:
        head_dim = hidden_size // num_heads
    return KVLayout(hash_, dtype, num_layers, num_kv_heads, head_dim, block_size)


def _positive(file: Path, hf_config: PreTrainedConfig, name: str) -> int:
    value = getattr(hf_config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{file}: {name} must be a positive number, not {value!r}")
    return value


def _max_model_len(path: Path, hf_config: PreTrainedConfig, config: EngineConfig) -> int:
    limit = _positive(path / "config.json", hf_config, "max_position_embeddings")
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"engine.max_model_len: {config.max_model_len} is more than the model's {limit}")
    return limit if config.max_model_len is None else config.max_model_len


def _build(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights into the model; every one of them, and no other."""
    loader: Any = AutoModelForCausalLM
    try:
        with _quiet():
            model, info = loader.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported like missing ones, by name
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"{path}: {_one_line(error)}") from None
    _check_loading(path, info)
    assert isinstance(model, PreTrainedModel)
    module: Any = model
    module.eval().requires_grad_(False).to(device)
    return model


def _vocab_size(model: Any) -> int:
    """Width of the logits, which may be padded beyond the tokenizer's vocabulary."""
    return int(model.get_output_embeddings().weight.shape[0])


def _check_loading(path: Path, info: dict[str, Any]) -> None:
    mismatched = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"])
    for problem, names in (
        ("is not in the checkpoint", sorted(info["missing_keys"])),
        ("has another shape in the checkpoint than config.json says", mismatched),
        ("is in the checkpoint but not in the model that config.json describes", sorted(info["unexpected_keys"])),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ModelError(f"{path}: weight {names[0]}{others} {problem}")
    if info.get("error_msgs"):
        raise ModelError(f"{path}: {str(info['error_msgs'][0]).splitlines()[0]}")


def _eos_token_ids(model: PreTrainedModel, hf_config: PreTrainedConfig) -> tuple[int, ...]:
    """From the generation config if it says, else from the model's."""
    generation: GenerationConfig | None = model.generation_config
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(hf_config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(int(token) for token in eos) if isinstance(eos, list | tuple) else (int(eos),)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings while loading: what matters comes back as an error."""
    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
