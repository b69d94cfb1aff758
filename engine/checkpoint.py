"""A model directory before any model is built from it: is it whole, is it safe, and which one is it.

Reads `config.json` and safetensors headers; knows nothing of torch or of what the weights mean. Pickled weights are
never opened. Everything that is wrong is a ModelError that names the file or the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pdserve.proto.errors import ModelError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that looks whole. `raw_config` is `config.json` as written."""

    path: Path
    raw_config: Mapping[str, Any]
    weight_files: tuple[Path, ...]


def open_checkpoint(path: Path) -> Checkpoint:
    """Check the files in `path`. Raises ModelError."""
    if not path.exists():
        raise ModelError(f"{path}: no such model directory")
    if not path.is_dir():
        raise ModelError(f"{path}: is a file, not a model directory")
    raw_config = _read_json(path / "config.json")
    _refuse_kinds(path, raw_config)
    weight_files = tuple(sorted(path.glob("*.safetensors")))
    if not weight_files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise ModelError(f"{path / pickled[0]}: pickled weights are not loaded, convert them to safetensors")
        raise ModelError(f"{path}: has no *.safetensors file")
    _check_shards(path, weight_files)
    for file in weight_files:
        _check_weights(file)
    return Checkpoint(path, raw_config, weight_files)


def model_hash(checkpoint: Checkpoint) -> str:
    """Same for same files wherever they lie.

    Covers `config.json` and of each weight file the size, the header and evenly spread samples.
    """
    digest = hashlib.blake2b((checkpoint.path / "config.json").read_bytes(), digest_size=16)
    for file in checkpoint.weight_files:
        num_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(f"{file.name} {num_bytes} ".encode() + stream.read(header_bytes))
            for index in range(NUM_SAMPLES):
                stream.seek(8 + header_bytes + (num_bytes - 8 - header_bytes) * index // NUM_SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return content


def _refuse_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """Kinds of models that a dense decoder-only engine cannot run, told apart by their configuration."""
    file = path / "config.json"
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{file}: has no model_type")
    if "auto_map" in config:
        raise ModelError(f"{file}: {model_type} needs code from the checkpoint (auto_map), which is never run")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{file}: {model_type} is an encoder-decoder, not a decoder-only model")
    if "vision_config" in config or "audio_config" in config or "text_config" in config:
        raise ModelError(f"{file}: {model_type} is multimodal, not a text-only model")
    experts = [key for key in EXPERT_KEYS if config.get(key)]
    if experts:
        raise ModelError(f"{file}: {model_type} is a mixture of experts ({experts[0]}), not a dense model")
    unknown = sorted(set(config.get("layer_types") or ()) - KNOWN_LAYER_TYPES)
    if unknown:
        raise ModelError(
            f"{file}: {model_type} has layers of type {', '.join(map(str, unknown))}: no paged KV for these"
        )
    if "quantization_config" in config:
        raise ModelError(f"{file}: quantized checkpoints are not supported")


def _check_shards(path: Path, weight_files: tuple[Path, ...]) -> None:
    """Every shard that the index names is there."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise ModelError(f"{index}: has no weight_map")
    missing = sorted(set(map(str, named.values())) - {file.name for file in weight_files})
    if missing:
        raise ModelError(f"{path / missing[0]}: is missing, but {index.name} names it")


def _check_weights(file: Path) -> None:
    """The header parses and the file is as long as it says."""
    try:
        with safe_open(file, framework="pt") as weights:
            if not list(weights.keys()):
                raise ModelError(f"{file}: holds no tensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: corrupt or truncated safetensors: {error}") from None
