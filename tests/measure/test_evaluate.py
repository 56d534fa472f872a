"""Utility and leakage: the figures of a model that knows its records by heart, and the same figures however the work is cut."""

import json
import math
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raysim.attacks.details import detail_bits, detail_queries, detail_spans, pool_of
from raysim.attacks.membership import token_nlls
from raysim.attacks.memory import SamplingAttack
from raysim.data.chat import DEFAULT_CHAT, ChatFormat
from raysim.data.choices import ChoiceQuestion, labelled_questions
from raysim.data.records import Record
from raysim.data.similarity import rouge_l
from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.measure.evaluate import DetailPlan, MemoryPlan, Plan, base_likelihoods, mean_of, measure, plan, record_rows, run_job
from raysim.measure.options import accuracy, choice_figures, choose, macro_f1, option_nlls
from raysim.model.language_model import LanguageModel
from raysim.privacy.audit_bounds import clopper_pearson
from raysim.results.contents import Answer, Attack
from raysim.results.folders import typed
from tests.tiny_models import build, encode, learn_by_heart, sharp_base

TRAIN = [
    Record(record_id=0, instruction="q one", response="Anna has 12 mg", details=("Anna", "12 mg")),
    Record(record_id=1, instruction="two?", response="Jon, on 5 May", details=("Jon", "5 May")),
    Record(record_id=2, instruction="and 3", response="no one at all", details=()),
]
HELDOUT = [
    Record(record_id=3, instruction="what of 4", response="Eva gets 99 ml", details=("Eva", "99 ml")),
    Record(record_id=4, instruction="fifth", response="Max came by car", details=("Max",)),
]
Known = tuple[LanguageModel, Vector, list[Example], list[Example]]


@pytest.fixture(scope="module")
def known() -> Known:
    """A model and an adapter that knows the training records by heart, and the records."""
    lm = build(sharp_base(), rank=8)
    train, heldout = encode(lm, TRAIN), encode(lm, HELDOUT)
    return lm, learn_by_heart(lm, train), train, heldout


def make_plan(train: list[Example], heldout: list[Example], **changes: Any) -> Plan:
    options: dict[str, Any] = {
        "heldout": heldout,
        "answered": heldout[:2],
        "attacked": train,
        "prefix_tokens": 0,
        "max_new_tokens": 24,
        "batch_size": 8,
        "with_eval": True,
        "with_attack": True,
    }
    return plan(**options | changes)


def figures(known: Known, **changes: Any) -> tuple[Any, Any]:
    lm, adapter, train, heldout = known
    work = make_plan(train, heldout, **changes)
    return measure(work, [run_job(lm, adapter, job) for job in work.jobs], tokenizer=lm.tokenizer)


def test_who_learnt_by_heart_gives_everything_away_and_the_control_stays_apart(known: Known) -> None:
    utility, attack = figures(known)
    assert (attack["train_rouge_l"], attack["train_exact_match"], attack["train_details_rate"]) == (1.0, 1.0, 1.0)
    assert (attack["heldout_exact_match"], attack["heldout_details_rate"]) == (0.0, 0.0)
    assert attack["heldout_rouge_l"] == utility["heldout_rouge_l"] < 0.5
    assert attack["num_examples"] == 3
    assert utility["heldout_perplexity"] == pytest.approx(math.exp(utility["heldout_nll"]))
    low, high = utility["heldout_nll_interval"]
    assert low < utility["heldout_nll"] < high
    json.dumps([utility, attack], allow_nan=False)


