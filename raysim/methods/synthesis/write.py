"""Self-generation: a model writes new instruction-response pairs from a client's own examples, and filters judge them.

FEDPIT (arXiv 2403.06131; its later version ACM TIST 17(5), 2026, section 3.3): a new instruction continues a numbered
list of local ones; its response follows local pairs shown as earlier turns; format, diversity and copy filters drop what
is malformed or too near a local record. The wording of the prompts is ours. Instructions are decoded greedily: their
variety comes from the demonstrations drawn. Where responses are labels, of which the papers do not speak, a response is well
formed if it is a label of the client's, and copies nobody; the question that all instructions open with is not written anew.
Of a conversation, its last question and answer are shown; the copy filter knows all its answers.
Neither the filters nor the score bound what a pair tells about the demonstrations.
Left out: differentially private generation.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from raysim.data.chat import DEFAULT_CHAT, ChatFormat
from raysim.data.records import Record
from raysim.data.refusals import is_refusal
from raysim.data.similarity import largest_rouge_l
from raysim.data.tokens import Example, encode_chat, encode_opening, encode_text
from raysim.data.words import FULL_STOPS, fold, pieces
from raysim.data.written import written_text
from raysim.lora.layout import Vector
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel
from raysim.model.train import mean_nll
from raysim.rng import numpy_rng, seed_for

T = TypeVar("T")

MIN_RESPONSE_WORDS = 3
"""Shorter responses fit no template; letters count as words where a script puts no blanks between words."""
LINE_BREAKS = "\n\x85\u2028\u2029"
"""What ends a line; control characters that some take for line ends as well do not."""


@dataclass(frozen=True)
class SynthesisSettings:
    """What self-generation needs; fields as in `config.FedpitConfig`."""

    num_candidates: int
    num_demonstrations: int
    num_response_demonstrations: int
    max_rouge_l: float
    temperature: float
    repetition_penalty: float
    max_instruction_tokens: int
    max_response_tokens: int
    min_instruction_words: int
    num_retries: int
    opening: str
    """What all instructions begin with; new ones are given it, and are compared without it. Empty for most sets."""
    labelled: bool
    """Whether a response is a label and nothing else."""
    batch_size: int
    chat: ChatFormat


@dataclass(frozen=True)
class Candidate:
    """A synthetic pair and what became of it: `verdict` is `kept`, `format`, `diversity`, `response`, `copy` or `score`."""

    instruction: str
    response: str = ""
    verdict: str = "kept"
    max_rouge_l: float | None = None
    """Largest ROUGE-L of the instruction with one it must differ from, or of the response with a local one if that is larger (and no label)."""
    score: float | None = None
    """Instruction-following score, lower is better."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, with a flag `kept`."""
        return asdict(self) | {"kept": self.verdict == "kept"}


def synthesize(
    lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, settings: SynthesisSettings, known: Sequence[str], seed: int
) -> list[Candidate]:
    """`num_candidates` pairs that the model with `adapter` writes from `examples`, each with the filters' verdict.

    `known` are instructions from earlier rounds, which new ones must not repeat. No examples give no candidates.
    """
    if not examples or not settings.num_candidates:
        return []
    lm.set_adapter(adapter)
    lm.model.eval()
    texts = write_instructions(lm, examples, settings=settings, seed=seed)
    candidates = filter_instructions(texts, local=[e.record.instruction for e in examples], known=known, settings=settings)
    return write_responses(lm, candidates, examples, settings=settings, seed=seed)


def choose_public(
    records: Sequence[Example], examples: Sequence[Example], *, settings: SynthesisSettings, known: Sequence[str], seed: int
) -> list[Candidate]:
    """`num_candidates` of the public `records`, drawn without replacement, with the verdicts of the filters that mean something for them.

    `diversity` drops an instruction too near a local one of `examples`, one of `known` or an earlier one; `copy` a response too near a
    local one, if it is no label. What a person wrote is held to no format. No examples give no candidates.
    """
    if not examples:
        return []
    accepted = _without_opening([*(example.record.instruction for example in examples), *known], settings=settings)
    local = [] if settings.labelled else [answer for example in examples for answer in example.record.answers]
    candidates = []
    for index in numpy_rng(seed, "public").permutation(len(records))[: settings.num_candidates]:
        record = records[index].record
        text = record.instruction.removeprefix(settings.opening)
        nearest, copied = largest_rouge_l(text, accepted), largest_rouge_l(record.response, local)
        verdict = "diversity" if nearest > settings.max_rouge_l else "copy" if copied > settings.max_rouge_l else "kept"
        if verdict == "kept":
            accepted.append(text)
        candidates.append(Candidate(record.instruction, record.response, verdict, max(nearest, copied)))
    return candidates


