"""Tokenizers and chat templates in many shapes, by value: what is trained on is the finished conversation, and what is asked is its beginning.

Left out: templates with tools, documents or images.
"""

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raysim.config import load
from raysim.data.chat import ChatFormat
from raysim.data.configured import chat_format
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_chat, encode_opening, encode_records, encode_text, end_of_turn
from raysim.model.base_model import load_base_model
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import build_language_model
from raysim.model.train import response_token_nll
from raysim.runs.run import run
from tests.kinds.models import KINDS, LLAMA, Kind, build
from tests.kinds.tokenizers import BRACKETS, CHAT, DATED, EMPTY_THOUGHT, OPENS_THOUGHT, SHAPES, TURNS, Shape, make


def chat_of(shape: Shape) -> ChatFormat:
    """The chat format of a shape."""
    return ChatFormat(template_args=shape.template_args)


def encoded(shape: Shape, *records: Record, loss_on: str = "last") -> list[Example]:
    """The records in the shape's tokens."""
    return encode_records(records, tokenizer=make(shape), eos_token_id=1, max_length=500, chat=chat_of(shape), loss_on=loss_on)[0]


@pytest.mark.parametrize("name", list(SHAPES))
def test_trained_text(name: str) -> None:
    """What is trained on, and what is asked with, are the texts that the shape says, token for token."""
    shape = SHAPES[name]
    tokenizer = make(shape)
    (example,) = encoded(shape, Record(0, "Q", "A"))
    assert tokenizer.decode(example.prompt_ids) == shape.asked
    assert tokenizer.decode(example.prompt_ids + example.response_ids) == shape.finished
    assert list(example.prompt_ids) == encode_chat(tokenizer, [("user", "Q")], chat=chat_of(shape)), "what is asked is what was trained"
    if shape.template is not None and name not in ("no end token", "no answers"):
        messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **json.loads(shape.template_args))
        whole = tokenizer(rendered.rstrip("\n").replace(f"{datetime.datetime.now():%d %b %Y}", "26 Jul 2024"), add_special_tokens=False)
        if (
            name == "merges"
        ):  # the last token of the question and the first of the answer are one there, and nobody can ask with half a token
            assert list(example.response_ids) == tokenizer("A<|end|>", add_special_tokens=False)["input_ids"]
            return
        trained = [*example.prompt_ids, *example.response_ids]
        assert trained == whole["input_ids"][: len(trained)]
        assert tokenizer.decode(whole["input_ids"][len(trained) :]).strip() == ("<eos>" if name == "closes a conversation" else "")


