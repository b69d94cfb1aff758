"""Tiny random checkpoints of real model families, and what plain `transformers` generates from them.

The oracle of the token-parity tests: every family is written in Hugging Face format (config, safetensors,
generation config; no tokenizer), and `reference_generate` decodes greedily with `model.generate()` itself.
Random weights as `transformers` initialises them would hide bugs: the residual stream would be the last token's
embedding and little else, so that wrong KV changed nothing. `spread_weights` makes attention sharp and its output
loud instead; `test_families.py` measures that the result depends on the context and repeats no single token.

Knows nothing of the engine, of workers or of how the tokens under test were made.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 512
MAX_MODEL_LEN = 512
SLIDING_WINDOW_TOKENS = 24
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 1, 2, 0

EXCUSABLE_GAP = 1e-4
MAX_EXCUSED_SHARE = 1e-3

# What all configurations have in common; a family adds or overrides only what makes it that family.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
    "dtype": "float32",
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True, slots=True)
class Spread:
    """How the weights of one family are drawn.

    `embedding` is the standard deviation of the token embeddings, `final_norm` the mean of the last norm's weights.
    `norm_offset` is what a family adds to its stored norm weights (Gemma stores them minus one).
    """

    embedding: float = 1.0
    final_norm: float = 1.0
    norm_offset: float = 0.0


# A tied head scores the last token's own embedding best unless that is faint beside what the layers add; the
# final norm makes up for the scale of the logits. Gemma multiplies embeddings by sqrt(hidden size) on the way in.
UNTIED = Spread()
TIED = Spread(embedding=0.2, final_norm=3.0)
GEMMA = Spread(embedding=0.03, final_norm=16.0, norm_offset=1.0)
HEAD_NORM = 1.6


def spread_weights(model: PreTrainedModel, spread: Spread, seed: int) -> None:
    """Draw every parameter anew so that logits are far apart and attention decides what comes next."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(_redrawn(name, noise, spread))


def _redrawn(name: str, noise: torch.Tensor, spread: Spread) -> torch.Tensor:
    """One parameter from standard normal `noise` of its shape."""
    module = name.split(".")[-2]
    if name.endswith(".bias"):
        return 0.2 * noise
    if "norm" in module:
        mean = {"norm": spread.final_norm, "q_norm": HEAD_NORM, "k_norm": HEAD_NORM}.get(module, 1.0)
        return mean - spread.norm_offset + 0.1 * noise
    if module in ("embed_tokens", "lm_head"):
        return (spread.embedding if module == "embed_tokens" else 1.0) * noise
    num_inputs: int = noise.shape[1]
    return noise * (PROJECTION_GAIN.get(module, 1.0) / math.sqrt(num_inputs))


# Queries and keys get sharp scores, the outputs of attention and MLP drown the token's own embedding.
PROJECTION_GAIN = {
    "q_proj": 1.6,
    "k_proj": 1.6,
    "qkv_proj": 1.6,
    "v_proj": 1.6,
    "o_proj": 3.0,
    "dense": 3.0,
    "down_proj": 2.0,
    "fc2": 2.0,
}


def _llama(seed: int) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False))
    spread_weights(model, UNTIED, seed)
    return model


def _qwen2(seed: int) -> PreTrainedModel:
    model = Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True))
    spread_weights(model, TIED, seed)
    return model


def _qwen3(seed: int) -> PreTrainedModel:
    model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=True))
    spread_weights(model, TIED, seed)
    return model


def _mistral(seed: int) -> PreTrainedModel:
    config = MistralConfig(**COMMON, sliding_window=SLIDING_WINDOW_TOKENS, tie_word_embeddings=False)
    model = MistralForCausalLM(config)
    spread_weights(model, UNTIED, seed)
    return model


def _gemma(seed: int) -> PreTrainedModel:
    model = GemmaForCausalLM(GemmaConfig(**COMMON, head_dim=32))
    spread_weights(model, GEMMA, seed)
    return model


def _gemma2(seed: int) -> PreTrainedModel:
    layers = COMMON | {"num_hidden_layers": len(ALTERNATING)}
    config = Gemma2Config(
        **layers,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=SLIDING_WINDOW_TOKENS,
        layer_types=ALTERNATING,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=20.0,
    )
    model = Gemma2ForCausalLM(config)
    spread_weights(model, GEMMA, seed)
    return model


def _gemma3(seed: int) -> PreTrainedModel:
    layers = COMMON | {"num_hidden_layers": len(ALTERNATING)}
    config = Gemma3TextConfig(
        **layers,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=SLIDING_WINDOW_TOKENS,
        layer_types=ALTERNATING,
    )
    model = Gemma3ForCausalLM(config)
    spread_weights(model, GEMMA, seed)
    return model


def _phi(seed: int) -> PreTrainedModel:
    heads = COMMON | {"num_key_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    model = PhiForCausalLM(PhiConfig(**heads, rope_parameters=rope, tie_word_embeddings=False))
    spread_weights(model, UNTIED, seed)
    return model


def _phi3(seed: int) -> PreTrainedModel:
    config = Phi3Config(**COMMON, original_max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=False)
    model = Phi3ForCausalLM(config)
    spread_weights(model, UNTIED, seed)
    return model


FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
}


def build_family(name: str, directory: Path, seed: int = 0) -> Path:
    """Write the checkpoint of one family into `directory` and return it."""
    model = FAMILIES[name](seed)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_TOKEN_ID, eos_token_id=EOS_TOKEN_ID, pad_token_id=PAD_TOKEN_ID, do_sample=False
    )
    model.save_pretrained(directory)
    return directory