def write_instructions(lm: LanguageModel, examples: Sequence[Example], *, settings: SynthesisSettings, seed: int) -> list[str]:
    """New instructions, each continuing a numbered list of `num_demonstrations` local ones drawn at random, all without the opening."""

    def render(shown: Sequence[str]) -> list[int]:
        return encode_text(lm.tokenizer, instruction_prompt(shown))

    prompts = []
    for index in range(settings.num_candidates):
        count = min(settings.num_demonstrations, len(examples))
        chosen = numpy_rng(seed, "instruction", index).choice(len(examples), size=count, replace=False)
        shown = [one_line(examples[i].record.instruction.removeprefix(settings.opening)) for i in chosen]
        prompts.append(fitting(shown, render, room=lm.max_positions - settings.max_instruction_tokens))
    sampling = Sampling(max_new_tokens=settings.max_instruction_tokens, stop_token_ids=newline_token_ids(lm.tokenizer))
    outputs = write_texts(lm, prompts, sampling=sampling, seeds=None, batch_size=settings.batch_size)
    return [one_line(written_text(lm.tokenizer, output)) for output in outputs]


def instruction_prompt(shown: Sequence[str]) -> str:
    """A numbered list of tasks that breaks off where the next one is to be written."""
    lines = ["The following is a list of different tasks from one collection, each on a line of its own.", ""]
    lines += [f"{number}. {text}" for number, text in enumerate(shown, start=1)]
    return "\n".join([*lines, f"{len(shown) + 1}."])


def filter_instructions(
    texts: Sequence[str], *, local: Sequence[str], known: Sequence[str], settings: SynthesisSettings
) -> list[Candidate]:
    """The instructions, given their opening, as candidates: `format` drops refusals and fragments, `diversity` what is too near another one.

    `texts` are without the opening; `local` and `known` have it.
    """
    candidates: list[Candidate] = []
    accepted = _without_opening([*local, *known], settings=settings)
    for text in texts:
        nearest = largest_rouge_l(text, accepted)
        verdict = "kept"
        if is_malformed(text, min_words=settings.min_instruction_words):
            verdict = "format"
        elif nearest > settings.max_rouge_l:
            verdict = "diversity"
        else:
            accepted.append(text)
        candidates.append(Candidate(instruction=settings.opening + text, verdict=verdict, max_rouge_l=nearest))
    return candidates


def write_responses(
    lm: LanguageModel, candidates: Sequence[Candidate], examples: Sequence[Example], *, settings: SynthesisSettings, seed: int
) -> list[Candidate]:
    """The candidates with responses; one that fits the template in none of `num_retries` attempts is dropped (`response`).

    The pairs shown are drawn anew for each attempt, and are the same for all candidates of it: the model reads them once.
    """
    results = list(candidates)
    pending = [i for i, candidate in enumerate(results) if candidate.verdict == "kept"]
    local = [answer for example in examples for answer in example.record.answers]
    for attempt in range(settings.num_retries):
        count = min(settings.num_response_demonstrations, len(examples))
        chosen = numpy_rng(seed, "response", attempt).choice(len(examples), size=count, replace=False)
        shown, room = [examples[i] for i in chosen], lm.max_positions - settings.max_response_tokens
        prompts = []
        for index in pending:
            render = partial(response_prompt, lm, instruction=results[index].instruction, chat=settings.chat)
            prompts.append(fitting(shown, render, room=room))
        outputs = write_texts(
            lm,
            prompts,
            sampling=Sampling(
                max_new_tokens=settings.max_response_tokens,
                temperature=settings.temperature,
                repetition_penalty=settings.repetition_penalty,
            ),
            seeds=[seed_for(seed, "tokens", index, attempt) for index in pending],
            batch_size=settings.batch_size,
        )
        answers = [written_text(lm.tokenizer, output).strip() for output in outputs]
        for index, answer in zip(pending, answers, strict=True):
            results[index] = _judged_response(results[index], answer, local=local, settings=settings)
        pending = [index for index in pending if results[index].verdict == "response"]
    return results