def rows_of(known: Known, **changes: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    lm, adapter, train, heldout = known
    work = make_plan(train, heldout, **changes)
    results = [run_job(lm, adapter, job) for job in work.jobs]
    return *measure(work, results, tokenizer=lm.tokenizer), record_rows(work, results, tokenizer=lm.tokenizer)


@pytest.mark.parametrize("prefix", [0, 3])
def test_the_rows_are_what_the_figures_are_means_of(known: Known, prefix: int) -> None:
    utility, attack, rows = rows_of(known, prefix_tokens=prefix, batch_size=2, answered=known[3][:1])
    sides = {side: [row for row in rows if row["side"] == side] for side in ("heldout", "train", "control")}
    assert [len(sides[side]) for side in sides] == [2, 3, 1 if prefix else 0]
    assert {row["record_id"] for row in sides["heldout"]} == {3, 4}
    assert utility["heldout_nll"] == pytest.approx(
        sum(row["nll"] for row in sides["heldout"]) / sum(row["num_tokens"] for row in sides["heldout"])
    )
    [answered] = [row for row in sides["heldout"] if "answer" in row]
    assert utility["heldout_rouge_l"] == answered["rouge_l"] == rouge_l(answered["answer"], answered["reference"])
    assert (answered["instruction"], answered["reference"]) == (HELDOUT[0].instruction, HELDOUT[0].response)
    assert attack["train_rouge_l"] == pytest.approx(np.mean([row["rouge_l"] for row in sides["train"]]))
    assert attack["heldout_rouge_l"] == pytest.approx((sides["control"] or [answered])[0]["rouge_l"])
    json.dumps(rows, allow_nan=False)


def test_accuracy_by_label_is_that_of_the_likeliest_label(known: Known) -> None:
    lm, adapter, train, _ = known
    records = [Record(i, f"how is {i}?", f"{label}, so", label=label) for i, label in enumerate(("good", "bad", "good", "so so"))]
    heldout, (questions, labels) = encode(lm, records), labelled_questions(records)
    asked: dict[str, Any] = {"heldout": heldout, "questions": questions, "labels": labels, "answered": heldout[:3], "batch_size": 3}
    work = make_plan(train, **asked)
    results = [run_job(lm, adapter, job) for job in work.jobs]
    utility, _ = measure(work, results, tokenizer=lm.tokenizer)
    nlls = option_nlls(lm, adapter, questions, batch_size=4, chat=ChatFormat())
    chosen, right = choose(questions, nlls, per_byte=False), [question.answer for question in questions]
    assert utility["label_accuracy"] == accuracy(chosen, right)
    assert utility["label_macro_f1"] == macro_f1(chosen, right)
    assert utility["label_accuracy_of_commonest"] == 0.5
    assert utility["label_accuracy_interval"] == pytest.approx(clopper_pearson(sum(map(int.__eq__, chosen, right)), 4))
    rows = [row for row in record_rows(work, results, tokenizer=lm.tokenizer) if row["side"] == "heldout"]
    assert [(row["label_chosen"], row["label_right"]) for row in rows] == [(labels[c], c == r) for c, r in zip(chosen, right, strict=True)]
    assert not make_plan(train, **asked, with_eval=False).groups["label"]


def test_multiple_choice_is_answered_by_likelihood_whatever_the_cut(known: Known) -> None:
    lm, adapter, train, heldout = known
    asked = [ChoiceQuestion(f"how is {i}?", ("good", "bad", "so so")[: 2 + i % 2], i % 2) for i in range(5)]
    work = make_plan(train, heldout, choices=asked, batch_size=2)
    results = [run_job(lm, adapter, job) for job in work.jobs]
    utility, _ = measure(work, results, tokenizer=lm.tokenizer)
    nlls = option_nlls(lm, adapter, asked, batch_size=5, chat=ChatFormat())
    expected = choice_figures(asked, nlls)
    assert {key.removeprefix("choice_"): value for key, value in utility.items() if key.startswith("choice_")} == expected
    assert expected["num_questions"] == 5
    rows = [row for row in record_rows(work, results, tokenizer=lm.tokenizer) if row["side"] == "choice"]
    chosen = choose(asked, nlls, per_byte=False)
    assert [(row["question"], row["chosen"], row["right"]) for row in rows] == [
        (i, asked[i].options[c], c == asked[i].answer) for i, c in enumerate(chosen)
    ]
    assert make_plan(train, heldout, choices=asked, with_eval=False).groups["choice"] == ()


def test_an_untrained_adapter_gives_nothing_away(known: Known) -> None:
    lm, adapter, train, heldout = known
    _, attack = figures((lm, np.zeros_like(adapter), train, heldout))
    assert (attack["train_exact_match"], attack["train_details_rate"]) == (0.0, 0.0)


def test_heldout_nll_is_the_mean_over_all_response_tokens(known: Known) -> None:
    lm, adapter, _, heldout = known
    utility, _ = figures(known, answered=known[3][:1])
    lm.set_adapter(adapter)
    total, count = 0.0, 0
    for example in heldout:
        ids = torch.tensor([example.prompt_ids + example.response_ids])
        labels = ids.clone()
        labels[0, : len(example.prompt_ids)] = -100
        with torch.no_grad():
            total += float(lm.model(input_ids=ids, labels=labels).loss) * len(example.response_ids)
        count += len(example.response_ids)
    assert utility["heldout_nll"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("prefix_tokens", [0, 3])
def test_the_cut_into_jobs_does_not_change_the_figures(known: Known, prefix_tokens: int) -> None:
    whole = figures(known, prefix_tokens=prefix_tokens)
    for batch_size in (1, 2):
        utility, attack = figures(known, prefix_tokens=prefix_tokens, batch_size=batch_size)
        assert attack == whole[1]
        assert utility.keys() == whole[0].keys()
        for key, value in whole[0].items():
            assert utility[key] == pytest.approx(value, rel=1e-5), key


def test_a_plan_asks_for_no_more_than_is_needed(known: Known) -> None:
    _, _, train, heldout = known

    def counts(**changes: Any) -> list[int]:
        work = make_plan(train, heldout, batch_size=2, **changes)
        kinds = [work.groups[name] for name in ("nll", "heldout", "train", "control")]
        assert sum(map(len, kinds)) == len(work.jobs)
        return [sum(len(job.examples) for job in jobs) for jobs in kinds]

    assert counts() == [2, 2, 3, 0]
    assert counts(answered=known[3][:1]) == [2, 1, 3, 0]
    assert counts(with_attack=False) == [2, 2, 0, 0]
    assert counts(with_eval=False) == [0, 2, 3, 0]
    assert counts(prefix_tokens=2) == [2, 2, 3, 2]
    assert counts(prefix_tokens=2, with_eval=False) == [0, 0, 3, 2]
    assert counts(with_eval=False, with_attack=False) == [0, 0, 0, 0]


def test_only_what_was_planned_is_measured(known: Known) -> None:
    utility, attack = figures(known, with_attack=False)
    assert utility is not None
    assert attack is None
    utility, attack = figures(known, with_eval=False)
    assert utility is None
    assert attack["heldout_rouge_l"] is not None
    assert figures(known, with_eval=False, with_attack=False) == (None, None)


def test_results_go_with_their_own_examples(known: Known) -> None:
    """Answers made up here: each training record is answered rightly, the control with one detail of its own."""
    lm, _, train, heldout = known
    work = make_plan(train, heldout, batch_size=2, prefix_tokens=1)
    results: list[list[Any]] = [[(8.0, 4), (1.0, 5)], ["Eva gets 99 ml", "nothing"]]
    results += [[e.record.response[1:] for e in train[:2]], [train[2].record.response[1:]], ["gets 99 ml", "x"]]
    utility, attack = measure(work, results, tokenizer=lm.tokenizer)
    assert utility["heldout_nll"] == 1.0
    assert utility["heldout_rouge_l"] == pytest.approx(0.5)
    assert (attack["train_exact_match"], attack["train_rouge_l"]) == (1.0, 1.0)
    assert attack["train_details_rate"] == 0.5, "a name whose first letter was given away does not come out whole"
    assert attack["heldout_details_rate"] == pytest.approx(1 / 3)
    assert attack["heldout_exact_match"] == 0.0


def test_what_the_prefix_gives_away_is_not_counted(known: Known) -> None:
    """With "Anna" and "Jon," given, only the values are left to find, and the truth to compare with is the rest."""
    lm, _, train, heldout = known
    two = train[:2]
    assert [lm.tokenizer.decode(example.response_ids[:4]) for example in two] == ["Anna", "Jon,"]
    work = make_plan(two, heldout, prefix_tokens=4, with_eval=False)
    _, attack = measure(work, [["Anna has nothing", "Jon, on 5 May"], ["", ""]], tokenizer=lm.tokenizer)
    assert attack["train_details_rate"] == 0.5, "one of two values came out; the names do not count"
    assert attack["train_rouge_l"] == pytest.approx((rouge_l("Anna has nothing", "has 12 mg") + rouge_l("Jon, on 5 May", "on 5 May")) / 2)
    all_given = [replace(job, prefix_tokens=99) for job in work.jobs]
    work = replace(work, groups=work.groups | {"train": (all_given[0],), "control": (all_given[1],)})
    _, attack = measure(work, [["", ""], ["", ""]], tokenizer=lm.tokenizer)
    assert (attack["train_exact_match"], attack["train_rouge_l"], attack["train_details_rate"]) == (0.0, 0.0, None)


def test_the_prefix_attack_of_a_memoriser_continues_the_response(known: Known) -> None:
    _, attack = figures(known, prefix_tokens=3, with_eval=False)
    assert (attack["train_exact_match"], attack["train_rouge_l"]) == (1.0, 1.0)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2, 4, 8])
