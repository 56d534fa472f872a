"""FewFedWeight as reconstructed: the shared model's answers, their weights by energy, the clients' weights by validation loss."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from raysim.config import load
from raysim.federation.assignment import Assignment
from raysim.federation.setup import prepare
from raysim.federation.worker import Worker
from raysim.methods.call import ClientState
from raysim.methods.fedit import fedit as fedit_group
from raysim.methods.fewfedweight import aggregation_weight, answers, energy_weights, hold_back
from raysim.methods.fewfedweight import fewfedweight as fewfedweight_group
from raysim.methods.spec import METHODS
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from raysim.model.train import mean_nll, response_nll, train_adapter
from raysim.runs.run import notes, run
from tests.method_calls import RECORDS, alone, in_round, make_call, other_responses, some_adapter
from tests.rounds import make_round, next_step, state_of
from tests.small_runs import small
from tests.tiny_models import build, sharp_base, spelling_base

fedit = alone(fedit_group)
fewfedweight = alone(fewfedweight_group)

ANSWER = ["<|assistant|>", *"Big", "č", *"cat", "Ġ", *"runs", "<|end|>"]
FEW = ["method.name=fewfedweight", "fewfedweight.max_response_tokens=24"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base())


@pytest.fixture(scope="module")
def speller() -> LanguageModel:
    """A model that answers every question alike while its adapter's B is zero."""
    return build(spelling_base(ANSWER))


# --- answers and their weights ---


def test_the_shared_model_answers_the_clients_own_prompts(speller: LanguageModel) -> None:
    call = make_call(speller, *FEW)
    call = dataclasses.replace(call, adapter=np.where(speller.layout.group_mask("A"), call.adapter, np.float32(0)))
    pairs = answers(speller, call, call.shard)
    assert [pair.record.instruction for pair in pairs] == [record.instruction for record in RECORDS]
    assert {pair.record.response for pair in pairs} == {"Big\rcat runs"}
    assert [pair.prompt_ids for pair in pairs] == [example.prompt_ids for example in call.shard]
    end = speller.eos_token_ids[0]
    assert all(pair.response_ids[-1] == end and pair.response_ids.count(end) == 1 for pair in pairs)
    cut = answers(speller, dataclasses.replace(call, config=load("", [*FEW, "fewfedweight.max_response_tokens=3"])), call.shard)
    assert {pair.record.response for pair in cut} == {"Big"}
    assert all(len(pair.response_ids) == 3 and end not in pair.response_ids for pair in cut)
    long = dataclasses.replace(call.shard[0], prompt_ids=call.shard[0].prompt_ids * 2000)
    assert answers(speller, call, [long]) == [], "a prompt that fills the context is not asked"
    none = dataclasses.replace(call, config=load("", [*FEW, "fewfedweight.pseudo_weight=0"]))
    assert answers(speller, none, call.shard) == []


def test_an_empty_answer_is_dropped_and_said_to_be() -> None:
    """A random model repeats a byte that spells nothing: the client trains on its own records alone."""
    silent = build(load_base_model("tiny"))
    call = make_call(silent, *FEW, "fewfedweight.validation_share=0")
    result = fewfedweight(silent, call)
    assert [(row["verdict"], row["kept"], row["response"]) for row in result.synthetic] == [("response", False, "")] * 6
    assert result.upload["adapter"].tobytes() == fedit(silent, call).upload["adapter"].tobytes()


def test_weights_of_answers_are_a_softmax_of_their_energies() -> None:
    energies = [1.0, 3.0, 0.5, 700.0]
    for temperature in (0.3, 1.0, 20.0):
        np.testing.assert_allclose(energy_weights(energies, temperature=temperature), 4 * softmax(-np.array(energies) / temperature))
    assert energy_weights([2.0, 2.0, 2.0], temperature=0.1).tolist() == [1.0, 1.0, 1.0]
    assert energy_weights([1.0, math.nan, 1.0, math.inf], temperature=1.0).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert energy_weights([math.nan], temperature=1.0).tolist() == [0.0]
    assert energy_weights([], temperature=1.0).tolist() == []


