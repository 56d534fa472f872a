"""How a conversation is put to a model: its chat template at work, where an assistant's turn begins in it, and with what it ends.

What is trained on is what the template renders for the finished conversation, and what is asked is that text up to the answer. Where a
template asks for an answer in other words than it writes one down (it opens a thought that finished turns do not have), the finished
form counts, so that no model learns an answer as the beginning of a thought.
A template that wants to know the day is told the one that is configured: the clock enters no prompt.
Left out: tools, documents, and content other than text.
"""

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DATE = "2024-07-26"
"""The day that chat templates are told where no other is set, so that the same command gives the same adapter on every day."""
ANSWER = "raysim-answer-0"
"""Stands where the assistant's answer would, to find the place; a digit is put behind it until no turn holds it."""
QUESTION = "raysim-question"
"""Stands for what a user says, to see how a template writes it."""
NAMES = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
"""What stands before a turn for tokenizers without a chat template."""
DATE_CODES = "aAbBdmyYjUWwuVGxcDFehnt"
"""Codes of strftime that templates may use for a day; the time of that day is midnight."""

Turn = tuple[str, str]
"""Who speaks (`system`, `user` or `assistant`), and what."""


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template is given beside the turns of a conversation."""

    system_prompt: str | None = None
    """System message; None for the template's own default. A conversation with a system turn of its own keeps that."""
    template_args: str = "{}"
    """Further arguments of the template, such as `enable_thinking`, as a JSON object."""
    date: str = DATE
    """The day, as YYYY-MM-DD, for templates that say which day it is."""


DEFAULT_CHAT = ChatFormat()
"""What a template is given where nothing is configured."""


@dataclass(frozen=True)
class TurnShape:
    """How a template writes an assistant's turn."""

    is_opened: bool
    """Whether a request for an answer ends just where a finished turn has the answer; else that place is looked up in the finished turn."""
    before: str
    """What stands between the last turn and the answer, such as `<|im_start|>assistant` and a line break."""
    after: str
    """What follows the answer."""
    has_answers: bool = True
    """Whether the template writes answers at all; one that cannot has them put behind what it asks with."""


def as_turns(turns: Sequence[Turn], *, chat: ChatFormat) -> list[Turn]:
    """The turns with the system message that is configured, unless they have one."""
    has_own = bool(turns) and turns[0][0] == "system"
    return [*turns] if has_own or chat.system_prompt is None else [("system", chat.system_prompt), *turns]


def render(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat, is_open: bool) -> str:
    """The text of a conversation in the tokenizer's chat template; with `is_open` it ends where the template asks for an answer.

    Errors: ValueError if the template refuses the turns, naming `data.system_prompt` if it is that which it refuses.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(NAMES[role] + content for role, content in turns)
        return f"{text}\n\n### Response:\n" if is_open else text
    try:
        return _rendered(tokenizer, turns, chat=chat, is_open=is_open)
    except Exception as error:  # a template is a program, and may end in any of Python's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if turns[0] == ("system", chat.system_prompt) and _accepts(tokenizer, turns[1:], chat=chat):
            raise ValueError(
                f"data.system_prompt={chat.system_prompt!r}: the model's chat template takes no such message ({reason}); "
                "leave it null, or put the text into the instructions"
            ) from None
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"the model's chat template refuses a conversation of the turns {roles} ({reason})") from None


def _accepts(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat) -> bool:
    try:
        _rendered(tokenizer, turns, chat=chat, is_open=False)
    except Exception:  # as above
        return False
    return True


def _rendered(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat, is_open: bool) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        chat_template=_dated(tokenizer.get_chat_template(), date=chat.date),
        tokenize=False,
        add_generation_prompt=is_open,
        **json.loads(chat.template_args),
    )
    return str(text)


@lru_cache(maxsize=8)
def _dated(template: str, *, date: str) -> str:
    """The template with a `strftime_now` of its own that knows one day only.

    A macro of that name hides transformers' function, which reads the clock; functions cannot be passed to a template as arguments.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    codes = {f"%{code}": day.strftime(f"%{code}") for code in (*DATE_CODES, *"HIMSpfTRrXZz")}
    codes |= {f"%-{code}": day.strftime(f"%{code}").lstrip("0") or "0" for code in "dmyHIMSj"}
    # The line break belongs to the macro's end, and the renderer drops it: what the template begins with stays as it is.
    filters = "".join(f"|replace({code!r}, {text!r})" for code, text in sorted(codes.items(), key=lambda item: -len(item[0])))
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"


def turn_shape(tokenizer: Any, chat: ChatFormat) -> TurnShape:
    """How the tokenizer's template writes an assistant's turn (see `TurnShape`).

    Errors: ValueError if the template refuses a conversation of a user and an assistant, or leaves out what is said before the answer.
    """
    return _turn_shape(tokenizer, None if tokenizer.chat_template is None else tokenizer.get_chat_template(), chat)


