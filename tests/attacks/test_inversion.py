"""Gradient inversion: whole sequences from a bare update, and what takes them away: a small rank, noise, many tokens.

The tiny model has a hidden size of 32, so that a few short sequences leave room in it; its vocabulary is bytes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from raysim.attacks.inversion import (
    Inversion,
    InversionSettings,
    client_gradient,
    continuation_inputs,
    gradient_spans,
    inversion_sweep,
    invert_update,
    module_inputs,
    projections,
    score_inversion,
    template_opening,
    trained_looking_adapter,
)
from raysim.attacks.views import ServerView
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.base_model import BaseModel, load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter
from raysim.privacy.clipping import l2_norm
from raysim.privacy.noise import gaussian
from tests.tiny_models import encode

RECORDS = [Record(record_id=0, instruction="who is it", response="Anna B."), Record(record_id=1, instruction="hi", response="go")]
SETTINGS = InversionSettings()


def build(rank: int, *, target_modules: Sequence[str] = ("q_proj", "v_proj")) -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=rank, alpha=2.0 * rank, dropout=0.0, target_modules=list(target_modules))


def rounding_error(adapter: Vector) -> float:
    """`entry_error` of an update that is a difference of float32 adapters near `adapter`: at most half the spacing of its largest entry."""
    return float(np.spacing(np.abs(adapter).max())) / 2


def tokens(example: Example) -> tuple[int, ...]:
    return (*example.prompt_ids, *example.response_ids)


def opening_of(lm: LanguageModel) -> tuple[int, ...]:
    return template_opening(lm.tokenizer, chat=ChatFormat())


def attack(lm: LanguageModel, adapter: Vector, update: Vector, settings: InversionSettings = SETTINGS) -> Inversion:
    return invert_update(lm, ServerView(adapter, update), opening=opening_of(lm), settings=settings)


@pytest.fixture(scope="module")
def large() -> LanguageModel:
    return build(32)


@pytest.fixture(scope="module")
def adapter(large: LanguageModel) -> Vector:
    return trained_looking_adapter(large.layout, b_std=0.01, seed=0)


@pytest.fixture(scope="module")
def examples(large: LanguageModel) -> list[Example]:
    return encode(large, RECORDS)


@pytest.fixture(scope="module")
def gradient(large: LanguageModel, adapter: Vector, examples: list[Example]) -> Vector:
    return client_gradient(large, adapter, examples[:1])


# --- what comes back


def test_every_token_comes_back_and_no_other(large: LanguageModel, adapter: Vector, gradient: Vector, examples: list[Example]) -> None:
    inversion = attack(large, adapter, gradient)
    truth = set(tokens(examples[0]))
    assert set(inversion.token_ids) == truth
    assert inversion.span_dimension == len(truth), "as many dimensions as there are distinct tokens"


def test_the_sequence_comes_back_but_for_its_last_token(
    large: LanguageModel, adapter: Vector, gradient: Vector, examples: list[Example]
) -> None:
    inversion = attack(large, adapter, gradient)
    assert inversion.sequences[0] == tokens(examples[0])[:-1]
    score = score_inversion(inversion, examples[:1], opening=opening_of(large), tokenizer=large.tokenizer)
    assert (score.token_recall, score.token_precision, score.rouge_l, score.exact_match) == (1.0, 1.0, 1.0, 1.0)


def test_all_sequences_of_a_batch_come_back(large: LanguageModel, adapter: Vector, examples: list[Example]) -> None:
    inversion = attack(large, adapter, client_gradient(large, adapter, examples))
    assert {tokens(example)[:-1] for example in examples} <= set(inversion.sequences)
    assert set(inversion.token_ids) == {token for example in examples for token in tokens(example)}


@pytest.mark.parametrize("scale", [-1e-3, -1e3])
def test_the_scale_of_the_update_does_not_matter(large: LanguageModel, adapter: Vector, gradient: Vector, scale: float) -> None:
    assert attack(large, adapter, np.float32(scale) * gradient).sequences == attack(large, adapter, gradient).sequences


def test_steps_of_sgd_on_the_client_leak_all_their_tokens(large: LanguageModel, adapter: Vector, examples: list[Example]) -> None:
    settings = TrainSettings(
        num_epochs=2, max_steps=0, batch_size=1, lr=50.0, optimizer="sgd", weight_decay=0.0, max_grad_norm=0.0, prox_mu=0.0
    )
    after, stats = train_adapter(large, adapter, examples, settings=settings, seed=0)
    assert stats.num_steps == 4
    inversion = attack(large, adapter, after - adapter, InversionSettings(entry_error=rounding_error(adapter)))
    assert set(inversion.token_ids) == {token for example in examples for token in tokens(example)}


def test_adam_hides_the_span(large: LanguageModel, adapter: Vector, examples: list[Example]) -> None:
    settings = TrainSettings(
        num_epochs=1, max_steps=1, batch_size=1, lr=1e-3, optimizer="adamw", weight_decay=0.0, max_grad_norm=0.0, prox_mu=0.0
    )
    after, _ = train_adapter(large, adapter, examples[:1], settings=settings, seed=0)
    inversion = attack(large, adapter, after - adapter, InversionSettings(entry_error=rounding_error(adapter)))
    assert not set(inversion.token_ids) & set(tokens(examples[0]))


# --- what takes it away


@pytest.mark.parametrize("rank", [1, 4])
def test_a_small_rank_starves_the_attack(rank: int, examples: list[Example]) -> None:
    lm = build(rank)
    adapter = trained_looking_adapter(lm.layout, b_std=0.01, seed=0)
    inversion = attack(lm, adapter, client_gradient(lm, adapter, examples[:1]))
    assert inversion.span_dimension == inversion.num_rows == 2 * rank, "q and v have `rank` rows each"
    assert "starved" in inversion.verdict
    score = score_inversion(inversion, examples[:1], opening=opening_of(lm), tokenizer=lm.tokenizer)
    assert (score.token_recall, score.rouge_l, inversion.sequences) == (0.0, 0.0, ())


def test_projections_that_share_the_input_add_their_rows(examples: list[Example]) -> None:
    """Fifteen distinct tokens are too many for the eight rows of q, and not for the 24 of q, k and v."""
    found = {}
    for modules in (("q_proj",), ("q_proj", "k_proj", "v_proj")):
        lm = build(8, target_modules=modules)
        adapter = trained_looking_adapter(lm.layout, b_std=0.01, seed=0)
        inversion = attack(lm, adapter, client_gradient(lm, adapter, examples[:1]))
        found[len(modules)] = len(set(inversion.token_ids) & set(tokens(examples[0])))
    assert found == {1: 0, 3: 15}


@pytest.mark.parametrize(("multiplier", "sees"), [(1e-12, True), (1e-3, False), (0.1, False), (1.0, False)])
def test_noise_breaks_it_however_it_is_told(
    large: LanguageModel, adapter: Vector, gradient: Vector, examples: list[Example], multiplier: float, sees: bool
) -> None:
    std = multiplier * l2_norm(gradient)
    noisy = gradient + gaussian(len(gradient), std=std, seed=3, secure=False)
    for told in (0.0, std):
        inversion = attack(large, adapter, noisy, InversionSettings(entry_error=told))
        score = score_inversion(inversion, examples[:1], opening=opening_of(large), tokenizer=large.tokenizer)
        assert (score.rouge_l == 1.0) == (score.exact_match == 1.0) == sees, (told, score)
        assert (score.token_precision * score.token_recall == 1.0) == sees, (told, score)


def test_the_sum_over_many_clients_hides_them(large: LanguageModel, adapter: Vector) -> None:
    """What a secure sum leaves to the server: more distinct tokens than the hidden size has dimensions."""
    words = ["abcdef", "ghijkl", "mnopqr", "stuvwx", "yzABCD", "EFGHIJ"]
    clients = encode(large, [Record(record_id=i, instruction=word, response=word[::-1]) for i, word in enumerate(words)])
    updates = [client_gradient(large, adapter, [client]) for client in clients]
    alone, together = attack(large, adapter, updates[0]), attack(large, adapter, np.sum(updates, axis=0))
    assert tokens(clients[0])[:-1] in alone.sequences
    assert together.span_dimension == 32
    assert (together.token_ids, together.sequences) == ((), ())


def test_with_b_at_zero_a_shows_nothing(large: LanguageModel, examples: list[Example]) -> None:
    fresh = initial_adapter(large.layout, seed=0)
    inversion = attack(large, fresh, client_gradient(large, fresh, examples[:1]))
    assert inversion.verdict.startswith("nothing to see")
    assert (inversion.span_dimension, inversion.token_ids, inversion.sequences) == (0, (), ())
    score = score_inversion(inversion, examples[:1], opening=opening_of(large), tokenizer=large.tokenizer)
    assert set(vars(score).values()) == {0.0}


def test_with_b_at_zero_the_gradient_of_b_shows_the_tokens_all_the_same(large: LanguageModel, examples: list[Example]) -> None:
    fresh = initial_adapter(large.layout, seed=0)
    inversion = attack(large, fresh, client_gradient(large, fresh, examples[:1]), InversionSettings(factor="B"))
    assert set(inversion.token_ids) == set(tokens(examples[0]))


def test_a_span_of_everything_says_nothing(examples: list[Example]) -> None:
    """With rank 4, B's gradient has only four columns, which fifteen tokens fill: every token would fit."""
    lm = build(4)
    fresh = initial_adapter(lm.layout, seed=0)
    inversion = attack(lm, fresh, client_gradient(lm, fresh, examples[:1]), InversionSettings(factor="B"))
    assert inversion.span_dimension == 4
    assert (inversion.token_ids, float(inversion.distance_V.min())) == ((), 1.0)


