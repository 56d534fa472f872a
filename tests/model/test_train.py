"""Local training: the loss is transformers' own, clipping is per example and bounded, noise is what was said, seeds decide bits."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from scipy.stats import kstest

from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_literal, train_private
from raysim.model.train import GROUPING_WINDOW, TrainSettings, grouped_batches, mean_nll, response_nll, scheduled_lr, train_adapter
from raysim.privacy.noise import gaussian
from raysim.rng import numpy_rng, seed_for

LOCAL = TrainSettings(num_epochs=1, max_steps=0, batch_size=4, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0)
PRIVATE = PrivateSettings(
    num_steps=2, batch_size=4, sampling_prob=0.5, lr=0.01, optimizer="sgd", clip_norm=1.0, noise_multiplier=0.0, secure_noise=False
)
Train = Callable[..., tuple[Vector, object]]


def build(*, dropout: float = 0.0, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=2, alpha=8.0, dropout=dropout, target_modules=list(targets))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build()


def example(prompt: Sequence[int], response: Sequence[int]) -> Example:
    record = Record(record_id=0, instruction="", response="")
    return Example(record=record, prompt_ids=tuple(prompt), response_ids=tuple(response))


def some_examples(count: int, *, seed: int = 0, length: int | None = None) -> list[Example]:
    """Random tokens, of random lengths unless `length` is given."""
    rng = np.random.default_rng(seed)
    sizes = [(length or int(rng.integers(2, 20)), length or int(rng.integers(1, 12))) for _ in range(count)]
    return [example(rng.integers(5, 261, p).tolist(), rng.integers(5, 261, r).tolist()) for p, r in sizes]


def some_adapter(lm: LanguageModel, *, scale: float = 0.3, seed: int = 0) -> Vector:
    """An adapter in which B is not zero, so that gradients reach A as well."""
    return (scale * np.random.default_rng(seed).standard_normal(lm.layout.num_parameters)).astype(np.float32)


def own_gradient(lm: LanguageModel, one: Example) -> torch.Tensor:
    """The gradient of an example's mean response loss by a backward pass of its own, through transformers' loss."""
    lm.flat_grad.zero_()
    masked_loss(lm, one).backward()  # type: ignore[no-untyped-call]
    return lm.flat_grad.clone()


def masked_loss(lm: LanguageModel, one: Example) -> torch.Tensor:
    ids = torch.tensor([one.prompt_ids + one.response_ids])
    labels = ids.clone()
    labels[0, : len(one.prompt_ids)] = -100
    loss: torch.Tensor = lm.model(input_ids=ids, labels=labels).loss
    return loss


def base_sha256(lm: LanguageModel) -> str:
    digest = hashlib.sha256()
    for parameter in lm.model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


# --- loss ---


def test_response_nll_is_the_loss_of_masked_labels(lm: LanguageModel) -> None:
    examples = some_examples(6)
    lm.set_adapter(some_adapter(lm))
    nll_B, count_B = response_nll(lm, examples)
    expected = [masked_loss(lm, one).item() * len(one.response_ids) for one in examples]
    np.testing.assert_allclose(nll_B.detach().numpy(), expected, rtol=1e-5)
    assert count_B.tolist() == [len(one.response_ids) for one in examples]


def test_mean_nll_does_not_depend_on_batches(lm: LanguageModel) -> None:
    examples = some_examples(7)
    lm.set_adapter(some_adapter(lm))
    alone = [mean_nll(lm, [one], batch_size=1)[0] for one in examples]
    for batch_size in (2, 3, 7):
        together = mean_nll(lm, examples, batch_size=batch_size)
        assert [count for _, count in together] == [count for _, count in alone]
        np.testing.assert_allclose([nll for nll, _ in together], [nll for nll, _ in alone], rtol=1e-5)


# --- batches and rates ---


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 99))
def test_batches_hold_each_index_once(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = grouped_batches(lengths, batch_size=batch_size, rng=np.random.default_rng(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) <= math.ceil(len(lengths) / batch_size) + len(lengths) // (batch_size * GROUPING_WINDOW)
    assert grouped_batches(lengths, batch_size=batch_size, rng=np.random.default_rng(seed)) == batches


def test_batches_waste_less_than_random_ones_and_come_in_random_order() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 0.8, size=400).astype(int) + 1
    batches = grouped_batches(lengths.tolist(), batch_size=8, rng=np.random.default_rng(1))
    shuffled = np.random.default_rng(1).permutation(400).reshape(-1, 8)

    def padded(parts: Sequence[Sequence[int]]) -> int:
        return int(sum(len(part) * max(lengths[i] for i in part) for part in parts))

    assert padded(batches) - lengths.sum() < 0.4 * (padded(shuffled.tolist()) - lengths.sum())
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4, "long batches come all first or all last"
    assert grouped_batches(lengths.tolist(), batch_size=8, rng=np.random.default_rng(2)) != batches


def test_scheduled_lr() -> None:
    rates = [scheduled_lr("cosine", lr=1.0, min_lr=0.2, round_index=r, num_rounds=4) for r in range(5)]
    np.testing.assert_allclose(rates, [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2])
    assert {scheduled_lr("constant", lr=0.3, min_lr=0.1, round_index=r, num_rounds=4) for r in range(4)} == {0.3}


# --- local training ---


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_lowers_the_loss_and_changes_every_lora_tensor_but_no_base_weight(lm: LanguageModel, optimizer: str) -> None:
    """From B = 0, A has no gradient in the first step; after two steps no LoRA tensor may be as it was."""
    examples, start, before = some_examples(8, length=6), initial_adapter(lm.layout, seed=0), base_sha256(lm)
    config = replace(LOCAL, optimizer=optimizer, lr=0.03 if optimizer == "adamw" else 10.0)
    two_steps, stats = train_adapter(lm, start, examples, settings=config, seed=0)
    assert stats.num_steps == 2
    for name, (first, last) in zip(lm.layout.names, lm.layout.spans(), strict=True):
        assert (two_steps[first:last] != start[first:last]).any(), f"{name} is frozen"
    trained, _ = train_adapter(lm, start, examples, settings=replace(config, num_epochs=40), seed=0)
    assert base_sha256(lm) == before

    def loss(adapter: Vector) -> float:
        lm.set_adapter(adapter)
        return sum(nll for nll, _ in mean_nll(lm, examples, batch_size=8))

    assert loss(trained) < 0.95 * loss(start)


@pytest.mark.parametrize(
    ("train", "options"),
    [
        (train_adapter, LOCAL),
        (train_private, replace(PRIVATE, noise_multiplier=1.0)),
        (train_literal, replace(PRIVATE, noise_multiplier=1.0)),
    ],
)
def test_the_seed_decides_the_bits(lm: LanguageModel, train: Train, options: object) -> None:
    examples, start = some_examples(9), some_adapter(lm)
    first = train(lm, start, examples, settings=options, seed=5)
    train(lm, some_adapter(lm, seed=9), some_examples(3, seed=4), settings=options, seed=77)  # what came before leaves no trace
    again = train(lm, start, examples, settings=options, seed=5)
    assert again[0].tobytes() == first[0].tobytes()
    assert again[1] == first[1]
    assert train(lm, start, examples, settings=options, seed=6)[0].tobytes() != first[0].tobytes()


@pytest.mark.parametrize(("train", "options"), [(train_adapter, LOCAL), (train_private, PRIVATE), (train_literal, PRIVATE)])
def test_an_empty_shard_gives_the_adapter_back(lm: LanguageModel, train: Train, options: object) -> None:
    start = some_adapter(lm)
    trained, stats = train(lm, start, [], settings=options, seed=0)
    assert trained.tobytes() == start.tobytes()
    assert (stats.num_tokens, stats.num_steps, stats.loss) == (0, 0, None)  # type: ignore[attr-defined]


def test_stats_are_of_what_was_trained_on(lm: LanguageModel) -> None:
    """With a learning rate of next to nothing the loss reported is the loss of the adapter that came in."""
    examples, start = some_examples(10), some_adapter(lm)
    _, stats = train_adapter(lm, start, examples, settings=replace(LOCAL, num_epochs=2, lr=1e-12, optimizer="sgd"), seed=0)
    assert stats.num_tokens == 2 * sum(one.num_tokens for one in examples)
    assert stats.num_steps == 6
    lm.set_adapter(start)
    measured = mean_nll(lm, examples, batch_size=4)
    assert stats.loss == pytest.approx(sum(nll for nll, _ in measured) / sum(count for _, count in measured), rel=1e-5)


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 6), (1, 1), (4, 4), (9, 6)])
def test_max_steps_bounds_the_steps(lm: LanguageModel, max_steps: int, expected: int) -> None:
    config = replace(LOCAL, num_epochs=2, max_steps=max_steps)
    assert train_adapter(lm, some_adapter(lm), some_examples(10), settings=config, seed=0)[1].num_steps == expected


def test_a_step_is_the_gradient_clipped_to_max_grad_norm(lm: LanguageModel) -> None:
    examples, start = some_examples(4, length=5), some_adapter(lm)
    lm.set_adapter(start)
    gradient = torch.stack([own_gradient(lm, one) for one in examples]).mean(dim=0).numpy()
    norm = float(np.linalg.norm(gradient))
    sgd = replace(LOCAL, optimizer="sgd", lr=0.5)
    for bound, factor in ((0.0, 1.0), (10 * norm, 1.0), (norm / 3, 1 / 3)):
        trained, _ = train_adapter(lm, start, examples, settings=replace(sgd, max_grad_norm=bound), seed=0)
        np.testing.assert_allclose(trained - start, -0.5 * factor * gradient, rtol=1e-3, atol=1e-6)


def test_prox_term_pulls_towards_the_anchor_and_zero_is_none(lm: LanguageModel) -> None:
    examples, start = some_examples(8), some_adapter(lm)
    config = replace(LOCAL, num_epochs=5, optimizer="sgd", lr=0.1, max_grad_norm=0.0)
    free, weak, strong = (train_adapter(lm, start, examples, settings=replace(config, prox_mu=mu), seed=0)[0] for mu in (0.0, 1.0, 8.0))
    distances = [float(np.linalg.norm(adapter - start)) for adapter in (free, weak, strong)]
    assert distances[0] > 1.1 * distances[1] > 1.1**2 * distances[2] > 0


def test_prox_term_is_mu_times_the_distance(lm: LanguageModel) -> None:
    """Two SGD steps on one batch by hand: the second adds mu (w - w0) to the gradient."""
    examples, start, lr, mu = some_examples(4, length=5), some_adapter(lm), 0.1, 3.0
    at = start
    for _ in range(2):
        lm.set_adapter(at)
        gradient = torch.stack([own_gradient(lm, one) for one in examples]).mean(dim=0).numpy()
        at = at - lr * (gradient + mu * (at - start))
    config = replace(LOCAL, num_epochs=2, optimizer="sgd", lr=lr, max_grad_norm=0.0, prox_mu=mu)
    np.testing.assert_allclose(train_adapter(lm, start, examples, settings=config, seed=0)[0], at, rtol=1e-4, atol=1e-6)


def test_dropout_is_seeded_and_the_callers_generator_is_left_alone() -> None:
    lm = build(dropout=0.5)
    examples, start = some_examples(8), some_adapter(lm)
    torch.manual_seed(0)
    first, _ = train_adapter(lm, start, examples, settings=LOCAL, seed=1)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after), "training drew from the caller's generator"
    torch.manual_seed(99)
    again, _ = train_adapter(lm, start, examples, settings=LOCAL, seed=1)
    assert again.tobytes() == first.tobytes()
    without, _ = train_adapter(build(), start, examples, settings=LOCAL, seed=1)
    assert without.tobytes() != first.tobytes(), "dropout makes no difference"
    assert not lm.model.training


def test_a_diverged_training_reports_no_loss(lm: LanguageModel) -> None:
    start = np.full(lm.layout.num_parameters, np.inf, dtype=np.float32)
    trained, stats = train_adapter(lm, start, some_examples(3), settings=LOCAL, seed=0)
    assert not np.isfinite(trained).all()
    assert stats.loss is None
    assert train_literal(lm, start, some_examples(3), settings=PRIVATE, seed=0)[1].loss is None


# --- per-example clipping ---


def clipped_by_hand(lm: LanguageModel, examples: Sequence[Example], clip_norm: float) -> tuple[torch.Tensor, list[float]]:
    gradients = [own_gradient(lm, one).double() for one in examples]
    norms = [float(gradient.norm()) for gradient in gradients]
    return sum((g * min(1.0, clip_norm / norm) for g, norm in zip(gradients, norms, strict=True)), torch.zeros(())), norms


@pytest.mark.parametrize("clip_norm", [0.05, 0.5, 1e6])
def test_clipped_sum_equals_each_examples_own_backward_pass(lm: LanguageModel, clip_norm: float) -> None:
    examples = some_examples(7)
    lm.set_adapter(some_adapter(lm))
    expected, norms = clipped_by_hand(lm, examples, clip_norm)
    total, found, losses = clipped_gradient_sum(lm, examples, clip_norm=clip_norm, max_batch=3)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6 * max(1.0, float(expected.norm())))
    np.testing.assert_allclose(found, norms, rtol=1e-4)
    np.testing.assert_allclose(losses, [masked_loss(lm, one).item() for one in examples], rtol=1e-5)


def test_clipped_sum_equals_opacus() -> None:
    """Per-example gradients by another library, from hooks of its own, on the same adapted model."""
    lm, reference = build(), build()
    examples = some_examples(6, length=7)
    for one in (lm, reference):
        one.set_adapter(some_adapter(lm))
    model = GradSampleModule(reference.model, strict=False, loss_reduction="sum")
    ids = torch.tensor([one.prompt_ids + one.response_ids for one in examples])
    # Positions given explicitly: opacus takes the first dimension of every input for the batch.
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    scores = model(input_ids=ids, position_ids=positions).logits[:, 6:-1]
    nll = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), ids[:, 7:].reshape(-1), reduction="none")
    (nll.reshape(len(ids), -1).mean(dim=1)).sum().backward()
    named = {name.replace(".default.", "."): p for name, p in reference.model.named_parameters() if p.requires_grad}
    rows = torch.cat([named[name].grad_sample.reshape(len(ids), -1) for name in lm.layout.names], dim=1)  # type: ignore[attr-defined]
    norms = rows.norm(dim=1)
    clip_norm = float(norms.median())
    expected = (rows * (clip_norm / norms).clamp(max=1.0)[:, None]).sum(dim=0)
    total, found, _ = clipped_gradient_sum(lm, examples, clip_norm=clip_norm, max_batch=6)
    torch.testing.assert_close(total.float(), expected, rtol=1e-5, atol=1e-5)
    assert float((total - expected).norm()) <= 1e-5 * float(expected.norm())
    np.testing.assert_allclose(found, norms.tolist(), rtol=1e-5)


def test_the_split_changes_the_last_bits_only(lm: LanguageModel) -> None:
    examples = some_examples(9)
    lm.set_adapter(some_adapter(lm))
    whole, norms, _ = clipped_gradient_sum(lm, examples, clip_norm=0.3, max_batch=9)
    for max_batch in (1, 2, 4):
        total, found, _ = clipped_gradient_sum(lm, examples, clip_norm=0.3, max_batch=max_batch)
        torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found, norms, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.floats(1e-6, 1e3), st.sampled_from([1e-3, 0.3, 30.0]), st.integers(0, 99))
def test_one_example_moves_the_sum_by_at_most_the_bound(count: int, clip_norm: float, scale: float, seed: int) -> None:
    lm = MODEL
    examples = some_examples(count, seed=seed)
    lm.set_adapter(some_adapter(lm, scale=scale, seed=seed))
    alone, [norm], _ = clipped_gradient_sum(lm, examples[:1], clip_norm=clip_norm, max_batch=1)
    assert float(alone.norm()) <= clip_norm
    assert float(alone.norm()) >= min(norm, clip_norm) * (1 - 1e-9), "clipped further than the bound asks"
    total, _, _ = clipped_gradient_sum(lm, examples, clip_norm=clip_norm, max_batch=1)
    for left_out in range(count):
        others = examples[:left_out] + examples[left_out + 1 :]
        without, _, _ = clipped_gradient_sum(lm, others, clip_norm=clip_norm, max_batch=1)
        assert float((total - without).norm()) <= clip_norm * (1 + 1e-9)


MODEL = build()


@pytest.mark.parametrize("clip_norm", [1e-6, 1.0])
def test_the_bound_holds_for_huge_gradients(clip_norm: float) -> None:
    """B of 1e33 with A near zero: gradients of A near the end of float32, whose scale is below its smallest normal number."""
    lm = build(targets=("down_proj",))
    adapter = np.where(lm.layout.group_mask("B"), np.float32(1e34), np.float32(0)) * np.random.default_rng(0).choice(
        [-1, 1], lm.layout.num_parameters
    ).astype(np.float32)
    lm.set_adapter(adapter)
    for one in some_examples(4):
        total, norms, _ = clipped_gradient_sum(lm, [one], clip_norm=clip_norm, max_batch=1)
        assert norms
        assert norms[0] > 1e30
        assert clip_norm * (1 - 1e-9) <= float(total.norm()) <= clip_norm


def test_a_non_finite_example_contributes_nothing() -> None:
    """A token whose embedding is not a number: its example is left out, the others are as without it."""
    base = load_base_model("tiny")
    table = base.tensors["model.embed_tokens.weight"]
    poisoned = table.copy()
    poisoned[7] = np.nan
    tensors = base.tensors | {"model.embed_tokens.weight": poisoned, "lm_head.weight": table}
    untied = replace(base, tensors=tensors, config=base.config | {"tie_word_embeddings": False})
    lm = build_language_model(untied, rank=2, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    lm.set_adapter(some_adapter(lm))
    rng = np.random.default_rng(0)
    good = [example(rng.integers(8, 261, 6).tolist(), rng.integers(8, 261, 4).tolist()) for _ in range(3)]
    bad = replace(good[0], prompt_ids=(9, 7, 9))
    expected, norms, losses = clipped_gradient_sum(lm, good, clip_norm=0.2, max_batch=4)
    assert expected.any()
    total, found, kept_losses = clipped_gradient_sum(lm, [good[0], bad, *good[1:]], clip_norm=0.2, max_batch=4)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found, norms, rtol=1e-5)
    np.testing.assert_allclose(kept_losses, losses, rtol=1e-5)
    trained, stats = train_private(lm, some_adapter(lm), [bad], settings=replace(PRIVATE, sampling_prob=1.0), seed=0)
    assert trained.tobytes() == some_adapter(lm).tobytes()
    assert (stats.loss, stats.clip_fraction) == (None, None)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_a_bound_that_is_none_is_refused(lm: LanguageModel, clip_norm: float) -> None:
    with pytest.raises(ValueError, match=r"privacy\.clip_norm=.* must be greater than 0"):
        clipped_gradient_sum(lm, some_examples(1), clip_norm=clip_norm, max_batch=1)


# --- private training ---


def test_private_step_is_the_clipped_sum_over_the_fixed_batch_size(lm: LanguageModel) -> None:
    """Without noise: Poisson batches as drawn, each step the clipped sum over B, whatever the batch's realised size."""
    examples, at, seed = some_examples(12), some_adapter(lm), 3
    config = replace(PRIVATE, num_steps=3, lr=0.7, clip_norm=0.2)
    trained, stats = train_private(lm, at, examples, settings=config, seed=seed)
    sizes = []
    for step in range(3):
        drawn = [one for one, u in zip(examples, numpy_rng(seed, "poisson", step).random(12), strict=True) if u < 0.5]
        sizes.append(len(drawn))
        lm.set_adapter(at)
        total, _ = clipped_by_hand(lm, drawn, 0.2)
        at = (at - 0.7 * total.numpy() / config.batch_size).astype(np.float32)
    assert len(set(sizes)) > 1, "the batches are not Poisson"
    np.testing.assert_allclose(trained, at, rtol=1e-4, atol=1e-6)
    assert stats.num_steps == 3


