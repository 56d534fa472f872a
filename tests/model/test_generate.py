"""Batched generation: a batch gives what each prompt alone gives, and the draws have the right distribution."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from raysim.model.generate import Sampling, drawn_log_probs, drawn_logits, generate
from raysim.model.kv_cache import BLOCK_COLUMNS, has_plain_attention

VOCAB = 300
PAD, EOS = 0, 1
GREEDY = Sampling(max_new_tokens=90)
SAMPLED = Sampling(max_new_tokens=90, temperature=0.8, repetition_penalty=1.15)
# Several tokens end a row, so that rows of a random model end at very different lengths.
END = (1, 2, 3)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).float()


def random_prompts(num_prompts: int, *, longest: int = 80, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(11, VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(num_prompts)]


def run(
    model: LlamaForCausalLM | PeftModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end: Sequence[int] = END,
    **options: object,
) -> list[list[int]]:
    return generate(model, prompts, sampling=sampling, eos_token_ids=end, pad_token_id=PAD, **options)


def by_forward_passes(model: LlamaForCausalLM, prompt: list[int], *, num_tokens: int, end: Sequence[int]) -> list[int]:
    """Greedy decoding in its plainest form: the whole text through the model for each token, no cache, no padding."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            token = int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
            if token in end:
                break
            text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(90, temperature=1.0)], ids=["greedy", "nucleus", "sampled"])
