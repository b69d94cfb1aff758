"""Text and chats to token ids, and back, with the model directory's own tokenizer. `tokenizers` only.

What a client writes is text: where a prompt or a chat message spells a control token (`<|im_end|>`, `</s>`), it is
encoded as the characters it consists of. Control tokens come from the tokenizer's post-processor (BOS) and from the
chat template only. Added tokens that the tokenizer does not mark as special are ordinary vocabulary.

A chat whose contents spell no control token is rendered and encoded exactly as `apply_chat_template` does. Otherwise
each such spelling is rendered as a placeholder, the rendered text is cut at the control tokens that the template
wrote, and every piece between them is encoded as plain text.

Knows nothing of requests or of limits other than the files' own; slow for long text, so callers use a thread.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pdserve.proto.errors import InvalidRequest, ModelError

MAX_FILE_BYTES = 256 << 20


class TemplateRefusal(Exception):
    """The chat template itself refused the messages (`raise_exception`)."""


# What template code can run into when the messages are not what it was written for.
TEMPLATE_FAILURES = (
    *(TemplateRefusal, jinja2.TemplateError, ArithmeticError, AttributeError),
    *(LookupError, RecursionError, TypeError, ValueError),
)


class ChatTemplate:
    """A model's jinja template, rendered in a sandbox with the globals that templates expect."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """`messages` are (role, content). Raises InvalidRequest when the template cannot take them."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special_tokens)
        except TEMPLATE_FAILURES as error:
            raise InvalidRequest("chat.messages", "the model's chat template refuses these messages") from error


class ModelTokenizer:
    """Two views of one tokenizer file: `_plain` reads control tokens as text, `_full` as tokens."""

    def __init__(self, tokenizer_json: str, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        self._full = _load(tokenizer_json)
        self._plain = _load(tokenizer_json)
        self._plain.encode_special_tokens = True
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        added = self._full.get_added_tokens_decoder()
        control = {str(token.content): token_id for token_id, token in added.items() if token.special}
        self._control_ids = {text: token_id for text, token_id in control.items() if text}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """One above the highest id that has a token."""
        return max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Plain text, with what the post-processor adds (BOS); no control token from `text` itself."""
        return list(self._plain.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """(role, content) pairs through the model's template. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("chat", "this model has no chat template; send a prompt or token_ids")
        if not any(self._control.search(text) for message in messages for text in message):
            return list(self._full.encode(self._template.render(messages), add_special_tokens=False).ids)
        return self._encode_guarded(self._template, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._full.decode(list(token_ids), skip_special_tokens=True))

    def _encode_guarded(self, template: ChatTemplate, messages: Sequence[tuple[str, str]]) -> list[int]:
        nonce = secrets.token_hex(16)
        spellings: list[str] = []

        def hide(found: re.Match[str]) -> str:
            spellings.append(found.group())
            return f"{nonce}{len(spellings) - 1:x}."

        guarded = [(self._control.sub(hide, role), self._control.sub(hide, content)) for role, content in messages]
        rendered = template.render(guarded)
        hidden = re.compile(rf"{nonce}([0-9a-f]+)\.")
        ids: list[int] = []
        position = 0
        for found in [*self._control.finditer(rendered), None]:
            piece = rendered[position : found.start()] if found else rendered[position:]
            text = hidden.sub(lambda match: spellings[int(match.group(1), 16)], piece)
            ids.extend(self._plain.encode(text, add_special_tokens=False).ids)
            if found:
                ids.append(self._control_ids[found.group()])
                position = found.end()
        return ids


def load_tokenizer(model_dir: Path) -> ModelTokenizer | None:
    """The directory's tokenizer, or `None` where it has no `tokenizer.json`. Raises ModelError naming the file."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        return None
    settings = read_json(model_dir / "tokenizer_config.json")
    try:
        return ModelTokenizer(_read(path), _chat_template(model_dir, settings), _special_tokens(settings))
    except jinja2.TemplateError as error:
        raise ModelError(f"{model_dir.name}: chat template: {error}") from error


def read_json(path: Path) -> dict[str, object]:
    """A JSON object; an absent file is an empty one. Raises ModelError naming the file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: not a JSON object")
    return value


def _read(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"{path.name}: not a regular file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path.name}: larger than {MAX_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name}: cannot be read: {error}") from error


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    # The library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise ModelError(f"tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_template(model_dir: Path, settings: Mapping[str, object]) -> str | None:
    """The template file wins over the setting; of several named templates, the default one."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        return _read(path)
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(settings: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and its like as templates see them; each is a string or an object with its content."""
    tokens: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return tokens


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Without HTML escapes, unlike jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
