"""Text comes out whole, in order, and stops where it must, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_tokenizer import train_tokenizer
from tokenizers import Tokenizer, decoders, models

from pdserve.router.detokenizer import MAX_WINDOW_TOKENS, Detokenizer, IncrementalDecoder, Match, StopMatcher
from pdserve.router.validation import StopOptions

BYTES = st.binary(max_size=60)
UNUSUAL = st.text(st.sampled_from("aé世😀\u0301\u200d👩‍👩‍👧\ufffd\u202e\n "), max_size=30)
TOKENIZER = train_tokenizer()


def decode_bytes(ids: Sequence[int]) -> str:
    """One token for each byte."""
    return bytes(ids).decode("utf-8", "replace")


def decode_trained(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def byte_fallback_tokenizer() -> Tokenizer:
    """As SentencePiece models have it: characters, a space mark, and one token for each byte."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "b": 258, "▁": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


FALLBACK = byte_fallback_tokenizer()


def feed_all(decoder: IncrementalDecoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.feed(token_id) for token_id in ids), decoder.flush()]


@given(BYTES)
def test_any_bytes_come_out_as_they_would_in_one_piece(data: bytes) -> None:
    assert "".join(feed_all(IncrementalDecoder(decode_bytes), data)) == decode_bytes(data)


@given(UNUSUAL)
def test_valid_text_never_shows_a_half_character(text: str) -> None:
    pieces = feed_all(IncrementalDecoder(decode_bytes), text.encode())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 319), max_size=80))
def test_any_tokens_of_a_byte_level_tokenizer_come_out_exactly(ids: list[int]) -> None:
    assert "".join(feed_all(IncrementalDecoder(decode_trained), ids)) == decode_trained(ids)


@given(st.text(st.sampled_from("é世😀ab "), max_size=40))
def test_byte_fallback_text_comes_out_exactly(text: str) -> None:
    ids: list[int] = []
    for character in text:
        known = {"b": [258], "a": [257], " ": [259]}.get(character)
        ids += known or [byte + 1 for byte in character.encode()]

    def decode(window: Sequence[int]) -> str:
        return str(FALLBACK.decode(list(window)))

    assert "".join(feed_all(IncrementalDecoder(decode), ids)) == decode(ids)


def test_the_cost_of_a_token_does_not_grow_with_the_completion() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_bytes(ids)

    for data in (b"abc" * 1000, b"\xff" * 3000, "世".encode() * 1000, b"\xf0\x9f\x98" * 1000):
        assert "".join(feed_all(IncrementalDecoder(decode), data)) == decode_bytes(data)
    assert longest <= 2 * MAX_WINDOW_TOKENS


def reference_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The stop string completed first; of several the longest."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_is_found_in_the_same_place_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, stopped = StopMatcher(stops), "", None
    for piece in pieces:
        outcome = matcher.feed(piece)
        if isinstance(outcome, Match):
            shown, stopped = shown + outcome.before, outcome.stop
            break
        shown += outcome
    else:
        shown += matcher.flush()
    assert (shown, stopped) == reference_stop("".join(pieces), stops)


@given(UNUSUAL, st.lists(st.text(st.sampled_from("aé世😀"), min_size=1, max_size=3), min_size=1, max_size=3))
def test_stop_strings_may_span_tokens_and_characters(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(decode_bytes, StopOptions(tuple(stops)), 0)
    shown = ""
    for token_id in text.encode():
        shown += detokenizer.feed(token_id)
        if detokenizer.stopped is not None:
            break
    else:
        shown += detokenizer.flush()
    assert (shown, detokenizer.stopped) == reference_stop(text, stops)


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one STOP")])
def test_the_stop_string_is_shown_only_when_asked_for(include: bool, expected: str) -> None:
    detokenizer = Detokenizer(decode_bytes, StopOptions(("STOP",), include), 0)
    shown = ""
    for token_id in b"one STOP two":
        shown += detokenizer.feed(token_id)
        if detokenizer.stopped is not None:
            break
    assert shown == expected


def test_a_stop_string_within_the_minimum_does_not_count() -> None:
    detokenizer = Detokenizer(decode_bytes, StopOptions(("x",)), 4)
    assert [detokenizer.feed(token_id) for token_id in b"axb"] == ["a", "x", "b"]
    detokenizer.feed(ord("x"))
    assert detokenizer.stopped == "x"
