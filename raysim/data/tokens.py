"""Records as token ids: the prompt in the model's chat template, and the response that training and evaluation score.

Prompt and response together are the tokens of the finished conversation as the template renders it, up to the token that ends the
assistant's turn. Without a template they are blocks of `### Instruction:` and `### Response:` after whatever the tokenizer begins a text with.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from raysim.data import chat as chats
from raysim.data.chat import ChatFormat, Turn
from raysim.data.records import Record

logger = logging.getLogger(__name__)

LONGEST_ENDING = 64
"""Characters behind an earlier answer among which the token that ends its turn is looked for."""


@dataclass(frozen=True)
class Example:
    """A record and its tokens; `response_ids` ends with the token that ends a turn unless the response was cut."""

    record: Record
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    earlier: tuple[tuple[int, int], ...] = ()
    """Stretches (start, end) of `prompt_ids` that are scored like the response: the assistant's earlier turns, where `data.loss_on` is `every`."""

    @property
    def num_tokens(self) -> int:
        """Prompt plus response, in tokens."""
        return len(self.prompt_ids) + len(self.response_ids)

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Places of the tokens that training and evaluation score, in order."""
        places = [place for start, end in self.earlier for place in range(start, end)]
        return (*places, *range(len(self.prompt_ids), self.num_tokens))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is no conversation, begun as the tokenizer begins a text."""
    return [*chats.begin_ids(tokenizer), *_ids(tokenizer, text)]


def encode_chat(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat) -> list[int]:
    """Token ids of a conversation `(role, text), ...` that ends where the assistant is to speak.

    A tokenizer without a chat template gets the turns as `### Instruction:` / `### Response:` blocks.
    Errors: ValueError if the template refuses the turns.
    """
    return [*_begin(tokenizer), *_ids(tokenizer, chats.prompt_text(tokenizer, turns, chat=chat))]


def encode_opening(tokenizer: Any, *, chat: ChatFormat = chats.DEFAULT_CHAT) -> list[int]:
    """Token ids that open the assistant's turn, with nothing said before: what stands before a response without its prompt.

    A chat template cannot render an empty conversation, so this is what it appends to one; empty if it appends nothing.
    """
    text = chats.turn_shape(tokenizer, chat).before if tokenizer.chat_template is not None else "### Response:\n"
    return [*_begin(tokenizer), *_ids(tokenizer, text)]


def end_of_turn(tokenizer: Any, *, chat: ChatFormat = chats.DEFAULT_CHAT) -> tuple[str, int | None]:
    """What the template writes after an answer up to the token that ends the turn, and that token; `("", None)` where it writes none."""
    return ("", None) if tokenizer.chat_template is None else _first_special(tokenizer, chats.turn_shape(tokenizer, chat).after)


@lru_cache(maxsize=8)
def _first_special(tokenizer: Any, text: str) -> tuple[str, int | None]:
    """The text up to the end of its first special token, and that token; of added tokens that are not special where there is no other."""
    added = tokenizer.added_tokens_decoder
    special = {i: str(token) for i, token in added.items() if token.special or i in tokenizer.all_special_ids}
    for tokens in (special, {i: str(token) for i, token in added.items()}):
        places = [(text.find(content), -len(content), i) for i, content in tokens.items() if content and content in text]
        if places:
            start, length, token_id = min(places)
            return text[: start - length], int(token_id)
    return "", None