def test_the_prefix_may_end_within_a_character(prefix_tokens: int) -> None:
    """Of a model that knows a Chinese response by heart, whose characters take three tokens each; the name is the first two of them."""
    lm = build(sharp_base(), rank=8)
    train = encode(lm, [Record(0, "谁", "李明吃两片药", details=("李明",))])
    heldout = encode(lm, [Record(1, "谁", "王芳来了", details=("王芳",))])
    adapter = learn_by_heart(lm, train)
    work = make_plan(train, heldout, prefix_tokens=prefix_tokens, with_eval=False)
    results = [run_job(lm, adapter, job) for job in work.jobs]
    assert results[0] == ["李明吃两片药"[prefix_tokens // 3 :]]
    _, attack = measure(work, results, tokenizer=lm.tokenizer)
    assert attack is not None
    assert (attack["train_exact_match"], attack["train_rouge_l"]) == (1.0, 1.0)
    expected = {4: 0.0, 8: None}.get(prefix_tokens, 1.0)
    assert attack["train_details_rate"] == expected, "half a name does not come out whole, and a whole one was given away"


def test_what_is_given_is_taken_off_though_the_tokenizer_spells_it_in_another_way(known: Known) -> None:
    lm, _, _, heldout = known
    response = "Jose\u0301 Ruiz takes 12 mg"
    example = replace(encode(lm, [Record(0, "q", unicodedata.normalize("NFC", response))])[0], record=Record(0, "q", response))
    work = make_plan([example], heldout, prefix_tokens=len("José Ruiz".encode()), with_eval=False)
    _, attack = measure(work, [["takes 12 mg"], ["", ""]], tokenizer=lm.tokenizer)
    assert attack is not None
    assert attack["train_exact_match"] == 1.0


def test_the_second_attack_has_figures_and_rows_of_its_own_and_changes_none_of_the_first(known: Known) -> None:
    utility, attack, rows = rows_of(known, long_prefix_tokens=3)
    plain_utility, plain_attack, plain_rows = rows_of(known)
    _, prefixed_attack, prefixed_rows = rows_of(known, prefix_tokens=3)
    assert utility == plain_utility
    assert {key: value for key, value in attack.items() if not key.startswith("prefixed_")} == plain_attack
    of_the_second = {key.removeprefix("prefixed_"): value for key, value in attack.items() if key.startswith("prefixed_")}
    assert of_the_second == {key: value for key, value in prefixed_attack.items() if key != "num_examples"}
    assert attack["prefixed_train_approximate_match"] == 1.0 > attack["prefixed_heldout_approximate_match"]
    assert rows[: len(plain_rows)] == plain_rows
    renamed = [{**row, "side": row["side"].removeprefix("prefixed_")} for row in rows[len(plain_rows) :]]
    assert renamed == [row for row in prefixed_rows if row["side"] in ("control", "train")]


@pytest.mark.parametrize(
    ("option", "jobs", "control"), [("prefix_tokens", "train", "control"), ("long_prefix_tokens", "prefixed_train", "prefixed_control")]
)
def test_a_record_that_the_prefix_gives_away_whole_is_left_out_of_that_attack(known: Known, option: str, jobs: str, control: str) -> None:
    """A label, say: its share would be a sure 0, which reads as if nothing leaked."""
    _, _, train, heldout = known
    by_length = sorted(len(example.response_ids) for example in train)
    for prefix in (by_length[0] - 2, by_length[0] - 1, by_length[-1] - 2):
        work = make_plan(train, heldout, batch_size=2, **{option: prefix})
        asked = [example for job in work.groups[jobs] for example in job.examples]
        assert asked == [example for example in train if len(example.response_ids) - 1 > prefix]
        if option == "long_prefix_tokens":
            assert [e for job in work.groups["train"] for e in job.examples] == list(train), "the first attack asks them all"
    short = replace(heldout[0], response_ids=heldout[0].response_ids[-2:])
    work = make_plan(train, [short], **{option: 3})
    assert (work.groups[jobs], work.groups[control]) == ((), ()), "without a control the attack says nothing"
    assert bool(work.groups["train"]) == (option == "long_prefix_tokens")
    assert work.groups["heldout"], "utility is measured all the same"


SAMPLED = SamplingAttack(0, 6, 1.0, 40)


def memory_of(known: Known, heldout: list[Example]) -> MemoryPlan:
    """All records compared, the details of all but the last training record and the last held-out one ranked among references."""
    lm, _, train, _ = known
    pool = pool_of(TRAIN, HELDOUT)
    spans = {example.record.record_id: tuple(detail_spans(example, lm.tokenizer)) for example in (*train, *heldout)}
    among = {"pool": pool, "tokenizer": lm.tokenizer, "chat": DEFAULT_CHAT, "num_references": 15, "seed": 0}
    queries = {e.record.record_id: tuple(detail_queries([e], [spans[e.record.record_id]], **among)) for e in (*train[:2], *heldout[:1])}
    members = tuple((7 + k, example) for k, example in enumerate(train))
    return MemoryPlan(members, tuple(heldout), SAMPLED, seed=0, details=DetailPlan(spans, queries, pool))


def remembered(known: Known, **changes: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Figures and rows with the memory measured, the base model being the adapter of zeros."""
    lm, adapter, train, heldout = known
    work = make_plan(
        train, heldout, memory=memory_of(known, changes.get("compared", heldout)), **{k: v for k, v in changes.items() if k != "compared"}
    )
    results = [run_job(lm, adapter, job) for job in work.jobs]
    base = base_likelihoods(work, [run_job(lm, np.zeros_like(adapter), job) for job in work.likelihood_jobs])
    return *measure(work, results, tokenizer=lm.tokenizer, base=base), record_rows(work, results, tokenizer=lm.tokenizer, base=base)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_memory_changes_no_bit_of_the_other_figures_and_rows(known: Known, batch_size: int) -> None:
    utility, attack, rows = remembered(known, batch_size=batch_size)
    plain_utility, plain_attack, plain_rows = rows_of(known, batch_size=batch_size)
    assert utility == plain_utility
    assert {key: value for key, value in attack.items() if key not in ("memory", "extraction", "details")} == plain_attack
    assert {"memory", "extraction", "details"} <= set(attack)
    new = ("label", "base_nll", "extraction_bits", "target_tokens", "details")
    assert [{key: value for key, value in row.items() if key not in new} for row in rows if row["side"] != "member"] == plain_rows


def test_the_memory_of_one_who_learnt_by_heart_is_what_the_rows_say(known: Known) -> None:
    _, attack, rows = remembered(known)
    members, heldout = ([row for row in rows if row["side"] == side] for side in ("member", "heldout"))
    assert [(row["record_id"], row["client_id"]) for row in members] == [(0, 7), (1, 8), (2, 9)]
    level = sum(row["base_nll"] - row["nll"] for row in heldout) / sum(row["num_tokens"] for row in heldout)
    excess = [row["base_nll"] - row["nll"] - row["num_tokens"] * level for row in members]
    memory, extraction = attack["memory"], attack["extraction"]
    assert memory["bits_per_record"] == pytest.approx(np.mean(excess) / math.log(2))
    assert (memory["auc"], memory["num_members"], memory["num_heldout"], memory["strata"]) == (1.0, 3, 2, "all")
    assert extraction["members"][1:] == [1.0] * 6
    assert extraction["heldout"][0] == 0.0
    assert all(row["target_tokens"] == 6 and row["extraction_bits"] < 1 for row in members)
    assert extraction["median_bits_members"] == pytest.approx(np.median([row["extraction_bits"] for row in members]))
    json.dumps([attack, rows], allow_nan=False)
    typed(Attack, attack, where="attack")
    for row in rows:
        typed(Answer, {"round_index": 0, "owner": None, **row}, where="answers")


def test_the_details_of_one_who_learnt_by_heart_are_likely_and_exposed_and_others_are_not(known: Known) -> None:
    lm, adapter, train, heldout = known
    _, attack, rows = remembered(known)
    told = {row["record_id"]: row["details"] for row in rows if row.get("details")}
    assert {k: [one["detail"] for one in found] for k, found in told.items()} == {
        0: ["Anna", "12 mg"],
        1: ["Jon", "5 May"],
        3: ["Eva", "99 ml"],
        4: ["Max"],
    }
    for example in (*train[:2], *heldout):
        nlls, base = (token_nlls(lm, one, [example], batch_size=1)[0] for one in (adapter, np.zeros_like(adapter)))
        spans = detail_spans(example, lm.tokenizer)
        found = told[example.record.record_id]
        assert [one["bits"] for one in found] == pytest.approx(detail_bits(nlls, spans), rel=1e-4, abs=1e-4)
        assert [one["base_bits"] for one in found] == pytest.approx(detail_bits(base, spans), rel=1e-4, abs=1e-4)
    assert [one["num_references"] for one in told[4]] == [0], "no reference was asked for"
    details = attack["details"]
    assert (details["num_details"], details["num_control"]) == (4, 3)
    assert details["gain_bits"] == pytest.approx(details["gain_bits_members"] - details["gain_bits_control"])
    assert details["gain_bits"] > 5
    ranked = [one for k in (0, 1) for one in told[k] if one["exposure"] is not None]
    assert details["num_exposed"] == len(ranked) > 0
    assert details["exposure_members"] == pytest.approx(np.mean([one["exposure"] for one in ranked]))
    assert details["exposure_members"] == pytest.approx(details["max"])
    assert details["exposure_control"] < details["max"]


def test_the_base_model_remembers_nothing(known: Known) -> None:
    lm, adapter, train, heldout = known
    _, attack, _ = remembered((lm, np.zeros_like(adapter), train, heldout))
    assert [attack["memory"][key] for key in ("bits_per_record", "nats_per_token", "auc", "tpr_at_1pct")] == [0.0, 0.0, 0.5, 0.0]
    assert attack["details"]["gain_bits"] == 0.0


def test_heldout_records_are_read_once_and_only_those_compared_where_no_utility_is_due(known: Known) -> None:
    _, _, train, heldout = known
    memory = memory_of(known, heldout[1:])

    def read(**changes: Any) -> dict[str, list[tuple[str, list[int]]]]:
        work = make_plan(train, heldout, memory=memory, **changes)
        names = ("nll", "member", "compared")
        return {n: [(job.kind, [e.record.record_id for e in job.examples]) for job in work.groups[n]] for n in names}

    assert read() == {"nll": [("likelihood", [4]), ("nll", [3])], "member": [("likelihood", [0, 1, 2])], "compared": []}
    assert read(with_attack=False) == {"nll": [("nll", [4]), ("nll", [3])], "member": [], "compared": []}
    assert read(with_eval=False) == {"nll": [], "member": [("likelihood", [0, 1, 2])], "compared": [("likelihood", [4])]}


def test_without_two_heldout_records_memory_is_left_out_and_extraction_is_not(known: Known) -> None:
    _, attack, rows = remembered(known, compared=known[3][:1], with_eval=False)
    assert "memory" not in attack
    assert attack["extraction"]["num_heldout"] == 1
    assert [row["record_id"] for row in rows if row["side"] == "heldout" and "base_nll" in row] == [3]
    assert len([row for row in rows if row["side"] == "heldout"]) == 2, "the other was answered"


def test_a_job_leaves_the_adapter_of_the_last_one_behind_no_trace(known: Known) -> None:
    lm, adapter, train, heldout = known
    [job] = make_plan(train, heldout, with_eval=False, with_attack=True).groups["train"]
    first = run_job(lm, adapter, job)
    assert run_job(lm, np.zeros_like(adapter), job) != first
    assert run_job(lm, adapter, job) == first == [record.response for record in TRAIN]
    short = replace(job, max_new_tokens=4)
    assert run_job(lm, adapter, short) == [record.response[:4].strip() for record in TRAIN]


def test_mean_of_clients_leaves_out_what_some_lack() -> None:
    assert mean_of([]) is None
    assert mean_of([{"a": 1.0, "b": None, "c": None}, {"a": 3.0, "b": 4.0, "c": None}]) == {"a": 2.0, "b": 4.0, "c": None}
    assert mean_of([{"a": 1.0}, {"a": 3.0, "b": 4.0}]) == mean_of([{"a": 3.0, "b": 4.0}, {"a": 1.0}]) == {"a": 2.0, "b": 4.0}, (
        "whose records were too short"
    )


def test_mean_of_clients_goes_into_figures_and_lists_and_leaves_intervals_out() -> None:
    one = {"memory": {"auc": 0.5, "auc_interval": [0.4, 0.6], "strata": "all", "top_k": 40, "members": [0.0, 1.0]}}
    other = {"memory": {"auc": 0.7, "auc_interval": [0.6, 0.8], "strata": "label", "top_k": 40, "members": [1.0, 1.0]}}
    assert mean_of([one, other]) == {"memory": {"auc": 0.6, "strata": None, "top_k": 40, "members": [0.5, 1.0]}}
    assert mean_of([one, {"memory": None}]) == {"memory": {"auc": 0.5, "strata": "all", "top_k": 40, "members": [0.0, 1.0]}}