def test_an_update_of_zero_shows_nothing(large: LanguageModel, adapter: Vector) -> None:
    assert attack(large, adapter, np.zeros_like(adapter)).verdict.startswith("nothing to see")


# --- what the attacker holds


def test_the_attack_uses_its_arguments_only(large: LanguageModel, adapter: Vector, gradient: Vector) -> None:
    before = attack(large, adapter, gradient)
    large.set_adapter(np.ones_like(adapter))
    large.flat_grad.fill_(7.0)
    after = attack(large, adapter, gradient)
    large.flat_grad.zero_()
    assert torch.equal(before.distance_V, after.distance_V)
    assert before.sequences == after.sequences


def test_the_span_is_that_of_the_inputs(large: LanguageModel, adapter: Vector, gradient: Vector, examples: list[Example]) -> None:
    """Against the definition: the normalised embeddings of the tokens that any loss depends on, all but the last."""
    core: Any = large.model.get_base_model().get_submodule("model")
    inputs = core.layers[0].input_layernorm(core.embed_tokens(torch.tensor(tokens(examples[0])[:-1]))).detach().double()
    _, values, vectors = torch.linalg.svd(inputs, full_matrices=False)
    basis = vectors[values > 1e-6 * values[0]]
    (span,) = gradient_spans(large.layout, adapter, gradient, modules=projections(large.layout)[0], settings=SETTINGS)
    torch.testing.assert_close(span.basis_KM.T @ span.basis_KM, basis.T @ basis, atol=1e-4, rtol=0)


