"""Differentially private self-generation: synthetic records of which no one private record can change much.

Tang et al. (2024), arXiv 2309.11765, algorithm 1 with Gaussian noise, for instruction-response pairs. A client's examples are
Poisson-sampled once for each synthetic record and dealt at random to M disjoint subsets, each the demonstrations of one
prompt. At every token the M next-token distributions are added up over the K tokens that are likeliest without any
demonstration, noise is added, and the largest sum names the token that all prompts go on with. A private record stands in one
prompt at most, and can only turn that prompt's distribution into another: the sum moves by at most sqrt(2).
Beside the published rule there is a gentler one (`shrunk`), which under heavy noise falls back on the public text.

The prompts are those of `synthesis`: a new instruction continues a numbered list, a response follows pairs shown as earlier
turns. No filter looks at a private record, and nothing is tried again, since every attempt would have to be paid for.
A prompt is read alone, and all continue in a cache whose width is public, so that the shapes of the arithmetic, and with
them the rounding of one row, do not depend on what another row shows.
Left out: the time that a call takes (longer demonstrations take longer to read), and tokens released without noise where the
prompts agree (the sparse vector technique).

Shapes: R synthetic records written together, S = M + 1 rows of each (the last shows no demonstration), B = R * S rows,
C columns of the cache, V vocabulary, K tokens among which one is chosen, H key-value heads, D head size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers.cache_utils import DynamicCache

from raysim.data.chat import ChatFormat
from raysim.data.tokens import Example, encode_text
from raysim.data.words import fold
from raysim.data.written import written_text
from raysim.lora.layout import Vector
from raysim.methods.synthesis.write import (
    MIN_RESPONSE_WORDS,
    Candidate,
    fitting,
    instruction_prompt,
    is_malformed,
    newline_token_ids,
    one_line,
    response_prompt,
)
from raysim.model.kv_cache import KeysValues, additive_mask, ending_together, has_plain_attention, read_alone
from raysim.model.language_model import LanguageModel
from raysim.privacy.noise import gaussian
from raysim.rng import numpy_rng, seed_for

PRIOR = 0.1
"""How far demonstrations move a token's probability p, as a share of p (1 - p): a guess that costs nothing, since no record enters it."""
SENSITIVITY = math.sqrt(2.0)
"""Largest distance between two probability vectors, and so between two sums of which one term differs."""

Prompt = list[int]
Choose = Callable[[torch.Tensor, int, int], int]
"""From the float32 logits SV of a record's rows, the record's place and the step, the token that all its rows are given."""


@dataclass(frozen=True)
class PrivateSynthesisSettings:
    """What private self-generation needs. Every field is public."""

    num_candidates: int
    """Synthetic records to write, however many examples there are."""
    num_subsets: int
    """M: disjoint sets of demonstrations."""
    max_demonstrations: int
    """Most demonstrations shown of a subset."""
    max_demonstration_tokens: int
    """Most tokens by which demonstrations lengthen a prompt; those that do not fit are left out."""
    sampling_prob: float
    """q: probability with which each example is drawn for a synthetic record."""
    top_k: int
    """K: a token is chosen among this many that are likeliest without demonstrations."""
    noise_multiplier: float
    """z: noise standard deviation on a token's sums, over their sensitivity sqrt(2)."""
    max_instruction_tokens: int
    """Longest instruction."""
    max_response_tokens: int
    """Longest response."""
    min_instruction_words: int
    """Shorter instructions are dropped."""
    opening: str
    """What all instructions begin with, by the form of the set; new ones are given it. Empty for most sets."""
    labelled: bool
    """Whether a response is a label, by the form of the set: then one word is enough."""
    decoding: str
    """How the noisy sums name a token: `argmax` (Tang et al.), or `shrunk` (drawn from what they say of the public distribution, see `shrunk`)."""
    secure_noise: bool
    """Whether noise comes from the operating system instead of the seed (the examples are drawn by the seed in any case)."""
    batch_size: int
    """Most rows in a forward pass; a synthetic record takes `num_subsets + 1`."""
    chat: ChatFormat
    """System prompt of responses."""

    @property
    def num_tokens(self) -> int:
        """Noisy tokens that one synthetic record is accounted for, whether or not it ends earlier."""
        return self.max_instruction_tokens + self.max_response_tokens