def random_prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids without the special ones; the same for the same arguments in every process."""
    draw = random.Random(f"{num_tokens}/{seed}")
    return tuple(draw.randrange(EOS_TOKEN_ID + 1, VOCAB_SIZE) for _ in range(num_tokens))


def awkward_lengths(block_size: int, chunk_tokens: int) -> tuple[int, ...]:
    """Prompt lengths around every edge: one token, a block less and more one, several blocks, over a chunk."""
    lengths = {1, block_size - 1, block_size, block_size + 1, 3 * block_size, 3 * block_size + 1}
    lengths |= {chunk_tokens, chunk_tokens + 1, 2 * chunk_tokens + block_size // 2}
    return tuple(sorted(length for length in lengths if length > 0))


@dataclass(frozen=True, slots=True)
class Reference:
    """What `generate()` made. `gaps[i]` is the largest logit less the second largest when token `i` was chosen."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@functools.cache
def reference_model(model_dir: Path) -> PreTrainedModel:
    """The plain model in fp32, with no end-of-sequence token."""
    # Eager attention: SDPA has no soft capping, which Gemma 2 needs.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    assert isinstance(model, PreTrainedModel)
    return model


_REFERENCES: dict[tuple[Path, tuple[int, ...], int], Reference] = {}


def reference_generate(model_dir: Path, prompt_ids: Sequence[int], max_new_tokens: int) -> Reference:
    """Greedy decoding of one prompt by `model.generate()`, end-of-sequence ignored; computed once per process."""
    return reference_generate_all(model_dir, [prompt_ids], max_new_tokens)[0]


def reference_generate_all(model_dir: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Reference]:
    """The same for many prompts; those of one length go through `generate()` together, so that nothing is padded."""
    keys = [(Path(model_dir), tuple(prompt), max_new_tokens) for prompt in prompts]
    missing = {key for key in keys if key not in _REFERENCES}
    for length in sorted({len(key[1]) for key in missing}):
        group = sorted(key for key in missing if len(key[1]) == length)
        found = _generate(Path(model_dir), [key[1] for key in group], max_new_tokens)
        _REFERENCES.update(zip(group, found, strict=True))
    return [_REFERENCES[key] for key in keys]


def _generate(model_dir: Path, prompts: list[tuple[int, ...]], max_new_tokens: int) -> list[Reference]:
    """`prompts` are of one length."""
    prompt = torch.tensor(prompts)  # [num_prompts, num_prompt_tokens]
    model: Any = reference_model(model_dir)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.stack(output.logits, dim=1).topk(2, dim=-1).values  # [num_prompts, num_new_tokens, 2]
    gaps = (top[..., 0] - top[..., 1]).tolist()
    token_ids = output.sequences[:, prompt.shape[1] :].tolist()
    return [Reference(tuple(ids), tuple(row)) for ids, row in zip(token_ids, gaps, strict=True)]


@dataclass(frozen=True, slots=True)
class Match:
    """Every token equal."""


@dataclass(frozen=True, slots=True)
class Excused:
    """Different from `step` on, where the reference itself was undecided: two logits within `EXCUSABLE_GAP`."""

    step: int
    gap: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Different from `step` on with no excuse. A missing or surplus token shows as `None` on its side."""

    step: int
    expected: int | None
    actual: int | None
    gap: float | None


Comparison: TypeAlias = Match | Excused | Mismatch


def compare(expected: Reference, actual: Sequence[int]) -> Comparison:
    """The first difference, excusable only where the reference's two best tokens were nearly tied."""
    for step, (wanted, got, gap) in enumerate(zip(expected.token_ids, actual, expected.gaps, strict=False)):
        if wanted != got:
            return Excused(step, gap) if gap < EXCUSABLE_GAP else Mismatch(step, wanted, got, gap)
    step = min(len(expected.token_ids), len(actual))
    if len(expected.token_ids) > step:
        return Mismatch(step, expected.token_ids[step], None, expected.gaps[step])
    if len(actual) > step:
        return Mismatch(step, None, actual[step], None)
    return Match()


@dataclass(slots=True)
class Tally:
    """Comparisons of one test. `num_tokens` counts the reference's tokens, `num_excused` the excused first steps."""

    label: str
    num_tokens: int = 0
    num_excused: int = 0
    mismatches: list[str] = field(default_factory=list)

    def add(self, expected: Reference, actual: Sequence[int], case: str = "") -> Comparison:
        """Compare and count; `case` names the comparison in the failure message."""
        result = compare(expected, actual)
        self.num_tokens += len(expected.token_ids)
        self.num_excused += isinstance(result, Excused)
        if isinstance(result, Mismatch):
            self.mismatches.append(f"{case}: {result}")
        return result

    @property
    def excused_share(self) -> float:
        return self.num_excused / max(1, self.num_tokens)

    def check(self) -> None:
        """Print the excused share; fail on any mismatch, on too many excuses, and if nothing was compared."""
        share = f"{self.num_excused} of {self.num_tokens} tokens excused ({self.excused_share:.3%})"
        print(f"{self.label}: {share}")
        assert self.num_tokens > 0, f"{self.label}: nothing was compared"
        assert not self.mismatches, f"{self.label}: {len(self.mismatches)} mismatches:\n" + "\n".join(self.mismatches)
        assert self.excused_share < MAX_EXCUSED_SHARE, f"{self.label}: {share}, allowed {MAX_EXCUSED_SHARE:.1%}"