def test_candidates_side_by_side_are_as_each_alone(large: LanguageModel, adapter: Vector, examples: list[Example]) -> None:
    large.set_adapter(adapter)
    module = projections(large.layout)[1][0]
    prefixes = torch.tensor([tokens(examples[0])[:5], tokens(examples[1])[:5]])
    candidates = torch.tensor([40, 41, 97])
    got = continuation_inputs(large, prefixes, candidates, module=module)
    core: Any = large.model.get_base_model().get_submodule("model")
    for w, prefix in enumerate(prefixes):
        for n, candidate in enumerate(candidates):
            with torch.no_grad():
                states = core(input_ids=torch.cat([prefix, candidate[None]])[None], output_hidden_states=True).hidden_states
                expected = core.layers[1].input_layernorm(states[1])[0, -1].double()
            torch.testing.assert_close(got[w, n], expected, atol=1e-5, rtol=1e-5)


def test_the_update_must_be_finite(large: LanguageModel, adapter: Vector, gradient: Vector) -> None:
    broken = gradient.copy()
    broken[0] = np.nan
    with pytest.raises(ValueError, match="update: holds a NaN"):
        attack(large, adapter, broken)


def test_an_adapter_without_attention_inputs_is_refused() -> None:
    lm = build(2, target_modules=["o_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"lora\.target_modules: .* q_proj, k_proj or v_proj"):
        projections(lm.layout)


def test_an_unknown_factor_is_refused(large: LanguageModel, adapter: Vector, gradient: Vector) -> None:
    with pytest.raises(ValueError, match="factor='C' must be"):
        attack(large, adapter, gradient, InversionSettings(factor="C"))


def test_a_model_with_positions_in_its_first_input_is_refused() -> None:
    tiny = load_base_model("tiny")
    config = OPTConfig(vocab_size=261, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # transformers has no type here
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    base = BaseModel("opt", config.to_dict() | {"architectures": ["OPTForCausalLM"]}, arrays, "float32", tiny.tokenizer_files)
    lm = build_language_model(base, rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    adapter = trained_looking_adapter(lm.layout, b_std=0.01, seed=0)
    with pytest.raises(ValueError, match="the position enters"):
        invert_update(lm, ServerView(adapter, adapter), opening=(), settings=SETTINGS)


# --- the helpers


def test_the_clients_gradient_is_its_sgd_update(large: LanguageModel, adapter: Vector, examples: list[Example], gradient: Vector) -> None:
    settings = TrainSettings(
        num_epochs=1, max_steps=1, batch_size=1, lr=10.0, optimizer="sgd", weight_decay=0.0, max_grad_norm=0.0, prox_mu=0.0
    )
    after, _ = train_adapter(large, adapter, examples[:1], settings=settings, seed=0)
    np.testing.assert_allclose((adapter - after) / 10.0, gradient, atol=1e-7)
    assert float(np.abs(gradient).max()) > 1e-5


def test_the_opening_is_what_the_template_puts_first(large: LanguageModel) -> None:
    user, system, end = large.tokenizer.convert_tokens_to_ids(["<|user|>", "<|system|>", "<|end|>"])
    assert template_opening(large.tokenizer, chat=ChatFormat()) == (user,)
    said = large.tokenizer("Be brief.")["input_ids"]
    assert template_opening(large.tokenizer, chat=ChatFormat("Be brief.")) == (system, *said, end, user)


def test_the_rounding_error_bounds_what_adding_and_subtracting_lose(adapter: Vector) -> None:
    step = 1e-4 * np.random.default_rng(0).standard_normal(len(adapter)).astype(np.float32)
    lost = np.abs(((adapter + step) - adapter).astype(np.float64) - step)
    assert 0.5 * rounding_error(adapter) < lost.max() <= rounding_error(adapter)


def test_the_drawn_b_has_the_stated_size(large: LanguageModel) -> None:
    drawn, fresh = trained_looking_adapter(large.layout, b_std=0.01, seed=5), initial_adapter(large.layout, seed=5)
    b = large.layout.group_mask("B")
    np.testing.assert_array_equal(drawn[~b], fresh[~b])
    assert drawn[b].std() == pytest.approx(0.01, rel=0.05)


def test_figures_by_hand(large: LanguageModel, examples: list[Example]) -> None:
    whole = tokens(examples[1])
    body = whole[1:]
    wrong = next(token for token in range(20, 200) if token not in whole)
    distance = torch.ones(len(large.tokenizer), dtype=torch.float64)
    distance[list(body[:2])] = 0.0
    distance[wrong] = 0.5
    found = Inversion(3, 3, 9, distance, token_ids=(*body[:2], wrong), sequences=((*whole[:3], wrong),))
    score = score_inversion(found, examples[1:], opening=whole[:1], tokenizer=large.tokenizer)
    assert len(set(body)) == 6, "h i <end> <assistant> g o"
    assert score.token_recall == pytest.approx(2 / 6)
    assert score.token_precision == pytest.approx(2 / 3)
    assert score.rouge_1 == pytest.approx(2 * 2 / (3 + len(body)))
    assert score.nearest_recall == pytest.approx(2 / 6), "four of the six nearest are told apart by nothing, and count for nothing"
    assert score.exact_match == 0.0
    whole_found = dataclasses.replace(found, sequences=(whole[:-1],))
    assert score_inversion(whole_found, examples[1:], opening=whole[:1], tokenizer=large.tokenizer).exact_match == 1.0
    with pytest.raises(ValueError, match="opening: an example does not start with these 1 tokens"):
        score_inversion(found, examples[1:], opening=(wrong,), tokenizer=large.tokenizer)


def test_the_sweep_shows_rank_and_noise(examples: list[Example], large: LanguageModel) -> None:
    rows = inversion_sweep(
        build,
        examples,
        opening=opening_of(large),
        ranks=[2, 32],
        batch_sizes=[1, 2],
        noise_multipliers=[0.0, 0.1],
        b_std=0.01,
        seed=0,
        settings=SETTINGS,
    )
    assert [(row["rank"], row["batch"], row["noise"]) for row in rows] == [(r, b, z) for r in (2, 32) for b in (1, 2) for z in (0.0, 0.1)]
    whole = {(row["rank"], row["batch"], row["noise"]) for row in rows if row["exact_match"] == 1.0}
    assert whole == {(32, 1, 0.0), (32, 2, 0.0)}
    assert {row["span_dim"] for row in rows if row["rank"] == 2 and row["noise"] == 0.0} == {4}
    assert all(row["token_recall"] == 0.0 for row in rows if (row["rank"], row["noise"]) != (32, 0.0))


def test_a_prefix_of_nothing_is_allowed(large: LanguageModel, adapter: Vector, gradient: Vector, examples: list[Example]) -> None:
    inversion = invert_update(large, ServerView(adapter, gradient), opening=(), settings=SETTINGS)
    assert tokens(examples[0])[:-1] in inversion.sequences


def test_module_inputs_sees_what_it_is_told_to(large: LanguageModel, adapter: Vector) -> None:
    """A token that nothing sees changes nothing."""
    large.set_adapter(adapter)
    module = projections(large.layout)[1][0]
    visible = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])
    inputs = [
        module_inputs(large, torch.tensor([[50, other, 60]]), module=module, visible=visible, positions=torch.arange(3))[0]
        for other in (70, 71)
    ]
    torch.testing.assert_close(inputs[0][[0, 2]], inputs[1][[0, 2]], atol=0, rtol=0)
    assert not torch.equal(inputs[0][1], inputs[1][1])