def synthesize_private(
    lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, settings: PrivateSynthesisSettings, seed: int
) -> list[Candidate]:
    """`num_candidates` pairs that the model with `adapter` writes, each with the filters' verdict (`format`, `diversity`, `response`).

    Guarantees: in adding or removing one example, all that is returned costs `num_candidates` Poisson-sampled Gaussian releases
    of probability `sampling_prob` and multiplier `noise_multiplier / sqrt(settings.num_tokens)`, as long as `seed` is secret and `adapter`
    was released before: all tokens of a record see one sample, and Gaussian privacy composes as 1 / z^2 adds up (Dong et al. 2019,
    arXiv 1905.02383, corollary 3.3). In float32 `batch_size` changes no token.

    Edge cases: without examples the pairs are public text, and there are as many.
    Errors: ValueError if record ids repeat (they name the draws, which must be independent), if a record's rows exceed
    `batch_size`, or if a prompt without demonstrations does not fit the context.
    """
    _check(examples, settings=settings)
    lm.set_adapter(adapter)
    lm.model.eval()
    subsets = [draw_subsets(examples, settings=settings, seed=seed, index=index) for index in range(settings.num_candidates)]
    candidates = _filtered(_write_instructions(lm, subsets, settings=settings, seed=seed), settings=settings)
    return _write_responses(lm, candidates, subsets, settings=settings, seed=seed)


def check_model(lm: LanguageModel, *, longest: int) -> None:
    """Refuses a model whose rows cannot be laid out in a cache of public width, for texts of up to `longest` tokens; so that a run does so before it starts.

    Errors: ValueError.
    """
    if not has_plain_attention(lm.model.get_base_model(), longest=longest):
        raise ValueError(
            f"model.name: private self-generation (method.name='fedpit' with privacy.unit='example') needs full attention over {longest} tokens, "
            f"which model_type={lm.model.config.model_type!r} does not have; take another model, or method.name='dplora'"
        )


def draw_subsets(examples: Sequence[Example], *, settings: PrivateSynthesisSettings, seed: int, index: int) -> list[list[Example]]:
    """The demonstrations of each subset for the synthetic record `index`: at most `max_demonstrations` of a Poisson sample.

    Guarantees: an example's draws are a function of `seed`, `index` and its own record id; one more example changes one
    subset at most. Which of a full subset are shown is drawn too, so that none is preferred by its place.
    """
    drawn: list[list[tuple[float, int, Example]]] = [[] for _ in range(settings.num_subsets)]
    for example in examples:
        rng = numpy_rng(seed, "dp-demonstration", index, example.record.record_id)
        rank, subset = float(rng.random()), int(rng.integers(settings.num_subsets))
        if rank < settings.sampling_prob:
            drawn[subset].append((rank, example.record.record_id, example))
    return [[example for _, _, example in sorted(part, key=lambda d: d[:2])[: settings.max_demonstrations]] for part in drawn]