def instruction_following_scores(
    lm: LanguageModel, adapter: Vector, pairs: Sequence[Example], *, batch_size: int, chat: ChatFormat = DEFAULT_CHAT
) -> list[float]:
    """IFS of each pair under `adapter`: mean NLL of the response given the prompt, over its mean NLL without one.

    TIST section 3.4: L(y | x) / L(y); low means that the instruction helps to predict the response.
    """
    lm.set_adapter(adapter)
    bare = tuple(encode_opening(lm.tokenizer, chat=chat)) or (lm.pad_token_id,)
    alone = [replace(pair, prompt_ids=bare) for pair in pairs]
    given = mean_nll(lm, pairs, batch_size=batch_size)
    direct = mean_nll(lm, alone, batch_size=batch_size)
    return [(g / max(n, 1)) / max(d / max(m, 1), 1e-9) for (g, n), (d, m) in zip(given, direct, strict=True)]


def as_record(candidate: Candidate, *, record_id: int) -> Record:
    """The candidate as a training record (without private details: none are known to be in it)."""
    return Record(record_id=record_id, instruction=candidate.instruction, response=candidate.response, label="synthetic")


def is_malformed(text: str, *, min_words: int) -> bool:
    """Whether a text is a fragment of fewer than `min_words` words (letters where a script puts no blanks), or begins as a refusal does."""
    return len(pieces(text)) < min_words or is_refusal(text)


def response_prompt(lm: LanguageModel, shown: Sequence[Example], *, instruction: str, chat: ChatFormat) -> list[int]:
    """Token ids of a conversation in which `instruction` is to be answered, after the pairs `shown` as earlier turns."""
    turns = [turn for example in shown for turn in (("user", example.record.instruction), ("assistant", example.record.response))]
    return encode_chat(lm.tokenizer, [*turns, ("user", instruction)], chat=chat)


def fitting(shown: Sequence[T], render: Callable[[Sequence[T]], list[int]], *, room: int) -> list[int]:
    """The rendered prompt with as many of the demonstrations as fit the context, the first ones left out first."""
    ids = render(shown)
    for start in range(1, len(shown) + 1):
        if len(ids) <= room:
            break
        ids = render(shown[start:])
    return ids


def _judged_response(candidate: Candidate, answer: str, *, local: Sequence[str], settings: SynthesisSettings) -> Candidate:
    if settings.labelled:
        label = next((one for one in local if as_label(one) == as_label(answer)), None)
        return replace(candidate, response=answer if label is None else label, verdict="response" if label is None else "kept")
    if is_malformed(answer, min_words=MIN_RESPONSE_WORDS):
        return replace(candidate, response=answer, verdict="response")
    nearest = largest_rouge_l(answer, local)
    verdict = "copy" if nearest > settings.max_rouge_l else "kept"
    return replace(candidate, response=answer, verdict=verdict, max_rouge_l=max(nearest, candidate.max_rouge_l or 0.0))


def nearest_to_private(candidate: Candidate, examples: Sequence[Example], *, settings: SynthesisSettings) -> float | None:
    """The largest ROUGE-L of the candidate's response with one of the examples' (None without a response).

    Where responses are labels it is that of the instruction, without its opening: a label is in everybody's data.
    """
    if not candidate.response:
        return None
    if not settings.labelled:
        return largest_rouge_l(candidate.response, [answer for example in examples for answer in example.record.answers])
    local = _without_opening([example.record.instruction for example in examples], settings=settings)
    return largest_rouge_l(candidate.instruction.removeprefix(settings.opening), local)


def as_label(text: str) -> str:
    """A response as labels are compared: folded, and without full stops and exclamation marks of any script at its end."""
    return fold(one_line(text)).rstrip(FULL_STOPS)


def _without_opening(instructions: Sequence[str], *, settings: SynthesisSettings) -> list[str]:
    return [text.removeprefix(settings.opening) for text in instructions]


@lru_cache(maxsize=4)
def newline_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """All tokens whose text holds one of `LINE_BREAKS` (cached per tokenizer)."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if not {*LINE_BREAKS}.isdisjoint(text))


def one_line(text: str) -> str:
    """The text with every run of white space as one space, and none at its ends."""
    return re.sub(r"\s+", " ", text).strip()
