"""Private self-generation: what one record can change, the noise that hides it, and the plain computation it must equal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from raysim.config import load
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.data.written import written_text
from raysim.lora.layout import initial_adapter
from raysim.methods.synthesis.private import (
    SENSITIVITY,
    PrivateSynthesisSettings,
    choose_privately,
    draw_subsets,
    shrunk,
    summed_distribution,
    synthesize_private,
)
from raysim.methods.synthesis.write import Candidate, instruction_prompt, newline_token_ids, one_line, response_prompt
from raysim.model.generate import Sampling, generate
from raysim.model.language_model import LanguageModel
from raysim.privacy.accounting import epsilon_pld
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.noise import gaussian
from raysim.rng import seed_for
from tests.tiny_models import build, encode, sharp_base, spelling_base

SETTINGS = PrivateSynthesisSettings(
    num_candidates=3,
    num_subsets=3,
    max_demonstrations=2,
    max_demonstration_tokens=400,
    sampling_prob=0.7,
    top_k=12,
    noise_multiplier=0.0,
    max_instruction_tokens=10,
    max_response_tokens=12,
    min_instruction_words=0,
    opening="",
    labelled=False,
    secure_noise=False,
    batch_size=8,
    chat=ChatFormat(),
    decoding="argmax",
)
INSTRUCTION = [*".Do", "ĉ", *"my", "ċ", *"left"[:2], "Ċ"]
ANSWER = ["<|assistant|>", *"Big", "č", *"cat", "Ġ", *"runs", "<|end|>"]
WORDS = [
    "aspirin",
    "rhine",
    "danube",
    "train",
    "blood",
    "adults",
    "bread",
    "knots",
    "oven",
    "letter",
    "report",
    "scan",
    "fever",
    "number",
    "street",
    "birth",
]


def shard(num_records: int, *, seed: int = 0) -> list[Record]:
    """Records of random words, of different lengths."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(2, most)))

    return [Record(record_id=10 * i, instruction=words(6), response=words(12)) for i in range(num_records)]


@pytest.fixture(scope="module")
def sharp() -> LanguageModel:
    return build(sharp_base())


@pytest.fixture(scope="module")
def speller() -> LanguageModel:
    return build(spelling_base(INSTRUCTION, ANSWER))


def run(lm: LanguageModel, records: Sequence[Record], *, seed: int = 0, **changes: Any) -> list[Candidate]:
    adapter = initial_adapter(lm.layout, seed=0)
    return synthesize_private(lm, adapter, encode(lm, records), settings=replace(SETTINGS, **changes), seed=seed)


# --- what is accounted for ---


def test_a_synthetic_record_costs_as_many_gaussian_releases_as_it_may_have_tokens() -> None:
    keys = ["method.name=fedpit", "privacy.unit=example", "fedpit.scorer=none", "privacy.noise_multiplier=5", "server.num_rounds=3"]
    lengths = ["fedpit.num_candidates=2", "fedpit.num_kept=2", "fedpit.max_instruction_tokens=20", "fedpit.max_response_tokens=28"]
    mechanism = Mechanism.from_config(load("", [*keys, *lengths, "privacy.delta=1e-5"]), shard_sizes=(1, 1, 1))
    (release,) = mechanism.releases(3)
    as_one = epsilon_pld(release.noise_multiplier, sampling_prob=1.0, num_releases=release.count, delta=1e-5)
    token_by_token = epsilon_pld(5.0, sampling_prob=1.0, num_releases=48 * 2 * 3, delta=1e-5)
    assert as_one == pytest.approx(token_by_token, rel=0.01)
    assert release.count == 6
    assert SETTINGS.num_tokens == 22


# --- sets whose responses are labels ---


def test_a_word_answers_where_responses_are_labels_and_the_opening_is_not_written_anew() -> None:
    opening = "Is this good news?\n\n"
    lm = build(spelling_base(INSTRUCTION, ["<|assistant|>", *"Bigcat", "<|end|>"]))
    records = [replace(record, instruction=opening + record.instruction) for record in shard(4)]
    first = run(lm, records, labelled=True, opening=opening)[0]
    assert (first.verdict, first.instruction, first.response) == ("kept", opening + "Do my le", "Bigcat")
    assert run(lm, records, opening=opening)[0].verdict == "response"
    sharp = build(sharp_base())
    bare = [replace(record, instruction=record.instruction.removeprefix(opening)) for record in records]
    texts = [[one.instruction.removeprefix(opening) for one in run(sharp, some, opening=o)] for some, o in ((records, opening), (bare, ""))]
    assert texts[0] == texts[1], "the list shows the opening"


