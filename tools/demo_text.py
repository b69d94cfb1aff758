"""The demo model's text: the standard library's sources, chats cut out of them, and a tokenizer trained on both.

Byte-level BPE, so that any text survives. Each document is followed by <|endoftext|>; in the chat samples a docstring
asks and its function answers. Knows nothing of the model.
"""

import ast
import hashlib
import itertools
import random
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

EOT, USER, ASSISTANT, SYSTEM, END = SPECIALS = [
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
]
NUM_VOCAB = 4096
# A newline and the indentation after it are one token: a prompt that ends there is cut as in training.
PRETOKEN = r"\n+ *|[ .]?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+| +(?= )|\s+"
SYSTEM_TEXT = "You are a helpful assistant who writes Python."
# fmt: off
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings",
    "test", "tests", "lib-dynload",
}
# fmt: on


def is_table(text: str) -> bool:
    """Long modules of literals teach nothing about code; lines that open with one give them away."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    literals = sum(line[0] in "'\"0123456789({[" for line in lines)
    return len(text) > 10_000 and literals > 0.4 * len(lines)


def held_out(names: Iterable[str]) -> set[str]:
    """The 3 % of the names whose hashes are lowest: from all packages, whatever the order and the seed."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return set(ranked[: round(0.03 * len(ranked))])


def read_sources(root: Path) -> dict[str, str]:
    """The standard library by relative path, sorted, without tests, tables, duplicates and build facts."""
    sources: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # config-* and _sysconfigdata* tell how and where this Python was built.
        built = name.parts[0].startswith(("config-", "_sysconfigdata"))
        if built or SKIPPED_FOLDERS.intersection(name.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        if len(text) > 40 and not is_table(text):
            sources.setdefault(text, name.as_posix())
    return {name: text for text, name in sources.items()}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with all 256 bytes in the alphabet, so that any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == NUM_VOCAB
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == list(range(len(SPECIALS)))
    return tokenizer


def ask(node: ast.FunctionDef | ast.ClassDef, doc: str, rng: random.Random) -> str:
    """One of several ways to ask for the code of `node`."""
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    named = f"Write a Python {kind} named {node.name}"
    if not doc:
        return f"{named}."
    ways = [f"Write a {kind}: {doc}", f"{named}: {doc}", doc]
    verb, _, rest = doc.partition(" ")
    if kind == "function" and re.fullmatch(r"[A-Z][a-z]+[a-rt-z]", verb):
        ways.append(f"Write a function that {verb.lower()}s {rest}")
    return rng.choice(ways)


def make_chats(sources: dict[str, str], rng: random.Random) -> list[str]:
    """Conversations of one to three turns, cut out of each file's short functions and classes; no bos."""
    chats: list[str] = []
    for text in sources.values():
        turns: list[str] = []
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()
            doc = next(iter((ast.get_docstring(node) or "").splitlines()), "").strip()
            # Code without a docstring only answers to its name; a few of those are enough.
            if 3 <= len(code.splitlines()) <= 25 and rng.random() < (0.7 if doc else 0.05):
                turns.append(f"{USER}\n{ask(node, doc, rng)}{END}\n{ASSISTANT}\n{code}{END}\n")
        while turns:
            size = rng.choice([1, 1, 1, 2, 3])
            system = f"{SYSTEM}\n{SYSTEM_TEXT}{END}\n" if rng.random() < 0.1 else ""
            chats.append(system + "".join(turns[:size]))
            turns = turns[size:]
    return chats


def cut(text: str, rng: random.Random) -> list[str]:
    """Cuts every 800 characters or so, half of the times after a blank: prompts, too, end inside a token."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = start + rng.randint(100, 1500)
        blank = text.find(" ", end)
        if rng.random() < 0.5 and blank >= 0:
            end = blank + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def encode(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    ids = itertools.chain.from_iterable(e.ids for e in tokenizer.encode_batch(pieces))
    return [*ids, SPECIALS.index(EOT)]


@dataclass(slots=True)
class Windows:
    """Windows of any length, spread over the data by the golden ratio.

    Each batch sees places far apart, and each round falls into the gaps of those before it, so that little is
    seen twice while something is unseen.
    """

    data: Tensor
    num_rows: int = 0
    num_tokens: int = 0

    def take(self, rows: int, columns: int) -> Tensor:
        """[rows, columns + 1]: the last column is only predicted."""
        turns = torch.arange(self.num_rows, self.num_rows + rows, dtype=torch.float64) * ((5**0.5 - 1) / 2)
        starts = (turns % 1 * (len(self.data) - columns)).long()
        self.num_rows += rows
        self.num_tokens += rows * columns
        return self.data[starts[:, None] + torch.arange(columns + 1)].long()
