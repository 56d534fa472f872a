"""Records as token ids: the prompt in the model's chat template, the response that training and evaluation score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.data.chat import ChatFormat
from raysim.data.records import Record

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A record and its tokens; `response_ids` ends with the end-of-turn token unless the response was cut."""

    record: Record
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Prompt plus response, in tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


def encode_chat(tokenizer: Any, turns: Sequence[tuple[str, str]], *, chat: ChatFormat) -> list[int]:
    """Token ids of a conversation `(role, text), ...` that ends where the assistant is to speak.

    A tokenizer without a chat template gets the turns as `### Instruction:` / `### Response:` blocks.
    """
    messages: list[Message] = [] if chat.system_prompt is None else [{"role": "system", "content": chat.system_prompt}]
    messages += [{"role": role, "content": text} for role, text in turns]
    if tokenizer.chat_template is None:
        names = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
        text = "\n\n".join(names[m["role"]] + m["content"] for m in messages) + "\n\n### Response:\n"
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_opening(tokenizer: Any) -> list[int]:
    """Token ids that open the assistant's turn, with nothing said before: what stands before a response without its prompt.

    A chat template cannot render an empty conversation, so this is what it appends to one; empty if it appends nothing.
    """
    if tokenizer.chat_template is None:
        text = "### Response:\n"
    else:
        conversation = [{"role": "user", "content": ""}]
        closed, opened = (tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=flag) for flag in (False, True))
        text = opened.removeprefix(closed)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_records(
    records: Sequence[Record], *, tokenizer: Any, eos_token_id: int, max_length: int, chat: ChatFormat
) -> tuple[list[Example], int]:
    """The records as examples, and how many responses were cut to `max_length` tokens in all.

    Errors: ValueError if a prompt alone fills `max_length`, saying how many do and how long the longest is.
    """
    examples, num_cut, too_long = [], 0, []
    for record in records:
        prompt = encode_chat(tokenizer, [("user", record.instruction)], chat=chat)
        response = [*tokenizer(record.response, add_special_tokens=False)["input_ids"], eos_token_id]
        room = max_length - len(prompt)
        if room < 1:
            too_long.append(len(prompt))
        num_cut += room >= 1 and len(response) > room
        examples.append(Example(record=record, prompt_ids=tuple(prompt), response_ids=tuple(response[: max(room, 0)])))
    if too_long:
        raise ValueError(
            f"data.max_length={max_length}: {len(too_long)} of {len(records)} prompts are that long or longer (longest {max(too_long)} tokens); "
            "raise data.max_length or shorten them"
        )
    return examples, num_cut
