"""Trains pdserve's demo model: a Llama of 3.4 M parameters that writes Python, in 20 minutes on 2 cores.

    python tools/train_demo_model.py --out DIR [--minutes M] [--seed S]

Everything comes from the machine's own standard library: the byte-level BPE tokenizer is trained on its
sources, the chat samples are cut out of them (a docstring asks, the function answers), and 3 % of the files
are held out. The result is an ordinary Hugging Face folder.

Token layout, the same everywhere: each document (a file, or a whole conversation) is followed by
<|endoftext|>, which thereby also precedes the next one. Windows start anywhere in that stream, so a prompt
needs no <|endoftext|> in front and the tokenizer adds none; the chat template writes it, because a
conversation always has it there in training.

It does not know pdserve, and its schedule follows the processor time used: the same seed on another machine gives
another model.
"""

import argparse
import itertools
import json
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from demo_text import (
    END,
    EOT,
    NUM_VOCAB,
    SPECIALS,
    Windows,
    cut,
    encode,
    held_out,
    make_chats,
    read_sources,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

NUM_CORES = 2
MAX_LEN = 2048
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}<|system|>
{%- elif message.role == 'assistant' -%}<|assistant|>
{%- else -%}<|user|>
{%- endif -%}
{{- '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content or [] if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
PROMPTS = [
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    "import os\n\ndef ",
    "for i in range(",
    "try:\n    ",
    "with open(path) as f:",
    "def read_json(path):\n    ",
    "if __name__ == ",
]
QUESTIONS = ["Write a function: Return the number of items in the list.", "Write a class: A simple queue."]


# --- training -----------------------------------------------------------------------------------------------


def build_model() -> LlamaForCausalLM:
    """Layer outputs start at zero: the network begins as its embedding and grows from there."""
    config = LlamaConfig(
        vocab_size=NUM_VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def loss_of(model: LlamaForCausalLM, window: Tensor) -> Tensor:
    hidden = model.model(window[:, :-1], use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden)  # [rows, columns, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def backward(model: LlamaForCausalLM, window: Tensor, pool: Executor) -> float:
    """Gradients of the mean loss, summed up by the pool's threads from quarters of the batch.

    Two threads with a core each. Torch's own would meet at the end of each operation; on a busy machine the
    slower one then holds up the other thousands of times in a step.
    """
    parts = window.chunk(4)

    def one(part: Tensor) -> float:
        loss = loss_of(model, part) / len(parts)
        torch.autograd.backward(loss)
        return loss.item()

    return sum(pool.map(one, parts))


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] to near-orthogonal ones with the same row space: five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose step is orthogonalized: fewer tokens than Adam for the matrices inside the layers."""

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        self.lr = lr
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(param.shape, []).append(param)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]

    def step(self, scale: float, pool: Executor) -> None:
        list(pool.map(lambda group: self.step_group(group[0], group[1], self.lr * scale), self.groups))

    @torch.no_grad()
    def step_group(self, params: list[Tensor], average: Tensor, lr: float) -> None:
        grads = torch.stack([param.grad for param in params if param.grad is not None])
        average.lerp_(grads, 0.05)
        updates = orthogonalize(grads.lerp(average, 0.95))
        for param, update in zip(params, updates, strict=True):
            tall = max(1.0, param.shape[0] / param.shape[1])
            param.mul_(1 - 0.02 * lr).sub_(update, alpha=lr * tall**0.5)


def lr_scale(progress: float) -> float:
    """Warm-up, stable, linear to zero; `progress` is the share of the time that is gone."""
    return min(1.0, (progress + 0.002) / 0.02, max(0.0, (1 - progress) / 0.6))


def window_shape(progress: float, step: int) -> tuple[int, int]:
    """Rows and columns of a batch: 4,096 tokens, at first half of it; long rows, dear on a CPU, last."""
    if progress < 0.2:
        return 8, 256
    if progress < 0.5:
        return 16, 256
    columns = 512 if progress < 0.85 else (512, 1024, 1024, 2048)[step % 4]
    return 4096 // columns, columns


def train(model: LlamaForCausalLM, windows: Windows, minutes: float, pool: Executor) -> int:
    """Trains until it has used `minutes` of two cores; the number of steps.

    Processor time, not the clock on the wall: other work on the machine makes it slower, not worse.
    """
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(hidden, lr=0.02)
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    start = last = time.process_time() / NUM_CORES
    losses: list[float] = []
    for step in itertools.count():
        now = time.process_time() / NUM_CORES
        progress = (now - start) / (60 * minutes)
        if losses and now - last > 10:
            mean, rate = sum(losses) / len(losses), windows.num_tokens / (now - start)
            print(f"{now - start:5.0f} s  step {step:5d}  loss {mean:.4f}  {rate:.0f} tok/s", flush=True)
            last, losses = now, []
        if progress >= 1:
            return step
        rows, columns = window_shape(progress, step)
        losses.append(backward(model, windows.take(rows, columns), pool))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = 4e-3 * lr_scale(progress)
        adam.step()
        muon.step(lr_scale(progress), pool)
        model.zero_grad(set_to_none=True)
    raise AssertionError("count() never ends")


# --- result -------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """The Hugging Face folder, weights in bf16; the tokenizer's config is ours, free of defaults."""
    out.mkdir(parents=True, exist_ok=True)
    eos = [SPECIALS.index(EOT), SPECIALS.index(END)]
    settings = {"bos_token_id": eos[0], "eos_token_id": eos, "pad_token_id": eos[0]}
    model.generation_config = GenerationConfig.from_dict(settings)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner only
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LEN,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "additional_special_tokens": SPECIALS[1:],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """Nats per token and bits per byte of the held-out files, in windows of 1,024."""
    docs = (encode(tokenizer, [text]) for text in texts)
    ids = [SPECIALS.index(EOT), *itertools.chain.from_iterable(docs)]
    total = 0.0
    for start in range(0, len(ids) - 1, 1024):
        window = torch.tensor([ids[start : start + 1025]])
        total += loss_of(model, window).item() * (window.shape[1] - 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    return total / (len(ids) - 1), total / math.log(2) / num_bytes


def completer(out: Path) -> Callable[[str], str]:
    """Greedy completion by the saved folder, loaded the way a user would."""
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)

    def complete(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return complete


def samples(out: Path) -> Iterator[str]:
    complete = completer(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    for prompt in PROMPTS:
        yield f"```python\n{prompt}▸{complete(prompt)}\n```"
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        yield f"> {question}\n\n```python\n{complete(chat)}\n```"


README = """\
# The demo model of pdserve

A Llama of {params:,} parameters (4 layers, hidden size 256, 4 heads over 2 key/value heads, tied
embeddings, bf16) with its own byte-level BPE tokenizer of {vocab:,} tokens. It exists so
that pdserve runs and is tested on a machine without network and GPU. It writes text that looks like Python;
it does not know anything.

| | |
|---|---|
| made by | `python tools/train_demo_model.py --out {out} --minutes {minutes:g} --seed {seed}` |
| data | sources of Python {version}'s standard library; no tests, idlelib, lib2to3, tables, duplicates |
| amount | {files} files, {megabytes:.1f} MB; with {chats:,} chats cut out of them {tokens:,} tokens |
| training | {seen:,} tokens in {steps:,} steps; {minutes:g} minutes of two CPU cores, fp32 |
| held out | {held} files, {held_bytes:,} bytes |
| held-out loss | **{nats:.3f} nats per token, {bits:.3f} bits per byte** with the bf16 weights |
| context | {context:,} tokens; rows of 256 to 2,048 tokens in training |
| size | {size:,} bytes of weights |

`<|endoftext|>` ends each document and so precedes the next one; the tokenizer adds none by itself, the chat
template writes it once in front. Generation stops at `<|endoftext|>` or `<|end|>`. The schedule follows the
processor time used, so another machine gives another model for the same seed.

**Licence.** The data is under the PSF License Version 2, copyright © 2001 Python Software Foundation, all
rights reserved, and the model can repeat pieces of it: that licence and notice stay with the weights.
Otherwise the files here are under pdserve's licence, Apache-2.0.

## Greedy samples

What follows `▸` is the model's; 64 tokens at most. The last {questions} are chats.

{samples}
"""


def write_readme(out: Path, facts: dict[str, object]) -> None:
    text = "\n\n".join(samples(out))
    readme = README.format(
        **facts,
        out=out,
        samples=text,
        questions=len(QUESTIONS),
        vocab=NUM_VOCAB,
        context=MAX_LEN,
        version=sysconfig.get_python_version(),
        size=(out / "model.safetensors").stat().st_size,
    )
    (out / "README.md").write_text(readme)


def run(out: Path, minutes: float, seed: int) -> None:
    torch.set_num_threads(1)  # two threads of our own take a core each, see backward()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sources = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    held_names = held_out(sources)
    held = [text for name, text in sources.items() if name in held_names]
    kept = {name: text for name, text in sources.items() if name not in held_names}
    chats = make_chats(kept, rng)
    tokenizer = train_tokenizer(list(kept.values()))
    encoded = [encode(tokenizer, cut(text, rng)) for text in [*kept.values(), *chats]]
    docs = [torch.tensor(ids, dtype=torch.int32) for ids in encoded]
    num_tokens, num_chat = sum(map(len, docs)), sum(map(len, docs[len(kept) :]))
    print(
        f"{len(kept)} files, {len(held)} held out; {num_tokens} tokens, {num_chat} in {len(chats)} chats",
        flush=True,
    )
    rng.shuffle(docs)
    windows = Windows(torch.cat(docs))
    model = build_model()
    with ThreadPoolExecutor(NUM_CORES) as pool:
        steps = train(model, windows, minutes, pool)
    save(model, tokenizer, out)
    nats, bits = evaluate(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer, held)
    print(f"held-out loss {nats:.4f} nats per token, {bits:.4f} bits per byte", flush=True)
    facts: dict[str, object] = {
        "minutes": minutes,
        "seed": seed,
        "params": model.num_parameters(),
        "files": len(kept),
        "megabytes": sum(len(text.encode()) for text in kept.values()) / 1e6,
        "chats": len(chats),
        "tokens": num_tokens,
        "steps": steps,
        "seen": windows.num_tokens,
        "held": len(held),
        "held_bytes": sum(len(text.encode()) for text in held),
        "nats": nats,
        "bits": bits,
    }
    write_readme(out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result, made if missing")
    parser.add_argument("--minutes", type=float, default=17.5, help="training time; the rest takes one more")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run(args.out, args.minutes, args.seed)


if __name__ == "__main__":
    main()