def noise_of_a_step(train: Train, lm: LanguageModel, config: PrivateSettings) -> Vector:
    """What a step of SGD at rate 1 adds to the adapter beyond the step of the same seed without noise, sign turned."""
    examples, start = some_examples(3), some_adapter(lm)
    noised, plain = (
        train(lm, start, examples, settings=replace(config, noise_multiplier=z), seed=2)[0] for z in (config.noise_multiplier, 0.0)
    )
    return plain - noised


@pytest.mark.parametrize(("train", "divisor"), [(train_private, 5), (train_literal, 1)])
def test_noise_has_the_stated_scale(train: Train, divisor: int) -> None:
    """z C / B on the mean gradient in `example`, z C on the gradient in `literal`; two thirds and three halves of it are refused."""
    lm = build(targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    config = replace(PRIVATE, num_steps=1, batch_size=5, lr=1.0, clip_norm=3.0, noise_multiplier=1.7)
    noise = noise_of_a_step(train, lm, config)
    std = 1.7 * 3.0 / divisor
    assert kstest(noise, "norm", args=(0, std)).pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert kstest(noise, "norm", args=(0, wrong * std)).pvalue < 1e-6


def test_every_private_step_draws_noise_of_its_own(lm: LanguageModel) -> None:
    config = replace(PRIVATE, num_steps=2, sampling_prob=0.0, noise_multiplier=1.0, lr=1.0)
    start = np.zeros(lm.layout.num_parameters, dtype=np.float32)
    trained, stats = train_private(lm, start, some_examples(2), settings=config, seed=4)
    draws = [gaussian(len(start), std=1.0, seed=seed_for(4, "noise", step), secure=False) for step in range(2)]
    np.testing.assert_allclose(trained, -(draws[0] + draws[1]) / 4, rtol=1e-4, atol=1e-6)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.1
    assert (stats.num_tokens, stats.loss, stats.clip_fraction) == (0, None, None)


def test_secure_noise_does_not_repeat(lm: LanguageModel) -> None:
    config = replace(PRIVATE, noise_multiplier=1.0, secure_noise=True)
    first, second = (train_private(lm, some_adapter(lm), some_examples(2), settings=config, seed=4)[0] for _ in range(2))
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_literal_step_clips_the_groups_separately(lm: LanguageModel, clip_norm: float) -> None:
    examples, start = some_examples(4, length=5), some_adapter(lm)
    config = replace(PRIVATE, batch_size=4, lr=0.3, clip_norm=clip_norm, optimizer="adamw")
    trained, stats = train_literal(lm, start, examples, settings=config, seed=0)
    lm.set_adapter(start)
    gradient = torch.stack([own_gradient(lm, one) for one in examples]).mean(dim=0).double().numpy()
    for group in ("A", "B"):
        mask = lm.layout.group_mask(group)
        expected = gradient[mask] * min(1.0, clip_norm / np.linalg.norm(gradient[mask]))
        np.testing.assert_allclose((start - trained)[mask] / 0.3, expected, rtol=1e-3, atol=2e-6)
    assert stats.clip_fraction == (1.0 if clip_norm < 1 else 0.0)
    assert stats.num_steps == 1


def test_literal_batch_is_drawn_without_replacement_from_the_shard(lm: LanguageModel) -> None:
    examples = [example([10 + i] * 4, [20] * (2**i)) for i in range(5)]
    seen = set()
    for seed in range(12):
        _, stats = train_literal(lm, some_adapter(lm), examples, settings=replace(PRIVATE, batch_size=3), seed=seed)
        lengths = stats.num_tokens - 12  # the responses' lengths are powers of two: their sum says which were drawn
        assert bin(lengths).count("1") == 3
        seen.add(lengths)
    assert len(seen) > 3