# --- demonstrations ---


@given(st.integers(0, 12), st.integers(0, 11), st.sampled_from([0.2, 0.7, 1.0]), st.integers(1, 4), st.integers(0, 3), st.integers(0, 50))
def test_one_record_more_changes_one_subset_at_most(
    num_records: int, place: int, prob: float, num_subsets: int, shown: int, seed: int
) -> None:
    examples = [Example(record=record, prompt_ids=(), response_ids=()) for record in shard(num_records + 1)]
    place = min(place, num_records)
    settings = replace(SETTINGS, sampling_prob=prob, num_subsets=num_subsets, max_demonstrations=shown)
    before = draw_subsets(examples[:place] + examples[place + 1 :], settings=settings, seed=seed, index=2)
    after = draw_subsets(examples, settings=settings, seed=seed, index=2)
    assert len(before) == len(after) == num_subsets
    assert sum(old != new for old, new in zip(before, after, strict=True)) <= 1
    assert all(len(part) <= shown for part in after)
    drawn = [example.record.record_id for part in after for example in part]
    assert len(set(drawn)) == len(drawn)


def test_examples_are_poisson_sampled_and_dealt_evenly() -> None:
    """Numbers drawn are binomial, with the stated probability and no other near it; subsets are equally likely."""
    examples = [Example(record=record, prompt_ids=(), response_ids=()) for record in shard(40)]
    settings = replace(SETTINGS, sampling_prob=0.3, num_subsets=5, max_demonstrations=40)
    draws = [draw_subsets(examples, settings=settings, seed=1, index=index) for index in range(100)]
    total = sum(len(part) for parts in draws for part in parts)
    assert stats.binomtest(total, 40 * 100, 0.3).pvalue > 0.01
    assert stats.binomtest(total, 40 * 100, 0.35).pvalue < 1e-6
    assert stats.binomtest(total, 40 * 100, 0.25).pvalue < 1e-6
    sizes = [sum(len(part) for part in parts) for parts in draws]
    assert np.var(sizes) == pytest.approx(40 * 0.3 * 0.7, rel=0.5), "fixed-size samples would not vary"
    by_subset = [sum(len(parts[subset]) for parts in draws) for subset in range(5)]
    assert stats.chisquare(by_subset).pvalue > 0.01


def test_no_record_is_preferred_in_a_full_subset_by_its_place() -> None:
    examples = [Example(record=record, prompt_ids=(), response_ids=()) for record in shard(6)]
    settings = replace(SETTINGS, sampling_prob=1.0, num_subsets=1, max_demonstrations=2)
    shown = [
        example.record.record_id for index in range(300) for example in draw_subsets(examples, settings=settings, seed=0, index=index)[0]
    ]
    assert stats.chisquare([shown.count(example.record.record_id) for example in examples]).pvalue > 0.01


# --- sensitivity ---

LOGITS = hnp.arrays(np.float32, (5, 9), elements=st.floats(-100, 100, width=32))
ANY_ROW = hnp.arrays(np.float32, 9, elements=st.floats(width=32))


@given(LOGITS, ANY_ROW, st.integers(0, 3), st.integers(1, 9))
def test_any_other_row_moves_the_sum_by_at_most_the_sensitivity(logits: Any, row: Any, place: int, top_k: int) -> None:
    """Not only other logits: infinite ones, and ones that are no numbers, as a diverged adapter gives for some prompts."""
    other = logits.copy()
    other[place] = row
    before, tokens = summed_distribution(torch.from_numpy(logits), top_k=top_k)
    after, other_tokens = summed_distribution(torch.from_numpy(other), top_k=top_k)
    assert tokens.tolist() == other_tokens.tolist()
    assert float((before - after).norm()) <= SENSITIVITY * (1 + 1e-12)
    assert float(after.sum()) == pytest.approx(4.0)


def test_the_sensitivity_is_attained() -> None:
    one, other = torch.zeros(2, 4), torch.zeros(2, 4)
    one[0, 0], other[0, 1] = 100.0, 100.0
    moved = summed_distribution(one, top_k=4)[0] - summed_distribution(other, top_k=4)[0]
    assert float(moved.norm()) == pytest.approx(SENSITIVITY) == pytest.approx(math.sqrt(2))