def test_a_weight_multiplies_an_examples_loss(lm: LanguageModel) -> None:
    """One SGD step on a batch is the weighted sum of the single gradients over all tokens; weights of 1 are none, bit for bit."""
    call = make_call(lm, "train.optimizer=sgd", "train.batch_size=6", "train.lr=0.1", "train.max_grad_norm=0")
    settings = {"settings": call.train_settings(), "seed": 0}
    weights = [0.0, 1.0, 0.25, 3.0, 1.5, 0.0]
    weighted, _ = train_adapter(lm, call.adapter, call.shard, **settings, weights=weights)
    gradient = np.zeros(lm.layout.num_parameters)
    for weight, example in zip(weights, call.shard, strict=True):
        lm.set_adapter(call.adapter)
        lm.flat_grad.zero_()
        response_nll(lm, [example])[0].sum().backward()
        gradient += weight * lm.flat_grad.numpy().astype(np.float64)
    expected = -0.1 * gradient / sum(len(example.response_ids) for example in call.shard)
    np.testing.assert_allclose(weighted - call.adapter, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).max() > 1e-4
    plain = [train_adapter(lm, call.adapter, call.shard, **settings, weights=w)[0].tobytes() for w in (None, [1.0] * 6)]
    assert plain[0] == plain[1] != weighted.tobytes()


def test_training_is_on_real_records_and_weighted_answers(lm: LanguageModel) -> None:
    """The energies are under the client's own adapter of the last round; what is held back is not trained on."""
    own = some_adapter(lm, seed=4)
    call = make_call(lm, *FEW, "fewfedweight.pseudo_weight=0.5", "fewfedweight.energy_temperature=0.2")
    call = dataclasses.replace(in_round(call, 1), state=ClientState(arrays={"own": own}))
    result = fewfedweight(lm, call)
    assert len(result.synthetic) == 5
    assert [row["instruction"] for row in result.synthetic] == [
        record.instruction for record in RECORDS if record.instruction in {row["instruction"] for row in result.synthetic}
    ]
    real = [e for e in call.shard if e.record.instruction in {row["instruction"] for row in result.synthetic}]
    pairs = answers(lm, call, real)
    lm.set_adapter(own)
    energies = [nll / count for nll, count in mean_nll(lm, pairs, batch_size=4)]
    assert [row["score"] for row in result.synthetic] == energies
    weights = 0.5 * 5 * softmax(-np.array(energies) / 0.2)
    expected, stats = train_adapter(
        lm, call.adapter, [*real, *pairs], settings=call.train_settings(), seed=call.seed("train"), weights=[*[1.0] * 5, *weights.tolist()]
    )
    np.testing.assert_allclose(result.upload["adapter"], expected - call.adapter, rtol=1e-4, atol=1e-7)
    assert result.stats.num_tokens == stats.num_tokens
    assert result.state is not None
    assert result.upload["adapter"].tobytes() == (result.state.arrays["own"] - call.adapter).tobytes()
    [held_back] = [e for e in call.shard if e not in real]
    lm.set_adapter(result.state.arrays["own"])
    [(nll, count)] = mean_nll(lm, [held_back], batch_size=4)
    assert result.weight == pytest.approx(math.exp(-nll / count), rel=1e-6)


def test_without_answers_validation_and_adaptive_weights_it_is_fedit(lm: LanguageModel) -> None:
    settings = ["fewfedweight.pseudo_weight=0", "fewfedweight.validation_share=0", "server.weighting=examples"]
    call = make_call(lm, *FEW, *settings)
    result = fewfedweight(lm, call)
    assert result.upload["adapter"].tobytes() == fedit(lm, call).upload["adapter"].tobytes()
    assert result.weight is None
    assert result.upload["adapter"].tobytes() != fewfedweight(lm, make_call(lm, *FEW, *settings[1:])).upload["adapter"].tobytes()


# --- the client's own weight ---