def describe_chat(tokenizer: Any, *, chat: ChatFormat, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """What decides how conversations are written for a model and where it stops, for whoever reads a run's environment.json."""
    return {
        "has_template": tokenizer.chat_template is not None,
        "begins_with": tokenizer.convert_ids_to_tokens(_begin(tokenizer)),
        "opening": tokenizer.decode(encode_opening(tokenizer, chat=chat)),
        "end_of_turn": end_of_turn(tokenizer, chat=chat)[0] or None,
        "stop_tokens": tokenizer.convert_ids_to_tokens(list(stop_token_ids)),
        "template_args": json.loads(chat.template_args),
        "is_dated": chats.is_dated(tokenizer),
        "date": chat.date,
    }


def encode_records(
    records: Sequence[Record], *, tokenizer: Any, eos_token_id: int, max_length: int, chat: ChatFormat, loss_on: str = "last"
) -> tuple[list[Example], int]:
    """The records as examples, and how many responses were cut to `max_length` tokens in all.

    `eos_token_id` ends a response where the chat template ends it with no token. `loss_on` is `last` (the response is scored) or `every`
    (so are the assistant's earlier turns).
    Errors: ValueError if a prompt alone fills `max_length`, saying how many do and how long the longest is, or if the template refuses a record.
    """
    examples, num_cut, too_long, num_changed = [], 0, [], 0
    for record in records:
        try:
            example, is_whole = _encode(record, tokenizer=tokenizer, eos_token_id=eos_token_id, chat=chat, loss_on=loss_on)
        except ValueError as error:
            raise ValueError(f"data: record {record.record_id} ({record.instruction[:30]!r}...): {error}") from None
        num_changed += not is_whole
        room = max_length - len(example.prompt_ids)
        if room < 1:
            too_long.append(len(example.prompt_ids))
        num_cut += room >= 1 and len(example.response_ids) > room
        examples.append(dataclasses.replace(example, response_ids=example.response_ids[: max(room, 0)]))
    if num_changed:
        logger.warning(
            "data: %d of %d responses are not written whole by the model's chat template, which leaves a part of them out, such as a thought: "
            "what is trained is what it writes",
            num_changed,
            len(records),
        )
    if too_long:
        raise ValueError(
            f"data.max_length={max_length}: {len(too_long)} of {len(records)} prompts are that long or longer (longest {max(too_long)} tokens); "
            "raise data.max_length or shorten them"
        )
    return examples, num_cut


def _encode(record: Record, *, tokenizer: Any, eos_token_id: int, chat: ChatFormat, loss_on: str) -> tuple[Example, bool]:
    """The record as an example, and whether the template writes the whole of its response."""
    turns = [*record.history, ("user", record.instruction)]
    prompt_text, answer = chats.finished_texts(tokenizer, turns, record.response, chat=chat)
    prompt = _ids(tokenizer, prompt_text)
    ending, end_id = end_of_turn(tokenizer, chat=chat)
    body = answer.removesuffix(chats.turn_shape(tokenizer, chat).after) if tokenizer.chat_template is not None else answer
    # What is tokenised together comes out as in the finished conversation; where that joins the two, the prompt is what is asked with.
    whole = _ids(tokenizer, prompt_text + body + ending)
    response = whole[len(prompt) :] if whole[: len(prompt)] == prompt else _ids(tokenizer, body + ending)
    response += [eos_token_id] if end_id is None else []
    begin = _begin(tokenizer)
    spans = chats.earlier_answers(tokenizer, turns, chat=chat) if loss_on == "every" and record.history else []
    earlier = _token_spans(tokenizer, prompt_text, spans, shift=len(begin), ending=ending) if spans else ()
    example = Example(record=record, prompt_ids=(*begin, *prompt), response_ids=tuple(response), earlier=earlier)
    return example, record.response.strip() in answer


def _token_spans(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], *, shift: int, ending: str) -> tuple[tuple[int, int], ...]:
    """The tokens of `text` within each span of characters and the `ending` that may follow it, as places counted from `shift`."""
    if not tokenizer.is_fast:
        raise ValueError("data.loss_on='every' needs a tokenizer that tells where its tokens stand in a text (a fast one); use 'last'")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for start, stop in spans:
        end = stop + len(_ending_at(tokenizer, text, stop, ending=ending))
        # Blanks before or after the answer that share a token with its first or last letters come along.
        inside = [
            place
            for place, (first, last) in enumerate(offsets)
            if start < last
            and first < end
            and (first >= start or text[first:start].isspace())
            and (last <= end or text[end:last].isspace())
        ]
        if inside:
            found.append((inside[0] + shift, inside[-1] + 1 + shift))
    return tuple(found)


def _ending_at(tokenizer: Any, text: str, place: int, *, ending: str) -> str:
    """What ends an earlier turn at `place`: the last turn's ending, or a special token of its own that opens no turn (gpt-oss ends those otherwise)."""
    if text.startswith(ending, place) or not ending:
        return ending
    own, token = _first_special(tokenizer, text[place : place + LONGEST_ENDING])
    opening = encode_opening(tokenizer)
    is_end = token is not None and token not in opening and not own.removesuffix(tokenizer.convert_ids_to_tokens(token)).strip()
    return own if is_end else ""


def _begin(tokenizer: Any) -> list[int]:
    """A chat template begins its text itself."""
    return chats.begin_ids(tokenizer) if tokenizer.chat_template is None else []


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