def test_the_sum_by_hand() -> None:
    """Probabilities over the two tokens that are likeliest in the last row, one row of no numbers counting as the last."""
    rows = torch.tensor([[0.5, 0.2, 0.3], [0.2, 0.2, 0.6], [0.1, 0.2, 0.7]]).log()
    sums, tokens = summed_distribution(torch.stack([rows[0], rows[1], torch.full((3,), torch.nan), rows[2]]), top_k=2)
    assert tokens.tolist() == [2, 1]
    assert sums.tolist() == pytest.approx([0.3 / 0.5 + 0.6 / 0.8 + 0.7 / 0.9, 0.2 / 0.5 + 0.2 / 0.8 + 0.2 / 0.9])
    assert sums.dtype == torch.float64


def step_logits(lm: LanguageModel, records: Sequence[Record], **changes: Any) -> list[torch.Tensor]:
    """The logits BV of all rows at every step of every group of records, but those of the prompts, which are read one by one."""
    settings = replace(SETTINGS, **changes)
    seen = []

    def hook(_: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if options["input_ids"].shape[0] > 1:
            seen.append(output.logits[:, -1].float().clone())

    handle = lm.model.register_forward_hook(hook, with_kwargs=True)
    try:
        run(lm, records, **changes)
    finally:
        handle.remove()
    assert len(seen) > 0
    assert all(len(logits_BV) % (settings.num_subsets + 1) == 0 for logits_BV in seen)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_records", [0, 5])
@pytest.mark.parametrize("words", [3, 20], ids=["short", "longest"])
def test_neighbouring_shards_differ_in_one_row_and_by_the_sensitivity(
    sharp: LanguageModel, dtype: torch.dtype, num_records: int, words: int
) -> None:
    """One token among one leaves the texts alone, so that the rows of two shards can be compared: bit by bit, all but one."""
    lm = replace(sharp, compute_dtype=dtype)
    changes: dict[str, Any] = {"top_k": 1, "sampling_prob": 1.0, "num_subsets": 4, "max_demonstrations": 3, "batch_size": 10}
    records = shard(num_records)
    extra = Record(record_id=7, instruction="scan " * words, response="fever " * words)
    before, after = step_logits(lm, records, **changes), step_logits(lm, [*records[:2], extra, *records[2:]], **changes)
    assert len(before) == len(after)
    largest = 0.0
    for one_BV, other_BV in zip(before, after, strict=True):
        for one_SV, other_SV in zip(one_BV.split(5), other_BV.split(5), strict=True):
            moved = (one_SV != other_SV).any(1)
            assert int(moved.sum()) <= 1
            assert not moved[-1]
            sums, others = summed_distribution(one_SV, top_k=30)[0], summed_distribution(other_SV, top_k=30)[0]
            largest = max(largest, float((sums - others).norm()))
    assert 0.1 < largest <= SENSITIVITY


# --- noise ---


def choices(logits_SV: torch.Tensor, num_draws: int, **changes: Any) -> list[int]:
    settings = replace(SETTINGS, **changes)
    return [choose_privately(logits_SV, index=i // 50, step=i % 50, settings=settings, seed=0) for i in range(num_draws)]


def test_the_noise_has_the_stated_scale_and_no_other() -> None:
    """Of two tokens the one with the larger sum wins with probability Phi(difference / (std sqrt(2)))."""
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    difference = sum(math.tanh(x / 2) for x in (2.0, 1.0))
    wins = choices(logits, 4000, noise_multiplier=1.5).count(0)

    def pvalue(scale: float) -> float:
        std = scale * 1.5 * math.sqrt(2)
        return float(stats.binomtest(wins, 4000, stats.norm.cdf(difference / (std * math.sqrt(2)))).pvalue)

    assert pvalue(1.0) > 0.01
    assert pvalue(2 / 3) < 1e-4
    assert pvalue(3 / 2) < 1e-4


def test_under_huge_noise_choices_are_uniform_over_the_likeliest_tokens() -> None:
    """Whatever the private rows say: they agree on one token here, which moderate noise lets win nearly always."""
    logits = torch.zeros(4, 20)
    logits[:3, 3] = 50.0
    logits[3] = torch.arange(20.0).flip(0)
    counts = np.bincount(choices(logits, 2000, noise_multiplier=1e6, top_k=8), minlength=20)
    assert counts[8:].sum() == 0
    assert stats.chisquare(counts[:8]).pvalue > 0.01
    assert choices(logits, 200, noise_multiplier=0.3, top_k=8).count(3) > 190


def test_shrinking_keeps_the_mean_without_noise_and_the_public_distribution_under_noise() -> None:
    public = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    noisy = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    torch.testing.assert_close(shrunk(noisy, public, std=0.0), noisy)
    torch.testing.assert_close(shrunk(noisy, public, std=1e6), public)
    between = shrunk(noisy, public, std=0.1)
    assert float(between.sum()) == pytest.approx(1.0)
    assert 0.2 < float(between[0]) < 0.6
    assert torch.equal(shrunk(torch.tensor([-1e9, -1e9, -1e9], dtype=torch.float64), public, std=0.5), public)


def test_shrunk_choices_follow_the_public_distribution_under_huge_noise() -> None:
    """And the private one without noise: chi-square against each."""
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]])
    for noise_multiplier, row in ((1e4, 1), (0.0, 0)):
        counts = np.bincount(choices(logits, 3000, noise_multiplier=noise_multiplier, decoding="shrunk"), minlength=4)
        expected = logits[row].double().softmax(-1).numpy() * 3000
        assert stats.chisquare(counts, expected).pvalue > 0.01
        assert stats.chisquare(counts, logits[1 - row].double().softmax(-1).numpy() * 3000).pvalue < 1e-6