def test_records_are_held_back_for_good(lm: LanguageModel) -> None:
    shard = make_call(lm).shard
    sizes = {share: [len(part) for part in hold_back(shard, share=share, seed=1)] for share in (0.01, 0.2, 0.5, 0.9)}
    assert sizes == {0.01: [5, 1], 0.2: [5, 1], 0.5: [3, 3], 0.9: [1, 5]}
    train, validate = hold_back(shard, share=0.5, seed=1)
    assert sorted((*train, *validate), key=shard.index) == list(shard)
    assert (train, validate) == hold_back(shard, share=0.5, seed=1)
    assert len({tuple(shard.index(e) for e in hold_back(shard, share=0.5, seed=s)[1]) for s in range(20)}) > 3
    assert hold_back(shard, share=0.0, seed=1) == (list(shard), list(shard))
    assert hold_back(shard[:1], share=0.5, seed=1) == ([shard[0]], [shard[0]])


def test_weight_by_validation_loss() -> None:
    assert aggregation_weight([(6.0, 2), (3.0, 1)], temperature=2.0) == pytest.approx(math.exp(-1.5))
    assert aggregation_weight([], temperature=1.0) == 0.0, "a client without records must not outweigh those with some"
    assert aggregation_weight([(math.inf, 2)], temperature=1.0) == aggregation_weight([(math.nan, 2)], temperature=1.0) == 0.0


def test_a_release_is_the_softmax_average_of_the_updates(lm: LanguageModel) -> None:
    """Over one chunk and over chunks of one, from what the clients' own calls give."""
    overrides = [*FEW, "fewfedweight.aggregation_temperature=0.05", "lora.target_modules=[q_proj,v_proj]"]
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    config = make_call(lm, *overrides).config
    model = worker.language_model(config.lora)
    calls = [
        dataclasses.replace(make_call(model, *overrides, records=records), client_id=k)
        for k, records in enumerate([RECORDS, other_responses(RECORDS), RECORDS[:3]])
    ]
    results = [fewfedweight(model, call) for call in calls]
    losses = np.array([-0.05 * math.log(result.weight or 0.0) for result in results])
    assert np.ptp(losses) > 0.01, "equal weights would not tell a softmax from a mean"
    expected = sum(a * r.upload["adapter"].astype(np.float64) for a, r in zip(softmax(-losses / 0.05), results, strict=True))
    assignment = Assignment(config, calls[0].mechanism, (1.0, 1.0, 1.0))
    for chunks in ([(0, 1, 2)], [(0,), (1,), (2,)]):
        sums = [
            worker.run_chunk(assignment, chunk, calls[0].round, [calls[k].shard for k in chunk], [None] * len(chunk))[0] for chunk in chunks
        ]
        state, _ = next_step(state_of(0, np.zeros_like(calls[0].adapter)), sums, mechanism=calls[0].mechanism, lr=1.0, seed=0)
        np.testing.assert_allclose(state.adapter, expected, rtol=1e-4, atol=1e-7)


def test_a_weight_that_the_data_decide_is_refused_where_a_guarantee_is_claimed(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    config = load("", [*FEW, "model.name=tiny", "lora.rank=4"])
    model = worker.language_model(config.lora)
    private = make_call(model, "privacy.unit=client", "privacy.noise_multiplier=0").mechanism
    call = make_call(model, *FEW)
    with pytest.raises(AssertionError, match="bounds no client"):
        worker.run_chunk(Assignment(config, private, (1.0,) * 3), (0,), make_round(private, call.round.broadcast), [call.shard], [None])


# --- what is said of it ---


def test_a_run_says_that_it_is_a_reconstruction(tmp_path: Path) -> None:
    config = small("fewfedweight", "server.num_rounds=1", "evaluate.every=0", "attack.every=-1", out=tmp_path / "run")
    done = run(config, display=False)
    assert METHODS["fewfedweight"].note in (tmp_path / "run" / "report.html").read_text()
    assert "reconstruction" in done.summary["method_note"]
    assert done.summary["private"] is None, "the clients' adapters are what they sent, not kept from anyone"
    experiment = prepare(config, build(load_base_model("tiny")))
    assert METHODS["fewfedweight"].note in notes(experiment, config)
    assert notes(experiment, dataclasses.replace(config, method=dataclasses.replace(config.method, name="fedit"))) == []
