"""Self-generation: prompts, filters, retries and scores, with real models that say what is known beforehand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.similarity import rouge_l
from raysim.lora.layout import Vector, initial_adapter
from raysim.methods.synthesis.write import (
    Candidate,
    SynthesisSettings,
    as_record,
    filter_instructions,
    instruction_following_scores,
    instruction_prompt,
    nearest_to_private,
    newline_token_ids,
    one_line,
    synthesize,
    write_instructions,
)
from raysim.model.language_model import LanguageModel
from tests.tiny_models import build, encode, sharp_base, spelling_base

SETTINGS = SynthesisSettings(
    num_candidates=3,
    num_demonstrations=2,
    num_response_demonstrations=2,
    max_rouge_l=0.7,
    temperature=0.0,
    repetition_penalty=1.1,
    max_instruction_tokens=40,
    max_response_tokens=40,
    min_instruction_words=3,
    num_retries=3,
    opening="",
    labelled=False,
    batch_size=4,
    chat=ChatFormat(),
)
# Characters follow one another but once, so words are parted by different white space.
INSTRUCTION = [*".Do", "ĉ", *"my", "ċ", *"left"[:2], "Ċ"]
ANSWER = ["<|assistant|>", *"Big", "č", *"cat", "Ġ", *"runs", "<|end|>"]
FRAGMENT = ["<|assistant|>", *"Hx", "<|end|>"]
LOCAL = [
    Record(record_id=0, instruction="Explain the use of aspirin", response="It thins the blood of adults"),
    Record(record_id=1, instruction="Name seven rivers in Europe", response="Rhine, Danube and five others"),
    Record(record_id=2, instruction="Where does this train stop?", response="Nowhere before the next city"),
]


@pytest.fixture(scope="module")
def speller() -> LanguageModel:
    return build(spelling_base(INSTRUCTION, ANSWER))


def start(lm: LanguageModel) -> Vector:
    return initial_adapter(lm.layout, seed=0)


def run(
    lm: LanguageModel, local: list[Record], *, adapter: Vector | None = None, known: tuple[str, ...] = (), seed: int = 0, **changes: Any
) -> list[Candidate]:
    adapter = start(lm) if adapter is None else adapter
    return synthesize(lm, adapter, encode(lm, local), settings=replace(SETTINGS, **changes), known=known, seed=seed)


# --- prompts ---


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), min_size=1, max_size=9))
def test_prompt_is_a_numbered_list_that_breaks_off_at_the_next_number(shown: list[str]) -> None:
    lines = instruction_prompt(shown).split("\n")
    assert lines[-1] == f"{len(shown) + 1}."
    assert lines[-1 - len(shown) : -1] == [f"{i + 1}. {text}" for i, text in enumerate(shown)]


def test_newline_tokens_are_all_tokens_with_a_line_break(speller: LanguageModel) -> None:
    assert [speller.tokenizer.decode([i]) for i in newline_token_ids(speller.tokenizer)] == ["\n"]


def test_a_token_with_any_kind_of_line_break_ends_an_instruction() -> None:
    texts = ["a", "b\n", "\u2028", "\u2029c", "\x85", "d e", "\u3000", "李"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({text: i for i, text in enumerate(texts)}, unk_token="a")))
    assert newline_token_ids(tokenizer) == (1, 2, 3, 4)
    assert one_line("a\u2028b\x85\u3000c ") == "a b c"


def test_an_instruction_ends_at_its_line(speller: LanguageModel) -> None:
    texts = write_instructions(speller, encode(speller, LOCAL), settings=SETTINGS, seed=0)
    assert texts == ["Do my le"] * 3


# --- filters ---


def test_filters_of_instructions_by_hand() -> None:
    texts = [
        "explain the use of ASPIRIN",
        "Sorry, I cannot write a task",
        "As an assistant I list tasks",
        "Too short",
        "",
        "Describe how bread is baked",
        "Describe how the bread is baked",
        "Compare two kinds of knots",
        "Sum all of these numbers",
    ]
    candidates = filter_instructions(texts, local=[LOCAL[0].instruction], known=["Compare two kinds of knots"], settings=SETTINGS)
    verdicts = ["diversity", "format", "format", "format", "format", "kept", "diversity", "diversity", "kept"]
    assert [candidate.verdict for candidate in candidates] == verdicts
    assert [candidate.instruction for candidate in candidates] == texts
    assert candidates[0].max_rouge_l == 1.0
    assert candidates[6].max_rouge_l == pytest.approx(2 * 5 / 11)


WORDS = st.lists(st.sampled_from(["red", "blue", "old", "new", "house", "tree", "sings", "falls"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=3), st.lists(WORDS, max_size=3), st.sampled_from([0.0, 0.4, 0.7, 1.0]))
def test_kept_instructions_are_diverse_and_no_other_is_dropped(texts: list[str], local: list[str], known: list[str], bound: float) -> None:
    candidates = filter_instructions(texts, local=local, known=known, settings=replace(SETTINGS, max_rouge_l=bound))
    accepted = [*local, *known]
    for candidate in candidates:
        nearest = max((rouge_l(candidate.instruction, other) for other in accepted), default=0.0)
        if len(candidate.instruction.split()) < 3:
            assert candidate.verdict == "format"
        else:
            assert candidate.verdict == ("diversity" if nearest > bound else "kept")
        if candidate.verdict == "kept":
            accepted.append(candidate.instruction)


def test_a_round_keeps_one_of_what_repeats_and_answers_it(speller: LanguageModel) -> None:
    first, second, third = run(speller, LOCAL)
    assert (first.verdict, first.instruction, first.response) == ("kept", "Do my le", "Big\rcat runs")
    assert {second.verdict, third.verdict} == {"diversity"}
    assert {second.response, third.response} == {""}
    assert first.as_dict() == {
        "instruction": "Do my le",
        "response": "Big\rcat runs",
        "verdict": "kept",
        "max_rouge_l": first.max_rouge_l,
        "score": None,
        "kept": True,
    }
    assert not second.as_dict()["kept"]


def test_instructions_of_earlier_rounds_and_local_ones_are_not_repeated(speller: LanguageModel) -> None:
    assert {candidate.verdict for candidate in run(speller, LOCAL, known=("Do my le",))} == {"diversity"}
    own = replace(LOCAL[0], instruction="do my LE!")
    assert {candidate.verdict for candidate in run(speller, [own, *LOCAL[1:]])} == {"diversity"}


@pytest.mark.parametrize("response", ["Big cat runs", "a big cat runs"])
def test_a_copy_of_a_local_response_is_rejected(speller: LanguageModel, response: str) -> None:
    copied = run(speller, [LOCAL[0], replace(LOCAL[1], response=response)])[0]
    assert copied.verdict == "copy"
    assert copied.max_rouge_l == pytest.approx(rouge_l("Big cat runs", response))
    assert run(speller, [LOCAL[0], replace(LOCAL[1], response="Big dogs run")])[0].verdict == "kept"


def forward_passes(lm: LanguageModel, local: list[Record], **changes: Any) -> tuple[int, list[Candidate]]:
    """How many prompts' beginnings were computed, and the candidates: only a prefill asks for more than one position."""
    count = 0

    def hook(_: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        nonlocal count
        count += 1

    handle = lm.model.get_base_model().get_decoder().register_forward_hook(hook, with_kwargs=True)
    try:
        candidates = run(lm, local, **changes)
    finally:
        handle.remove()
    return count, candidates


def test_a_response_that_fits_no_template_is_tried_again_and_then_dropped() -> None:
    """Each attempt costs the same passes; a good response ends the attempts after the first."""
    bad, good = build(spelling_base(INSTRUCTION, FRAGMENT)), build(spelling_base(INSTRUCTION, ANSWER))
    none, _ = forward_passes(bad, LOCAL, min_instruction_words=9)  # every instruction dropped: no response is asked for
    costs = [forward_passes(bad, LOCAL, num_retries=n)[0] - none for n in (1, 2, 5)]
    assert costs[0] > 0
    assert costs == [costs[0], 2 * costs[0], 5 * costs[0]]
    assert run(bad, LOCAL)[0].verdict == "response"
    assert forward_passes(good, LOCAL, num_retries=5)[0] == forward_passes(good, LOCAL, num_retries=1)[0]


def test_no_examples_or_no_candidates_give_nothing(speller: LanguageModel) -> None:
    assert run(speller, []) == []
    assert run(speller, LOCAL, num_candidates=0) == []


def test_fewer_examples_than_demonstrations_serve(speller: LanguageModel) -> None:
    assert run(speller, LOCAL[:1], num_demonstrations=8, num_response_demonstrations=4)[0].verdict == "kept"


def test_demonstrations_that_do_not_fit_the_context_are_left_out() -> None:
    """Long local records: as many are shown as leave room for what is to be written, down to none."""
    base = spelling_base(INSTRUCTION, ANSWER)
    lm = build(replace(base, config=base.config | {"max_position_embeddings": 330}))
    long = [replace(record, instruction=record.instruction + " please" * 20, response=record.response + " etc" * 30) for record in LOCAL]
    assert lm.max_positions == 330
    first = run(lm, long)[0]
    assert (first.verdict, first.instruction, first.response) == ("kept", "Do my le", "Big\rcat runs")


def test_the_seed_decides_what_is_written() -> None:
    """A random model, whose text depends on the demonstrations drawn."""
    lm = build(sharp_base())
    adapter = np.random.default_rng(0).standard_normal(lm.layout.num_parameters).astype(np.float32)
    options: dict[str, Any] = {"adapter": adapter, "min_instruction_words": 1, "max_rouge_l": 1.0, "num_candidates": 4}
    first = run(lm, LOCAL, seed=1, **options)
    run(lm, LOCAL, seed=3, **options)
    assert run(lm, LOCAL, seed=1, **options) == first
    assert len({candidate.instruction for candidate in first}) > 1
    assert [c.instruction for c in run(lm, LOCAL, seed=2, **options)] != [c.instruction for c in first]
    assert run(lm, LOCAL, seed=1, **options | {"num_candidates": 2}) == first[:2], "a candidate depends on how many are asked for"


def test_what_is_written_depends_on_the_adapter() -> None:
    lm = build(sharp_base())
    other = (0.3 * np.random.default_rng(0).standard_normal(lm.layout.num_parameters)).astype(np.float32)
    examples = encode(lm, LOCAL)
    texts = []
    for adapter in (start(lm), other):
        candidates = synthesize(lm, adapter, examples, settings=replace(SETTINGS, min_instruction_words=1), known=(), seed=0)
        texts.append([candidate.instruction for candidate in candidates])
    assert texts[0] != texts[1]


# --- sets whose responses are labels ---

QUESTION = "Is this good news?\n\n"
LABELLED = [
    Record(record_id=0, instruction=QUESTION + "Sales of aspirin rose", response="big cat runs", label="big cat runs"),
    Record(record_id=1, instruction=QUESTION + "Seven rivers ran dry", response="dog", label="dog"),
]


def test_a_label_is_an_answer_and_no_copy_however_it_is_spelled() -> None:
    for spelled, answer in (("Bigcat", "bigcat"), ("Bigcat!", "bigcat"), ("Bigcat", "BIGCAT")):
        lm = build(spelling_base(INSTRUCTION, ["<|assistant|>", *spelled, "<|end|>"]))
        local = [replace(LABELLED[0], response=answer, label=answer), LABELLED[1]]
        first = run(lm, local, labelled=True, opening=QUESTION)[0]
        assert (first.verdict, first.response) == ("kept", answer)
        assert run(lm, local, opening=QUESTION)[0].verdict == "response", "one word fits no template where responses are texts"
        other = run(lm, [replace(r, response="dog", label="dog") for r in local], labelled=True, opening=QUESTION)[0]
        assert (other.verdict, other.response) == ("response", spelled), "what is no label of the client's is tried again and dropped"


def test_what_all_instructions_open_with_is_shown_and_compared_nowhere_and_given_to_new_ones(speller: LanguageModel) -> None:
    first, second, _ = run(speller, LABELLED, labelled=True, opening=QUESTION)
    assert (first.instruction, second.instruction) == (QUESTION + "Do my le",) * 2
    assert (first.verdict, second.verdict) == ("kept", "diversity")
    assert first.max_rouge_l == 0.0, "without the question it has no word in common with a local one"
    assert run(speller, LABELLED, labelled=True, opening=QUESTION, known=(QUESTION + "Do my le",))[0].verdict == "diversity"
    plain = run(speller, [replace(r, instruction=r.instruction.removeprefix(QUESTION)) for r in LABELLED], labelled=True)
    assert [c.max_rouge_l for c in plain] == [c.max_rouge_l for c in run(speller, LABELLED, labelled=True, opening=QUESTION)]
    texts = write_instructions(build(sharp_base()), encode(speller, LABELLED), settings=replace(SETTINGS, opening=QUESTION), seed=0)
    bare = [replace(r, instruction=r.instruction.removeprefix(QUESTION)) for r in LABELLED]
    assert texts == write_instructions(build(sharp_base()), encode(speller, bare), settings=SETTINGS, seed=0), "the list shows the question"


def test_how_near_a_record_is_goes_by_its_response_and_by_its_instruction_where_that_is_a_label(speller: LanguageModel) -> None:
    examples = encode(speller, LABELLED)
    near = Candidate(instruction=QUESTION + "Seven rivers ran over", response="dog")
    assert nearest_to_private(near, examples, settings=SETTINGS) == 1.0
    labelled = replace(SETTINGS, labelled=True, opening=QUESTION)
    assert nearest_to_private(near, examples, settings=labelled) == pytest.approx(0.75)
    assert nearest_to_private(Candidate(instruction="Why?"), examples, settings=labelled) is None


# --- score ---


def masked_mean(lm: LanguageModel, prefix: list[int], response: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prefix, *response]])
    labels = ids.clone()
    labels[0, : len(prefix)] = -100
    with torch.no_grad():
        return float(lm.model(input_ids=ids, labels=labels).loss)


def test_score_is_the_ratio_of_the_losses_with_and_without_the_instruction() -> None:
    lm = build(sharp_base())
    adapter = (0.2 * np.random.default_rng(1).standard_normal(lm.layout.num_parameters)).astype(np.float32)
    pairs = encode(lm, LOCAL)
    scores = instruction_following_scores(lm, adapter, pairs, batch_size=2)
    lm.set_adapter(adapter)
    opening = [lm.tokenizer.convert_tokens_to_ids("<|assistant|>")]
    expected = [masked_mean(lm, list(pair.prompt_ids), pair.response_ids) / masked_mean(lm, opening, pair.response_ids) for pair in pairs]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert len({round(score, 6) for score in scores}) == 3
    moved = instruction_following_scores(lm, start(lm), pairs, batch_size=2)
    assert moved != scores, "the score does not depend on the adapter"


def test_a_kept_candidate_becomes_a_record_without_details() -> None:
    record = as_record(Candidate(instruction="a b c", response="d e f"), record_id=4)
    assert record == Record(record_id=4, instruction="a b c", response="d e f", label="synthetic")
    assert record.details == ()