def test_secure_noise_cannot_be_repeated_and_seeded_noise_can() -> None:
    logits = torch.zeros(4, 20)
    drawn = [choices(logits, 30, noise_multiplier=1.0, secure_noise=secure) for secure in (False, False, True, True)]
    assert drawn[0] == drawn[1]
    assert drawn[2] != drawn[3]


# --- the whole, against plain computations ---


def by_forward_passes(
    lm: LanguageModel, prompts: Sequence[list[int]], *, steps: range, stop: Sequence[int], noise: Callable[[int], Any]
) -> list[int]:
    """One text in the plainest form: every prompt's whole text through the model for each token, no cache and no padding."""
    text: list[int] = []
    for step in steps:
        with torch.no_grad():
            logits = [lm.model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0, -1].double() for prompt in prompts]
        likeliest = logits[-1].argsort(descending=True)[: SETTINGS.top_k]
        sums = sum(torch.exp(row[likeliest]) / torch.exp(row[likeliest]).sum() for row in logits[:-1])
        token = int(likeliest[int((sums + noise(step)).argmax())])
        if token in stop:
            break
        text.append(token)
    return text


def plain_synthesis(lm: LanguageModel, records: Sequence[Record], *, index: int, seed: int, settings: Any) -> tuple[str, str]:
    """The instruction and response of one synthetic record, from what the module's description says, without any filter."""

    def noise(step: int) -> Any:
        std = settings.noise_multiplier * math.sqrt(2)
        return torch.from_numpy(gaussian(settings.top_k, std=std, seed=seed_for(seed, "dp-token", index, step), secure=False))

    def tokens(shown: Sequence[Example]) -> list[int]:
        return list(lm.tokenizer(instruction_prompt([one_line(example.record.instruction) for example in shown]))["input_ids"])

    subsets = [*draw_subsets(encode(lm, records), settings=settings, seed=seed, index=index), []]
    eos = lm.eos_token_ids
    steps = range(settings.max_instruction_tokens)
    prompts = [tokens(part) for part in subsets]
    written = by_forward_passes(lm, prompts, steps=steps, stop=[*eos, *newline_token_ids(lm.tokenizer)], noise=noise)
    instruction = one_line(written_text(lm.tokenizer, written))
    prompts = [response_prompt(lm, part, instruction=instruction, chat=ChatFormat()) for part in subsets]
    steps = range(settings.max_instruction_tokens, settings.max_instruction_tokens + settings.max_response_tokens)
    written = by_forward_passes(lm, prompts, steps=steps, stop=eos, noise=noise)
    return instruction, written_text(lm.tokenizer, written).strip()


@pytest.mark.parametrize(("num_subsets", "prob", "noise_multiplier"), [(1, 1.0, 0.0), (2, 0.5, 0.0), (3, 0.6, 0.2)])
def test_it_equals_the_plain_computation(sharp: LanguageModel, num_subsets: int, prob: float, noise_multiplier: float) -> None:
    """With one subset and no noise that is greedy decoding among the public prompt's likeliest tokens."""
    records = shard(7, seed=3)
    settings = replace(
        SETTINGS, num_subsets=num_subsets, sampling_prob=prob, noise_multiplier=noise_multiplier, max_demonstration_tokens=2000
    )
    expected = [plain_synthesis(sharp, records, index=index, seed=5, settings=settings) for index in range(3)]
    written = [text for text, _ in expected]
    expected = [
        (text, answer if written.index(text) == index else "") for index, (text, answer) in enumerate(expected)
    ]  # repeats are dropped
    for batch_size in (num_subsets + 1, 2 * num_subsets + 3, 64):
        got = synthesize_private(
            sharp, initial_adapter(sharp.layout, seed=0), encode(sharp, records), settings=replace(settings, batch_size=batch_size), seed=5
        )
        assert [(candidate.instruction, candidate.response) for candidate in got] == expected
    assert sum(answer != "" for _, answer in expected) >= 2


