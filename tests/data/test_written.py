"""What a model wrote, as text: no token is lost or told twice wherever the tokens are parted, and no half of a character is shown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raysim.data.written import written_text


def byte_level() -> Any:
    """A tokenizer with a token for each byte, as those of GPT-2 and its kin fall back to."""
    vocabulary = {token: number for number, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> Any:
    """A tokenizer with tokens for words and, for all else, bytes written as <0x41>, as those of Llama and its kin."""
    names = ["<eos>", "<unk>", "▁the", "▁a", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"bytes": byte_level(), "fallback": byte_fallback()}
TEXTS = st.text(st.sampled_from("ab é李明สวัक्ष😀"), min_size=1, max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, data=st.data())
def test_what_is_given_and_what_follows_are_the_whole(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    at = data.draw(st.integers(0, len(ids)))
    given_away, rest = written_text(tokenizer, ids[:at]), written_text(tokenizer, ids[at:], after=ids[:at])
    assert "\ufffd" not in given_away + rest
    assert given_away + rest == text
    assert text.startswith(given_away)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_a_character_cut_at_the_end_is_left_out(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for size in range(1, len("李".encode())):
        ids = tokenizer(text + "李")["input_ids"]
        assert written_text(tokenizer, ids[: len(tokenizer(text)["input_ids"]) + size]) == text


def test_bytes_that_are_no_text_are_shown_within_it() -> None:
    tokenizer = TOKENIZERS["bytes"]
    (byte,) = tokenizer("李")["input_ids"][:1]
    ids = [*tokenizer("a")["input_ids"], byte, *tokenizer("b")["input_ids"]]
    assert written_text(tokenizer, ids) == "a\ufffdb"