def summed_distribution(logits_SV: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, float64 of shape (K,), of all rows' distributions but the last one's over the last one's K likeliest tokens, and those tokens.

    Guarantees: another row in place of any but the last moves the sum by at most `SENSITIVITY`, whatever it holds: each row is
    normalised over the K tokens, and one that is not finite there counts as a copy of the last.

    Errors: ValueError if the last row, which no private record has touched, is not finite.
    """
    public_V = logits_SV[-1]
    if not bool(public_V.isfinite().all()):
        raise ValueError("adapter: the model's next-token distribution is not finite even without demonstrations; training has diverged")
    tokens_K = public_V.topk(min(top_k, len(public_V))).indices
    probs_SK = logits_SV[:, tokens_K].double().softmax(-1)
    broken_S1 = ~probs_SK.isfinite().all(-1, keepdim=True)
    probs_SK = torch.where(broken_S1, probs_SK[-1], probs_SK)
    return probs_SK[:-1].sum(0), tokens_K


def choose_privately(logits_SV: torch.Tensor, *, index: int, step: int, settings: PrivateSynthesisSettings, seed: int) -> int:
    """The token that the noisy sums name; the noise is drawn for the synthetic record `index` and `step`."""
    sum_K, tokens_K = summed_distribution(logits_SV, top_k=settings.top_k)
    noise_K = gaussian(
        len(tokens_K),
        std=settings.noise_multiplier * SENSITIVITY,
        seed=seed_for(seed, "dp-token", index, step),
        secure=settings.secure_noise,
    )
    noisy_K = sum_K.cpu() + torch.from_numpy(noise_K).double()
    if settings.decoding == "argmax":
        return int(tokens_K[int(noisy_K.argmax())])
    public_K = logits_SV[-1, tokens_K].double().softmax(-1).cpu()
    num_subsets = len(logits_SV) - 1
    probs_K = shrunk(noisy_K / num_subsets, public_K, std=settings.noise_multiplier * SENSITIVITY / num_subsets)
    draw = numpy_rng(seed, "dp-draw", index, step).random()
    return int(tokens_K[min(int(torch.searchsorted(probs_K.cumsum(0), torch.tensor(draw, dtype=torch.float64))), len(tokens_K) - 1)])


def shrunk(noisy_K: torch.Tensor, public_K: torch.Tensor, *, std: float) -> torch.Tensor:
    """A distribution between the public one and the noisy mean of the private ones: the less the noise, the nearer to the latter.

    Each probability moves from its public value towards its noisy one by v / (v + std^2), where v = PRIOR p (1 - p) is how far
    demonstrations move a probability p on the average: the best linear guess. It looks at what was released and at what is public, so
    it costs nothing (post-processing). Without noise it is the mean itself, under heavy noise the model's own public text.
    """
    variance_K = PRIOR * public_K * (1 - public_K)
    share_K = (
        torch.where(variance_K > 0, variance_K / (variance_K + std**2), torch.zeros_like(variance_K)) if std else torch.ones_like(public_K)
    )
    guess_K = (public_K + share_K * (noisy_K - public_K)).clamp(min=0)
    return guess_K / guess_K.sum() if bool(guess_K.sum() > 0) else public_K


def write_in_step(
    lm: LanguageModel,
    prompts_RS: Sequence[Sequence[Prompt]],
    *,
    choose: Choose,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    room: int,
) -> list[list[int]]:
    """New tokens for each record, without the one that ended it: all its prompts, the last of them public, are given the same.

    A private prompt is at most `room` tokens longer than the longest public one.
    """
    if not prompts_RS:
        return []
    width = max(len(prompts[-1]) for prompts in prompts_RS) + room
    produced: list[list[int]] = [[] for _ in prompts_RS]
    live, num_rows = list(range(len(prompts_RS))), len(prompts_RS[0])
    with torch.inference_mode(), lm.autocast():
        rows = _Rows(lm, [prompt for prompts in prompts_RS for prompt in prompts], width=width)
        for step in range(max_new_tokens):
            logits_RSV = rows.logits_BV.view(len(live), num_rows, -1)
            chosen = [choose(logits_SV, record, step) for record, logits_SV in zip(live, logits_RSV, strict=True)]
            going = [place for place, token in enumerate(chosen) if token not in stop_token_ids]
            live = [live[place] for place in going]
            for record, place in zip(live, going, strict=True):
                produced[record].append(chosen[place])
            if not live or step == max_new_tokens - 1:
                break
            rows.keep([place * num_rows + row for place in going for row in range(num_rows)])
            rows.advance([produced[record][-1] for record in live for _ in range(num_rows)])
    return produced


class _Rows:
    """Rows of text with their cache: all end at the same column, row b begins at `starts_B[b]`, and `logits_BV` are its next token's."""

    def __init__(self, lm: LanguageModel, prompts_B: Sequence[Prompt], *, width: int) -> None:
        self.lm = lm
        self.starts_B = torch.tensor([width - len(prompt) for prompt in prompts_B], device=lm.device)
        self.end = width
        self.cache, self.logits_BV = _read_all(lm, prompts_B, width=width)

    def keep(self, rows: list[int]) -> None:
        """Takes all other rows out."""
        if len(rows) == len(self.starts_B):
            return
        index = torch.tensor(rows, device=self.lm.device)
        self.cache.batch_select_indices(index)
        self.starts_B = self.starts_B[index]

    def advance(self, tokens_B: list[int]) -> None:
        """Feeds every row its token."""
        starts_B1 = self.starts_B[:, None]
        self.end += 1
        mask_BC = additive_mask(torch.arange(self.end, device=self.lm.device) >= starts_B1, self.lm.compute_dtype)
        output = self.lm.model(
            input_ids=torch.tensor(tokens_B, device=self.lm.device)[:, None],
            attention_mask=mask_BC[:, None, None],
            position_ids=self.end - 1 - starts_B1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits_BV = output.logits[:, -1].float()


def _read_all(lm: LanguageModel, prompts_B: Sequence[Prompt], *, width: int) -> tuple[DynamicCache, torch.Tensor]:
    """A cache of `width` columns that the prompts end, and the float32 logits BV after them; equal prompts are read once."""
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts_B):
        rows_of.setdefault(tuple(prompt), []).append(row)
    logits: dict[int, torch.Tensor] = {}

    def read() -> Iterator[tuple[list[int], list[KeysValues]]]:
        for tokens, rows in rows_of.items():
            computed, logits_V = read_alone(lm.model, tokens)
            logits.update(dict.fromkeys(rows, logits_V.float()))
            yield rows, computed

    cache = ending_together(read(), num_rows=len(prompts_B), width=width)
    return cache, torch.stack([logits[row] for row in range(len(prompts_B))])


@dataclass(frozen=True)
class _Text:
    """A text to be written: the synthetic record it belongs to, and the prompts it continues."""

    index: int
    """Place of the synthetic record among all of them."""
    subsets: list[list[Example]]
    render: Callable[[Sequence[Example]], Prompt]
    """From demonstrations to the prompt that shows them."""


def _write_instructions(
    lm: LanguageModel, subsets: Sequence[list[list[Example]]], *, settings: PrivateSynthesisSettings, seed: int
) -> list[str]:
    def render(shown: Sequence[Example]) -> Prompt:
        text = instruction_prompt([one_line(example.record.instruction.removeprefix(settings.opening)) for example in shown])
        return encode_text(lm.tokenizer, text)

    texts = [_Text(index, parts, render) for index, parts in enumerate(subsets)]
    stop = (*lm.eos_token_ids, *newline_token_ids(lm.tokenizer))
    steps = range(settings.max_instruction_tokens)
    return [one_line(text) for text in _write(lm, texts, steps=steps, stop_token_ids=stop, settings=settings, seed=seed)]


def _filtered(instructions: Sequence[str], *, settings: PrivateSynthesisSettings) -> list[Candidate]:
    """The instructions, given their opening, as candidates: `format` drops refusals and fragments, `diversity` what repeats an earlier one."""
    candidates: list[Candidate] = []
    accepted: set[str] = set()
    for text in instructions:
        verdict = "kept"
        if is_malformed(text, min_words=settings.min_instruction_words):
            verdict = "format"
        elif fold(text) in accepted:
            verdict = "diversity"
        else:
            accepted.add(fold(text))
        candidates.append(Candidate(instruction=settings.opening + text, verdict=verdict))
    return candidates


def _write_responses(
    lm: LanguageModel,
    candidates: Sequence[Candidate],
    subsets: Sequence[list[list[Example]]],
    *,
    settings: PrivateSynthesisSettings,
    seed: int,
) -> list[Candidate]:
    """The candidates with responses, `response` where one is malformed; the same demonstrations as for the instruction are shown."""
    results = list(candidates)
    texts = []
    for index, candidate in enumerate(candidates):
        if candidate.verdict == "kept":
            render = partial(response_prompt, lm, instruction=candidate.instruction, chat=settings.chat)
            texts.append(_Text(index, subsets[index], render))
    steps = range(settings.max_instruction_tokens, settings.num_tokens)
    answers = _write(lm, texts, steps=steps, stop_token_ids=lm.eos_token_ids, settings=settings, seed=seed)
    for text, answer in zip(texts, answers, strict=True):
        malformed = is_malformed(answer, min_words=1 if settings.labelled else MIN_RESPONSE_WORDS)
        verdict = "response" if malformed else "kept"
        results[text.index] = replace(results[text.index], response=answer, verdict=verdict)
    return results


def _write(
    lm: LanguageModel,
    texts: Sequence[_Text],
    *,
    steps: range,
    stop_token_ids: Sequence[int],
    settings: PrivateSynthesisSettings,
    seed: int,
) -> list[str]:
    """The texts, chosen privately; `steps` count a synthetic record's noisy tokens, those of its instruction before its response's."""
    written = []
    num_texts = settings.batch_size // (settings.num_subsets + 1)
    for start in range(0, len(texts), num_texts):
        group = texts[start : start + num_texts]

        def choose(logits_SV: torch.Tensor, place: int, step: int, *, group: Sequence[_Text] = group) -> int:
            return choose_privately(logits_SV, index=group[place].index, step=steps[step], settings=settings, seed=seed)

        prompts = [_prompts(lm, text, max_new_tokens=len(steps), settings=settings) for text in group]
        room = settings.max_demonstration_tokens
        written += write_in_step(lm, prompts, choose=choose, max_new_tokens=len(steps), stop_token_ids=stop_token_ids, room=room)
    return [written_text(lm.tokenizer, tokens).strip() for tokens in written]


def _prompts(lm: LanguageModel, text: _Text, *, max_new_tokens: int, settings: PrivateSynthesisSettings) -> list[Prompt]:
    """The prompt of each subset, as many of its demonstrations shown as fit, and last the one that shows none."""
    public = text.render([])
    longest = lm.max_positions - max_new_tokens
    if len(public) > longest:
        raise ValueError(
            f"a prompt without demonstrations has {len(public)} tokens but at most {longest} fit: the context is "
            f"max_position_embeddings={lm.max_positions} and max_new_tokens={max_new_tokens}; shorten the system prompt or lower max_new_tokens"
        )
    room = min(longest, len(public) + settings.max_demonstration_tokens)
    return [*(fitting(part, text.render, room=room) for part in text.subsets), public]


def _check(examples: Sequence[Example], *, settings: PrivateSynthesisSettings) -> None:
    if len({example.record.record_id for example in examples}) < len(examples):
        raise ValueError("examples: two have the same record_id, which names their draws; give each record of a client its own")
    if settings.batch_size <= settings.num_subsets:
        raise ValueError(
            f"batch_size={settings.batch_size} must be at least num_subsets + 1 = {settings.num_subsets + 1}, the rows of one synthetic record"
        )