@lru_cache(maxsize=8)
def _turn_shape(tokenizer: Any, template: str | None, chat: ChatFormat) -> TurnShape:
    """`template` is the tokenizer's own: a name for what is remembered."""
    asked = as_turns([("user", QUESTION)], chat=chat)
    opened = render(tokenizer, asked, chat=chat, is_open=True)
    closed = render(tokenizer, asked, chat=chat, is_open=False)
    _check_said(opened, chat=chat)
    if ANSWER not in render(tokenizer, [*asked, ("assistant", ANSWER)], chat=chat, is_open=False):
        return TurnShape(True, before=_added(tokenizer, opened, closed), after="", has_answers=False)
    before, after = _around_answer(tokenizer, asked, chat=chat)
    # White space between the two belongs to the answer, as its tokens do.
    is_opened = before.startswith(opened) and not before[len(opened) :].strip()
    start = opened if is_opened else before
    _check_said(start, chat=chat)
    return TurnShape(is_opened, before=_added(tokenizer, start, closed), after=after)


def _added(tokenizer: Any, opened: str, closed: str) -> str:
    """What `opened` has that `closed` has not, from the first token in which they differ: a template may end a conversation that is not gone on with."""
    if opened.startswith(closed):
        return opened[len(closed) :]
    ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (opened, closed))
    shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    return str(tokenizer.decode(ours[shared:]))


def _check_said(prompt: str, *, chat: ChatFormat) -> None:
    """That the text before an answer holds what was said: some templates want it in parts, or write a system message beside the last question only."""
    if QUESTION not in prompt:
        raise ValueError(
            "the model's chat template leaves out what the user says (does it want lists of parts?); give the model another template"
        )
    if chat.system_prompt and chat.system_prompt.strip() not in prompt:
        raise ValueError(
            f"data.system_prompt={chat.system_prompt!r}: the model's chat template leaves it out of what comes before an answer; "
            "leave it null, or put the text into the instructions"
        )


def _around_answer(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat) -> tuple[str, str]:
    """What a finished conversation has before the answer to `turns`, and what after it."""
    marker = ANSWER
    while any(marker in content for _, content in turns):
        marker += "0"
    finished = render(tokenizer, [*turns, ("assistant", marker)], chat=chat, is_open=False)
    before, found, after = finished.rpartition(marker)
    if not found:
        raise ValueError(
            "the model's chat template leaves the assistant's answer out of this conversation; give the model another template"
        )
    return before, after


def prompt_text(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat) -> str:
    """The text of a conversation up to the assistant's answer to `turns` (without a system turn unless they have one).

    Errors: as `render`.
    """
    whole = as_turns(turns, chat=chat)
    if turn_shape(tokenizer, chat).is_opened:
        return render(tokenizer, whole, chat=chat, is_open=True)
    return _around_answer(tokenizer, whole, chat=chat)[0]


def finished_texts(tokenizer: Any, turns: Sequence[Turn], answer: str, *, chat: ChatFormat) -> tuple[str, str]:
    """The text of a finished conversation up to the answer, and from there: the answer as the template writes it, and all that follows it.

    The first is `prompt_text`, but for an answer that brings what that has already (an empty thought, where the answer has one of its own):
    then it is what the template asks with.
    Errors: ValueError if the template writes what comes before in another way once there is an answer.
    """
    prompt = prompt_text(tokenizer, turns, chat=chat)
    if tokenizer.chat_template is None or not turn_shape(tokenizer, chat).has_answers:
        return prompt, answer
    whole = as_turns(turns, chat=chat)
    finished = render(tokenizer, [*whole, ("assistant", answer)], chat=chat, is_open=False)
    if finished.startswith(prompt):
        return prompt, finished[len(prompt) :]
    opened = render(tokenizer, whole, chat=chat, is_open=True)
    if finished.startswith(opened):
        return opened, finished[len(opened) :]
    roles = ", ".join(role for role, _ in whole)
    raise ValueError(f"the model's chat template writes the turns {roles} in another way once they are answered; give it another template")


def earlier_answers(tokenizer: Any, turns: Sequence[Turn], *, chat: ChatFormat) -> list[tuple[int, int]]:
    """Where in `prompt_text` the earlier answers of the assistant stand, as `(start, end)` in characters.

    An answer that the template leaves out of what has passed is left out here too.
    """
    whole = as_turns(turns, chat=chat)
    prompt = prompt_text(tokenizer, turns, chat=chat)
    spans = []
    for place, (role, content) in enumerate(whole):
        if role != "assistant":
            continue
        marked = [*whole[:place], ("assistant", ANSWER), *whole[place + 1 :]]
        start = prompt_text(tokenizer, marked, chat=chat).find(ANSWER)
        text = content if prompt.startswith(content, start) else content.strip()
        if start >= 0 and prompt.startswith(text, start):
            spans.append((start, start + len(text)))
    return spans


def begin_ids(tokenizer: Any) -> list[int]:
    """Token ids with which the tokenizer begins a text, such as its beginning-of-sequence token; empty for most."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return whole[: places[0]] if places else []


def is_dated(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks which day it is."""
    return tokenizer.chat_template is not None and re.search(r"\bstrftime_now\b", tokenizer.get_chat_template()) is not None