def test_a_client_without_records_writes_what_the_model_says_unprompted(sharp: LanguageModel) -> None:
    def greedy(prompt: list[int], max_new_tokens: int, stop: tuple[int, ...] = ()) -> str:
        sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop)
        output = generate(sharp.model, [prompt], sampling=sampling, eos_token_ids=sharp.eos_token_ids, pad_token_id=0)[0]
        return one_line(written_text(sharp.tokenizer, output))

    candidate = run(sharp, [], num_candidates=1)[0]
    opening = sharp.tokenizer(instruction_prompt([]))["input_ids"]
    assert candidate.instruction == greedy(opening, 10, newline_token_ids(sharp.tokenizer))
    prompt = response_prompt(sharp, [], instruction=candidate.instruction, chat=ChatFormat())
    assert one_line(candidate.response) == greedy(prompt, 12)
    assert len(run(sharp, [], num_candidates=5)) == len(run(sharp, shard(4), num_candidates=5)) == 5


def test_what_is_written_follows_the_demonstrations_if_they_fit(sharp: LanguageModel) -> None:
    public = run(sharp, [], num_candidates=1)
    assert run(sharp, shard(6), num_candidates=1, sampling_prob=1.0) != public
    assert run(sharp, shard(6), num_candidates=1, sampling_prob=1.0, max_demonstration_tokens=0) == public
    assert run(sharp, shard(6), num_candidates=1, sampling_prob=1.0, max_demonstrations=0) == public


def test_equal_calls_give_equal_texts_and_other_seeds_others(sharp: LanguageModel) -> None:
    first, again, other = (run(sharp, shard(5), seed=seed, noise_multiplier=0.5) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({candidate.instruction for candidate in first}) == 3, "synthetic records have noise of their own"


# --- filters ---


def test_verdicts_depend_on_synthetic_text_alone(speller: LanguageModel) -> None:
    """A record that says just what is written is no reason to drop it: the drop would tell of the record."""
    own = Record(record_id=3, instruction="Do my le", response="Big cat runs")
    changes = {"max_instruction_tokens": 40, "max_response_tokens": 40, "min_instruction_words": 3}
    with_it, without = run(speller, [own, *shard(3)], **changes), run(speller, shard(3), **changes)
    assert with_it == without
    assert (with_it[0].instruction, with_it[0].response, with_it[0].verdict) == ("Do my le", "Big\rcat runs", "kept")
    assert [candidate.verdict for candidate in with_it] == ["kept", "diversity", "diversity"]
    assert all(candidate.max_rouge_l is None and candidate.score is None for candidate in with_it)


def test_fragments_are_dropped(speller: LanguageModel) -> None:
    longer = run(speller, shard(2), max_instruction_tokens=40, max_response_tokens=40, min_instruction_words=4)
    assert [(candidate.verdict, candidate.response) for candidate in longer] == [("format", "")] * 3
    cut = run(speller, shard(2), max_instruction_tokens=40, max_response_tokens=4, min_instruction_words=3)
    assert cut[0].verdict == "response"
    assert cut[0].response == "Big"


# --- refusals ---


def test_what_would_break_the_guarantee_is_refused(sharp: LanguageModel) -> None:
    with pytest.raises(ValueError, match="same record_id"):
        run(sharp, [*shard(2), shard(1)[0]])
    with pytest.raises(ValueError, match=r"batch_size=3 must be at least num_subsets \+ 1 = 4"):
        run(sharp, shard(2), batch_size=3)
    with pytest.raises(ValueError, match="noise std"):
        run(sharp, shard(2), noise_multiplier=-1.0)
    with pytest.raises(ValueError, match="not finite even without demonstrations"):
        summed_distribution(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), top_k=2)


def test_a_prompt_that_does_not_fit_the_context_is_refused_and_demonstrations_give_way() -> None:
    base = sharp_base()
    opening = len(build(base).tokenizer(instruction_prompt([]))["input_ids"])
    lm = build(replace(base, config=base.config | {"max_position_embeddings": opening + 40}))
    texts = run(lm, shard(9), sampling_prob=1.0, num_candidates=1)
    assert len(texts) == 1
    assert texts != run(lm, [], num_candidates=1), "no demonstration fitted"
    with pytest.raises(ValueError, match=f"max_position_embeddings={opening + 40} and max_new_tokens=41"):
        run(lm, shard(2), max_instruction_tokens=41)
