"""What the loader refuses, and how it says so: one line that names the file or the reason, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import FamilyDir
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from pdserve.engine.config import EngineConfig
from pdserve.engine.model import load_model
from pdserve.proto.errors import ModelError

CONFIG = EngineConfig(device="cpu")


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_shard(directory: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shrink(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 5)


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing config": (lambda d: (d / "config.json").unlink(), r"config\.json: is missing"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config\.json: cannot be read"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), r"config\.json: is not a JSON object"),
    "no model type": (lambda d: (d / "config.json").write_text("{}"), r"config\.json: has no model_type"),
    "unknown model type": (lambda d: edit_config(d, model_type="nonsense"), r"config\.json: .*nonsense"),
    "remote code": (lambda d: edit_config(d, auto_map={"AutoConfig": "x.Y"}), r"auto_map"),
    "encoder-decoder": (lambda d: edit_config(d, is_encoder_decoder=True), r"encoder-decoder"),
    "multimodal": (lambda d: edit_config(d, vision_config={}), r"multimodal"),
    "quantized": (lambda d: edit_config(d, quantization_config={"bits": 4}), r"quantized"),
    "hybrid layers": (lambda d: edit_config(d, layer_types=["linear_attention"] * 2), r"linear_attention"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no \*\.safetensors"),
    "pickle only": (pickle_only, r"pytorch_model\.bin: pickled weights are not loaded"),
    "truncated": (truncate, r"model\.safetensors: corrupt or truncated"),
    "garbage": (
        lambda d: (d / "model.safetensors").write_bytes(b"x" * 99),
        r"model\.safetensors: corrupt or truncated",
    ),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), r"model\.safetensors: corrupt or truncated"),
    "missing shard": (lose_shard, r"model-00002-of-00002\.safetensors: is missing"),
    "missing weight": (
        lambda d: edit_weights(d, lambda w: w.pop("model.layers.1.self_attn.k_proj.weight")),
        r"model\.layers\.1\.self_attn\.k_proj\.weight is not in the checkpoint",
    ),
    "unexpected weight": (
        lambda d: edit_weights(d, lambda w: w.update({"model.extra.weight": torch.zeros(3)})),
        r"model\.extra\.weight is in the checkpoint but not in the model",
    ),
    "another shape": (lambda d: edit_weights(d, shrink), r"up_proj\.weight"),
    "NaN weights": (lambda d: edit_weights(d, poison), r"not finite"),
    "fewer layers than weights": (
        lambda d: edit_config(d, num_hidden_layers=1),
        r"model\.layers\.1\..* not in the model",
    ),
    "no layers": (lambda d: edit_config(d, num_hidden_layers=0), r"num_hidden_layers must be a positive number, not 0"),
    "negative heads": (lambda d: edit_config(d, num_attention_heads=-4), r"config\.json: "),
    "heads that do not divide": (lambda d: edit_config(d, num_key_value_heads=3), r"config\.json: .*heads"),
    "hidden size as text": (lambda d: edit_config(d, hidden_size="wide"), r"config\.json: .*hidden_size"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_broken_checkpoint_is_refused_with_its_reason(case: str, family_dir: FamilyDir, tmp_path: Path) -> None:
    damage, reason = REFUSALS[case]
    directory = shutil.copytree(family_dir("llama"), tmp_path / "model")
    damage(directory)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(directory, CONFIG)
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is None


def test_a_path_that_is_no_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load_model(tmp_path / "nowhere", CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        load_model(tmp_path / "file", CONFIG)


SIZES: Any = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
FOREIGN: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mixture of experts": (
        lambda: MixtralForCausalLM(
            MixtralConfig(
                **SIZES,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=2,
            )
        ),
        "mixture of experts",
    ),
    "its own attention": (
        lambda: CodeGenForCausalLM(
            CodeGenConfig(**SIZES, n_positions=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
        ),
        "codegen cannot run over a paged KV cache",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_architecture_that_cannot_be_paged_is_refused(case: str, tmp_path: Path) -> None:
    build, reason = FOREIGN[case]
    build().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(tmp_path, CONFIG)
    assert "\n" not in caught.value.message


def test_the_hash_follows_the_bytes_and_not_the_place(family_dir: FamilyDir, tmp_path: Path) -> None:
    original = load_model(family_dir("llama"), CONFIG).model_hash
    copy = shutil.copytree(family_dir("llama"), tmp_path / "copy")
    assert load_model(copy, CONFIG).model_hash == original
    edit_weights(copy, lambda w: w["model.embed_tokens.weight"].mul_(1.5))
    assert load_model(copy, CONFIG).model_hash != original


def test_what_the_checkpoint_says_is_reported(family_dir: FamilyDir) -> None:
    loaded = load_model(family_dir("qwen3"), CONFIG)
    layout = loaded.layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.dtype) == (2, 2, 32, "float32")
    assert (loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids) == (512, 512, (2,))


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"block_size": 0}, "block_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"dtype": "int8"}, "dtype"),
        ({"blocksize": 16}, "blocksize"),
        ({"max_num_batched_tokens": 8}, "must be at least max_num_seqs"),
    ],
)
def test_a_wrong_section_names_the_key(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        EngineConfig(**section)


def test_gpt2_style_models_run_if_the_probe_agrees(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert load_model(tmp_path, CONFIG).max_model_len == 64