@pytest.mark.parametrize("batch_size", [3, 8, 32])
def test_a_batch_gives_what_each_prompt_alone_gives(model: LlamaForCausalLM, sampling: Sampling, batch_size: int) -> None:
    prompts = random_prompts(21)
    for root in (0, 1000):
        seeds = [root + index for index in range(len(prompts))]
        alone = [run(model, [prompt], sampling, seeds=[seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        assert run(model, prompts, sampling, seeds=seeds, batch_size=batch_size) == alone
        lengths = {len(tokens) for tokens in alone}
        assert len(lengths) > 5
        assert max(lengths) > BLOCK_COLUMNS, "no row outlived a block of the cache"


@pytest.mark.parametrize("shortest", [0, 1, 5])
def test_a_shared_beginning_changes_nothing(model: LlamaForCausalLM, shortest: int) -> None:
    """Prompts that share a beginning, one of them nothing else, and copies of one prompt."""
    shared = random_prompts(1, longest=60, seed=14)[0] + [50] * 20
    tails = random_prompts(9, longest=50, seed=15)
    prompts = [shared + tail for tail in [tails[0][:shortest], *tails[1:]]]
    prompts += [prompts[3], prompts[3]]
    expected = [by_forward_passes(model, prompt, num_tokens=30, end=END) for prompt in prompts]
    assert run(model, prompts, Sampling(30), batch_size=6) == expected
    assert run(model, [prompts[3]] * 3, Sampling(30)) == [expected[3]] * 3


def test_greedy_equals_decoding_without_cache_and_padding(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(12, seed=3)
    expected = [by_forward_passes(model, prompt, num_tokens=90, end=END) for prompt in prompts]
    assert run(model, prompts, GREEDY, batch_size=5) == expected


def test_many_refills_with_one_very_long_row() -> None:
    model = tiny_llama(max_position_embeddings=2048)
    prompts = random_prompts(40, longest=30, seed=5)
    sampling = Sampling(max_new_tokens=400, temperature=1.0)
    end = range(1, 5)
    seeds = list(range(len(prompts)))
    alone = [run(model, [prompt], sampling, end=end, seeds=[seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert max(map(len, alone)) > 3 * BLOCK_COLUMNS
    assert run(model, prompts, sampling, end=end, seeds=seeds, batch_size=4) == alone


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate(model: LlamaForCausalLM, penalty: float) -> None:
    prompts = random_prompts(8, seed=2)
    got = run(model, prompts, Sampling(60, repetition_penalty=penalty), batch_size=8)
    for prompt, tokens in zip(prompts, got, strict=True):
        processors = [] if penalty == 1 else [RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(prompt))]
        text = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=60,
            eos_token_id=list(END),
            pad_token_id=PAD,
            logits_processor=processors,
        )
        expected = text[0, len(prompt) :].tolist()
        assert tokens == (expected[:-1] if expected[-1] in END else expected)


def test_the_repetition_penalty_counts_produced_tokens_only(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(12, seed=4)
    plain = run(model, prompts, Sampling(40), end=[])
    penalised = run(model, prompts, Sampling(40, repetition_penalty=1.5), end=[])
    assert penalised != plain
    first_repeats = [next((i for i, token in enumerate(row) if token in row[:i]), len(row)) for row in plain]
    for before, after, first in zip(plain, penalised, first_repeats, strict=True):
        assert after[:first] == before[:first]
    over_prompt_too = RepetitionPenaltyLogitsProcessor(1.5)
    with_prompt = [
        model.generate(
            torch.tensor([p]), do_sample=False, max_new_tokens=1, eos_token_id=[], pad_token_id=PAD, logits_processor=[over_prompt_too]
        )[0, -1].item()
        for p in [prompt + [row[0]] * 2 for prompt, row in zip(prompts, plain, strict=True)]
    ]
    ours = [
        row[0]
        for row in run(
            model, [prompt + [row[0]] * 2 for prompt, row in zip(prompts, plain, strict=True)], Sampling(1, repetition_penalty=1.5), end=[]
        )
    ]
    assert ours != with_prompt, "the prompts do not tell the two meanings of the penalty apart"


def test_results_come_in_the_order_of_the_prompts(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(9, seed=6)
    order = random.Random(1).sample(range(9), 9)
    straight = run(model, prompts, SAMPLED, seeds=list(range(9)), batch_size=4)
    shuffled = run(model, [prompts[i] for i in order], SAMPLED, seeds=order, batch_size=4)
    assert shuffled == [straight[i] for i in order]
    assert len({tuple(tokens) for tokens in straight}) > 5


def test_an_end_token_ends_a_row_and_is_not_returned(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(10, seed=8)
    free = run(model, prompts, Sampling(30), end=[])
    assert all(len(tokens) == 30 for tokens in free)
    ending = free[0][4]
    cut = [tokens[: tokens.index(ending)] if ending in tokens else tokens for tokens in free]
    assert run(model, prompts, Sampling(30), end=[ending]) == cut
    assert run(model, prompts, Sampling(30, stop_token_ids=(ending,)), end=[]) == cut
    assert run(model, prompts[:1], Sampling(30), end=[free[0][0]]) == [[]]


def test_the_padding_token_does_not_matter(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(10, seed=9)
    results = [generate(model, prompts, sampling=GREEDY, eos_token_ids=END, pad_token_id=pad) for pad in (0, EOS, 250)]
    assert results[0] == results[1] == results[2]


def test_a_larger_bound_only_continues_a_sample(model: LlamaForCausalLM) -> None:
    prompts = random_prompts(6, seed=10)
    short = run(model, prompts, Sampling(10, temperature=1.0), seeds=range(6))
    long = run(model, prompts, Sampling(40, temperature=1.0), seeds=range(6))
    assert [tokens[:10] for tokens in long] == short


def test_seeds_decide_a_sample_and_nothing_else_does(model: LlamaForCausalLM) -> None:
    prompt = random_prompts(1, seed=11)[0]
    sampling = Sampling(20, temperature=1.0)
    rows = run(model, [prompt] * 30, sampling, end=[], seeds=[*range(15), *range(15)])
    assert rows[:15] == rows[15:]
    assert len({tuple(row) for row in rows}) == 15
    torch.manual_seed(123)
    assert run(model, [prompt] * 30, sampling, end=[], seeds=[*range(15), *range(15)]) == rows


def chi_square_p(tokens: Sequence[int], probs: torch.Tensor) -> float:
    """The p-value of the tokens under `probs`, rare tokens pooled so that every cell expects at least five."""
    expected = probs.double().numpy() / probs.double().sum().item() * len(tokens)
    counts = np.bincount(np.asarray(tokens), minlength=len(expected)).astype(float)
    common = expected >= 5
    observed_cells = np.append(counts[common], counts[~common].sum())
    expected_cells = np.append(expected[common], expected[~common].sum())
    keep = expected_cells > 0
    assert observed_cells[~keep].sum() == 0
    return float(stats.chisquare(observed_cells[keep], expected_cells[keep]).pvalue)


@pytest.fixture(scope="module")
def next_logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([[20, 30, 40]])).logits[0, -1]
    return logits


def test_samples_follow_the_softmax_of_the_temperature(model: LlamaForCausalLM, next_logits: torch.Tensor) -> None:
    rows = run(model, [[20, 30, 40]] * 4000, Sampling(1, temperature=1.5), end=[], seeds=range(4000), batch_size=256)
    tokens = [row[0] for row in rows]
    assert chi_square_p(tokens, (next_logits / 1.5).softmax(-1)) > 1e-3
    for wrong in (1.0, 1.25, 2.0):
        assert chi_square_p(tokens, (next_logits / wrong).softmax(-1)) < 1e-6


def test_samples_are_drawn_among_the_top_k(model: LlamaForCausalLM, next_logits: torch.Tensor) -> None:
    sampling = Sampling(1, temperature=1.5, top_k=5)
    tokens = [row[0] for row in run(model, [[20, 30, 40]] * 2000, sampling, end=[], seeds=range(2000), batch_size=256)]
    for top_k, agrees in ((5, True), (4, False), (7, False)):
        kept = TopKLogitsWarper(top_k)(torch.tensor([[20, 30, 40]]), next_logits[None] / 1.5)[0].softmax(-1)
        within = [token for token in tokens if kept[token] > 0]
        assert (len(within) == len(tokens) and chi_square_p(within, kept) > 1e-3) == agrees


def test_all_that_tie_with_the_last_of_the_top_k_may_be_drawn() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    drawn = drawn_logits(logits_BV, temperature=2.0, top_k=2)
    assert torch.equal(drawn.isfinite(), torch.tensor([[False, True, True, True, False, True], [True, True, False, False, False, False]]))
    assert torch.equal(drawn[drawn.isfinite()], torch.tensor([1.5, 1.0, 1.0, 1.0, 2.5, 2.0]))
    for top_k in (0, 6, 7):
        assert torch.equal(drawn_logits(logits_BV, temperature=2.0, top_k=top_k), logits_BV / 2.0)
    log_probs = drawn_log_probs(logits_BV, torch.tensor([2, 4]), temperature=2.0, top_k=2)
    assert log_probs.tolist() == [pytest.approx(-math.log(3 + math.exp(0.5))), -math.inf]


def test_at_temperature_0_the_first_of_the_largest_is_drawn_surely() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0], [5.0, 4.0, 3.0]])
    for top_k in (0, 2):
        chances = [drawn_log_probs(logits_BV, torch.full((2,), token), temperature=0.0, top_k=top_k).tolist() for token in range(3)]
        assert chances == [[-math.inf, 0.0], [0.0, -math.inf], [-math.inf, -math.inf]]


def lora_model(model: LlamaForCausalLM) -> PeftModel:
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return adapted


def test_a_lora_adapter_takes_part() -> None:
    prompts = random_prompts(9, seed=12)
    base = run(tiny_llama(), prompts, GREEDY)
    adapted = lora_model(tiny_llama())
    got = run(adapted, prompts, GREEDY, batch_size=4)
    assert got == [run(adapted, [prompt], GREEDY)[0] for prompt in prompts]
    assert got == run(adapted.merge_and_unload(), prompts, GREEDY)
    assert got != base


def test_modes_gradients_and_weights_are_left_as_they_were() -> None:
    model = lora_model(tiny_llama())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run(model, random_prompts(3), Sampling(5))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model(input_ids=torch.tensor([[20, 30]]), labels=torch.tensor([[20, 30]])).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_modes_are_restored_after_an_error() -> None:
    model = tiny_llama()
    model.train()
    with pytest.raises(IndexError):
        run(model, [[VOCAB + 1]], Sampling(5))
    assert model.training


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_weights_in_read_only_memory_will_do(tmp_path: Path) -> None:
    model = tiny_llama()
    expected = run(model, random_prompts(4), Sampling(20))
    for index, parameter in enumerate(model.parameters()):
        np.save(tmp_path / f"{index}.npy", parameter.detach().numpy())
        # Pages mapped read-only: a write to a weight ends the process.
        parameter.data = torch.from_numpy(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    assert run(model, random_prompts(4), Sampling(20)) == expected


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_follows_transformers_for_a_prompt_alone(weights: torch.dtype) -> None:
    model = tiny_llama().to(weights)
    prompts = random_prompts(4, seed=13)
    got = [run(model, [prompt], Sampling(3), end=[], autocast_dtype=torch.bfloat16)[0] for prompt in prompts]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [
            model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=3, eos_token_id=[], pad_token_id=PAD)[0, len(p) :].tolist()
            for p in prompts
        ]
    assert got == expected


def test_no_prompts_no_rows(model: LlamaForCausalLM) -> None:
    assert run(model, [], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], r"prompts\[0\] is empty"),
        ([[3], []], r"prompts\[1\] is empty"),
        (
            [[3], [3] * 167],
            r"prompts\[1\] has 167 tokens but at most 166 fit.*max_position_embeddings=256 and max_new_tokens=90",
        ),
    ],
)
def test_bad_prompts_are_refused(model: LlamaForCausalLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, prompts, GREEDY)


@pytest.mark.parametrize(("prompts", "options"), [([[3]], {}), ([[3], [4]], {"seeds": [1]}), ([[3]], {"seeds": [1], "batch_size": 0})])
def test_sampling_needs_a_seed_for_each_prompt_and_a_batch(
    model: LlamaForCausalLM, prompts: list[list[int]], options: dict[str, object]
) -> None:
    with pytest.raises(AssertionError):
        run(model, prompts, SAMPLED, **options)


def test_a_prompt_may_fill_the_context_exactly(model: LlamaForCausalLM) -> None:
    assert len(run(model, [[30] * 166], GREEDY, end=[])[0]) == 90


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature=-0.1"),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 1, "repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_new_tokens": 1, "top_k": -1}, "top_k=-1"),
    ],
)
def test_bad_sampling_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("window", [8, 64])
def test_windows_give_what_transformers_gives(window: int) -> None:
    """A window shorter than the text is the library's to answer, a longer one is ours."""
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        initializer_range=0.5,
    )
    model = MistralForCausalLM(config).eval()
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]
    assert has_plain_attention(model, longest=10 + 12) == (window == 64)
    for prompt, found in zip(prompts, run(model, prompts, Sampling(12)), strict=True):
        tokens = torch.tensor([prompt])
        expected = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(END),
            pad_token_id=PAD,
        )
        assert found == [token for token in expected[0, len(prompt) :].tolist() if token not in END]