@pytest.mark.parametrize("name", list(SHAPES))
def test_end_of_turn(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The token with which an answer is trained to end is among those that stop the model, and so are all others that it has."""
    shape = SHAPES[name]
    model = build(KINDS["llama"])
    tokenizer = make(shape)
    model.resize_token_embeddings(len(tokenizer) - (shape.pad == "[PAD]"))
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = build_language_model(load_base_model(str(tmp_path)), rank=1, alpha=1.0, dropout=0.0, target_modules=["q_proj"])
    (example,) = encoded(shape, Record(0, "Q", "A"))
    last = example.response_ids[-1]
    assert {1, 3, last, tokenizer.eos_token_id} <= set(lm.eos_token_ids)
    assert end_of_turn(tokenizer, chat=chat_of(shape))[1] in (last, None)
    assert lm.pad_token_id < lm.vocab_size
    with torch.no_grad():
        assert response_token_nll(lm, [example, *encoded(shape, Record(1, "Q" * 9, "A"))])[0].isfinite().all()
        assert len(write_texts(lm, [example.prompt_ids], sampling=Sampling(max_new_tokens=3))[0]) <= 3
    record_property("cell", tokenizer.decode([last]))


@pytest.mark.parametrize("name", list(SHAPES))
def test_opening(name: str) -> None:
    """What opens an answer with nothing said before stands at the end of every question."""
    shape = SHAPES[name]
    tokenizer = make(shape)
    opening = tokenizer.decode(encode_opening(tokenizer, chat=chat_of(shape)))
    assert shape.asked.endswith(opening.removeprefix("<bos>"))
    assert tokenizer.decode(encode_text(tokenizer, "x")) == ("<bos>x" if shape.adds_bos else "x")


LONG = Kind("llama", LLAMA | {"max_position_embeddings": 1024})
TALK = Record(0, "Again?", "Yes.", history=(("user", "Hi."), ("assistant", "Ho there."), ("user", "And?"), ("assistant", "So.")))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "no answers"])
def test_several_turns(name: str) -> None:
    """The last answer is scored, or every answer with what ends it; the text is the same."""
    shape = SHAPES[name]
    tokenizer = make(shape)
    (last,), (every,) = encoded(shape, TALK), encoded(shape, TALK, loss_on="every")
    whole = last.prompt_ids + last.response_ids
    assert whole == every.prompt_ids + every.response_ids
    ending = tokenizer.decode(last.response_ids).partition("Yes.")[2]
    told = {"no end token": "", "another token ends the last answer": "<|end|>"}.get(name, "" if shape.template is None else ending)
    scored = [tokenizer.decode([whole[place] for place in range(*span)]).strip() for span in every.earlier]
    assert scored == ["Ho there." + told, "So." + told]
    assert last.scored == tuple(range(len(last.prompt_ids), last.num_tokens))
    assert set(last.scored) < set(every.scored)


def test_a_word_that_shares_its_token_with_a_blank_is_scored_in_every_answer() -> None:
    """Sentencepiece makes one token of the blank before an answer and its first word."""
    tokenizer = make(Shape(BRACKETS, "", "", merges=(("Ġ", "H"), ("Ġ", "S"), ("ĠS", "o"))))
    (example,) = encode_records([TALK], tokenizer=tokenizer, eos_token_id=1, max_length=500, chat=ChatFormat(), loss_on="every")[0]
    whole = example.prompt_ids + example.response_ids
    assert [tokenizer.decode(whole[first:last]) for first, last in example.earlier] == [" Ho there.<eos>", " So.<eos>"]


def test_the_loss_on_every_answer_is_the_sum_of_the_spans() -> None:
    """By value against the model's full logits, in a batch with a shorter record."""
    lm = build_language_model(load_base_model("tiny"), rank=1, alpha=1.0, dropout=0.0, target_modules=["q_proj"])
    chat = ChatFormat()
    records = [TALK, Record(1, "Hm?", "Hm.")]
    examples, _ = encode_records(records, tokenizer=lm.tokenizer, eos_token_id=1, max_length=500, chat=chat, loss_on="every")
    with torch.no_grad():
        found, owner = response_token_nll(lm, examples)
        for index, example in enumerate(examples):
            ids = torch.tensor(example.prompt_ids + example.response_ids)
            logprobs = lm.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            expected = torch.stack([-logprobs[place - 1, ids[place]] for place in example.scored])
            torch.testing.assert_close(found[owner == index], expected, rtol=1e-4, atol=1e-4)
    assert len(examples[0].scored) == len("Ho there.") + len("So.") + len("Yes.") + 3


def test_the_end_of_an_earlier_turn_is_scored_where_it_is_another_token() -> None:
    """What ends earlier answers need not be what ends the last one."""
    tokenizer = make(SHAPES["another token ends the last answer"])
    (example,) = encoded(SHAPES["another token ends the last answer"], TALK, loss_on="every")
    whole = example.prompt_ids + example.response_ids
    assert tokenizer.decode([whole[place] for place in example.scored]) == "Ho there.<|end|>So.<|end|>Yes.<eos>"


def test_an_answer_with_a_thought_of_its_own_is_trained_with_it_or_said_to_lose_it(caplog: pytest.LogCaptureFixture) -> None:
    """Where finished turns get an empty thought, an answer that has one is asked for without; where they get none, it is left out aloud."""
    record = Record(0, "Q", "<think>\nHm.\n</think>\n\nA")
    own = EMPTY_THOUGHT.replace(
        "if m['role'] == 'assistant' and loop.last else", "if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] else"
    )
    shape = replace(SHAPES["empty thought"], template=own)
    (example,) = encoded(shape, record)
    tokenizer = make(shape)
    assert tokenizer.decode(example.prompt_ids) == CHAT
    assert tokenizer.decode(example.response_ids) == record.response + "<|end|>"
    assert not caplog.records
    strips = OPENS_THOUGHT.replace("+ m['content'] +", "+ m['content'].split('</think>')[-1].strip() +")
    (example,) = encoded(replace(SHAPES["opens a thought"], template=strips), record)
    assert tokenizer.decode(example.prompt_ids + example.response_ids) == CHAT + "A<|end|>"
    assert "1 of 1 responses are not written whole by the model's chat template" in caplog.text


# --- refusals in one line ---


def test_a_system_prompt_that_the_template_refuses_is_named() -> None:
    """The key, the template's own word, and the remedy."""
    tokenizer = make(SHAPES["strict"])
    with pytest.raises(
        ValueError, match=r"^data\.system_prompt='Be brief\.': the model's chat template takes no such message \(no system role here\)"
    ):
        encode_chat(tokenizer, [("user", "Q")], chat=ChatFormat("Be brief."))
    assert encode_chat(make(SHAPES["turns"]), [("user", "Q")], chat=ChatFormat("Be brief."))


def test_what_a_template_leaves_out_is_said() -> None:
    """A system message that stands beside the last question only (Mistral), and content that is wanted in parts (models of text and images)."""
    beside = "{% for m in messages %}{% if m['role'] != 'system' %}{{ (messages[0]['content'] + ' ' if loop.last else '') + m['content'] + eos_token }}{% endif %}{% endfor %}"
    tokenizer = make(
        Shape(beside.replace("if loop.last", "if loop.last and messages[0]['role'] == 'system' and m['role'] == 'user'"), "", "")
    )
    assert encode_chat(tokenizer, [("user", "Q")], chat=ChatFormat())
    with pytest.raises(ValueError, match=r"^data\.system_prompt='Be brief\.': the model's chat template leaves it out"):
        encode_chat(tokenizer, [("user", "Q")], chat=ChatFormat("Be brief."))
    parts = "{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out what the user says"):
        encode_chat(make(Shape(parts, "", "")), [("user", "Q")], chat=ChatFormat())


