"""Model directories for the router: three JSON files and, where wanted, a tokenizer trained on the spot."""

import json
from pathlib import Path

import pytest
from router_tokenizer import CHAT_TEMPLATE, train_tokenizer


@pytest.fixture(scope="session")
def bare_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No tokenizer: token ids only."""
    directory = tmp_path_factory.mktemp("bare-model")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 400, "max_position_embeddings": 4096}
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a chat template; BOS from the post-processor."""
    directory = tmp_path_factory.mktemp("text-model")
    tokenizer = train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
    }
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory
