"""Records as tokens: the template's prompt, the response alone scored, cuts counted, prompts without room refused."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import encode_chat, encode_opening, encode_records
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import response_nll

RECORDS = [
    Record(record_id=0, instruction="Name a fruit.", response="An apple."),
    Record(record_id=1, instruction="Wie heißt du?", response="Ich heiße Jörg, 12.5 mg täglich."),
]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    assert plain.chat_template is None
    return plain


def test_prompt_is_the_template_and_response_ends_with_the_end_token(lm: LanguageModel) -> None:
    examples, num_cut = encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=200, chat=ChatFormat())
    assert num_cut == 0
    for record, example in zip(RECORDS, examples, strict=True):
        assert lm.tokenizer.decode(example.prompt_ids) == f"<|user|>{record.instruction}<|end|><|assistant|>"
        assert lm.tokenizer.decode(example.response_ids[:-1]) == record.response
        assert example.response_ids[-1] == 1
        assert example.num_tokens == len(example.prompt_ids) + len(example.response_ids)
        assert example.record is record


def test_only_the_response_is_scored(lm: LanguageModel) -> None:
    """The prompt has a say in the score only as what stands before: its own tokens do not count."""
    [example, _], _ = encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=200, chat=ChatFormat())
    ids = torch.tensor([example.prompt_ids + example.response_ids])
    with torch.no_grad():
        log_probs = lm.model(input_ids=ids).logits.log_softmax(-1)[0]
    start = len(example.prompt_ids)
    by_hand = -sum(log_probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    nll_B, count_B = response_nll(lm, [example])
    assert nll_B.item() == pytest.approx(by_hand, rel=1e-5)
    assert count_B.tolist() == [len("An apple.") + 1]


@pytest.mark.parametrize(("system", "shown"), [(None, ""), ("", "<|system|><|end|>"), ("Be brief.", "<|system|>Be brief.<|end|>")])
def test_system_prompt_and_turns(lm: LanguageModel, system: str | None, shown: str) -> None:
    ids = encode_chat(lm.tokenizer, [("user", "a"), ("assistant", "b"), ("user", "c")], chat=ChatFormat(system))
    assert lm.tokenizer.decode(ids) == f"{shown}<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"


def test_long_responses_are_cut_and_counted(lm: LanguageModel) -> None:
    whole, _ = encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=200, chat=ChatFormat())
    limit = whole[0].num_tokens  # the first fits exactly, the second does not
    assert whole[1].num_tokens > limit
    examples, num_cut = encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=limit, chat=ChatFormat())
    assert num_cut == 1
    assert examples[0] == whole[0]
    assert examples[1].num_tokens == limit
    assert examples[1].response_ids == whole[1].response_ids[: limit - len(whole[1].prompt_ids)]
    assert examples[1].response_ids[-1] != 1, "a response that was cut must not teach the model to stop there"


def test_prompts_that_leave_no_room_are_refused_with_numbers(lm: LanguageModel) -> None:
    lengths = [len(encode_chat(lm.tokenizer, [("user", r.instruction)], chat=ChatFormat())) for r in RECORDS]
    both, one = min(lengths), max(lengths)
    for limit, number in ((both, 2), (one, 1)):
        message = rf"data\.max_length={limit}: {number} of 2 prompts .*longest {max(lengths)} tokens.*raise data\.max_length or shorten"
        with pytest.raises(ValueError, match=message):
            encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=limit, chat=ChatFormat())
    examples, num_cut = encode_records(RECORDS, tokenizer=lm.tokenizer, eos_token_id=1, max_length=one + 1, chat=ChatFormat())
    assert min(len(example.response_ids) for example in examples) == 1
    assert num_cut == 2


def test_a_tokenizer_without_a_template_gets_blocks(lm: LanguageModel) -> None:
    plain = without_template(lm.tokenizer)
    ids = encode_chat(plain, [("user", "a"), ("assistant", "b"), ("user", "c")], chat=ChatFormat("s"))
    expected = "s\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n\n### Response:\n"
    assert plain.decode(ids) == expected
    assert plain.decode(encode_opening(plain)) == "### Response:\n"


def test_opening_is_what_the_template_appends(lm: LanguageModel) -> None:
    opening = encode_opening(lm.tokenizer)
    assert lm.tokenizer.decode(opening) == "<|assistant|>"
    for text in ("", "anything", "<|assistant|>"):
        prompt = encode_chat(lm.tokenizer, [("user", text)], chat=ChatFormat())
        np.testing.assert_array_equal(prompt[-len(opening) :], opening)


def test_opening_of_a_template_that_needs_a_message_or_appends_nothing(lm: LanguageModel) -> None:
    """A template that reads its first message (as many do), and one that lets the assistant start without a mark."""
    tokenizer = without_template(lm.tokenizer)
    tokenizer.chat_template = "{{ messages[0]['role'] + messages[0]['content'] }}{% if add_generation_prompt %}>>{% endif %}"
    assert tokenizer.decode(encode_opening(tokenizer)) == ">>"
    tokenizer.chat_template = "{{ messages[0]['role'] + messages[0]['content'] }}"
    assert encode_opening(tokenizer) == []