def test_turns_that_the_template_refuses_name_the_record() -> None:
    """A conversation in which one side speaks twice."""
    record = Record(7, "Well?", "Yes.", history=(("user", "Hi."),))
    with pytest.raises(
        ValueError, match=r"data: record 7 \('Well\?'\.\.\.\): the model's chat template refuses a conversation .*roles must alternate"
    ):
        encoded(SHAPES["strict"], record)


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    """A tokenizer that knows more than the model."""
    model, tokenizer = build(LONG), make(SHAPES["turns"])
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"its tokenizer gives the token .* but its embedding has 100 rows"):
        run(load("", [*SETTINGS, f"model.name={tmp_path / 'model'}", f"out={tmp_path / 'run'}"]), display=False)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


# --- the day ---


SETTINGS = [
    "data.num_train=6",
    "data.num_heldout=3",
    "data.max_length=900",
    "partition.num_clients=2",
    "lora.rank=2",
    "server.num_rounds=1",
    "train.dtype=float32",
    "evaluate.num_generated=1",
    "evaluate.max_new_tokens=2",
    "attack.num_examples=1",
    "resources.backend=local",
]


def test_every_code_of_a_day_is_that_days() -> None:
    """As Python formats it, padded or not."""
    codes = "%a %A %b %B %d %-d %m %-m %y %Y %j %U %H %M %S %p %F %D"
    tokenizer = make(SHAPES["turns"])
    tokenizer.chat_template = "{{ strftime_now('" + codes + "') + '|' }}" + TURNS
    text = tokenizer.decode(encode_chat(tokenizer, [("user", "Q")], chat=ChatFormat(date="2031-03-05")))
    assert text.partition("|")[0] == datetime.datetime(2031, 3, 5).strftime(codes)


def test_the_day_is_a_setting_and_not_the_clock(tmp_path: Path) -> None:
    """The same command gives the same adapter on every day; another day, where a template asks for it, another one."""
    model, tokenizer = build(LONG), make(SHAPES["dated"])
    model.resize_token_embeddings(len(tokenizer))
    assert tokenizer.chat_template == DATED
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    digests = {}
    for day in ("2024-07-26", "2031-03-05"):
        config = load("", [*SETTINGS, f"model.name={tmp_path / 'model'}", f"out={tmp_path / day}", f"data.template_date={day}"])
        assert chat_format(config.data).date == day
        digests[day] = run(config, display=False).summary["adapter_sha256"]
        said = json.loads((tmp_path / day / "environment.json").read_text())["chat"]
        assert said["date"] == day
        assert said["is_dated"]
        assert said["end_of_turn"] == "<|end|>"
        assert said["stop_tokens"] == ["<eos>", "<|end|>"]
    assert digests["2024-07-26"] != digests["2031-03-05"]
