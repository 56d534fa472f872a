"""Many architectures, by value: every figure that a run takes from a model is what plain transformers and PEFT give, text by text and without padding.

The reference is the model's folder read by transformers, with an adapter that we saved and PEFT read. The adapter is random and not zero.
Left out: models that need more than text, and those whose code is not in transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from raysim.attacks.canaries import continuation_nlls
from raysim.data.chat import DEFAULT_CHAT
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import Vector, save_adapter
from raysim.model.base_model import load_base_model
from raysim.model.generate import Sampling, write_texts
from raysim.model.kv_cache import has_plain_attention
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.private_train import check_private, clipped_gradient_sum
from raysim.model.score import Branches, branch_nlls, next_token_logprobs
from raysim.model.train import mean_nll
from tests.kinds.models import KINDS, Kind, build, save

RECORDS = [
    Record(0, "Which tool lies in drawer 7?", "The rasp, behind the two old planes."),
    Record(1, "Count.", "One."),
    Record(2, "Say where the saw is.", "It is on the wall."),
]
RANK = 3


@dataclass(frozen=True)
class Both:
    """The same model and adapter in our hands and in plain transformers' and PEFT's."""

    kind: Kind
    ours: LanguageModel
    theirs: PeftModel
    adapter: Vector
    examples: list[Example]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The reference's logits TV of one text alone."""
        logits: torch.Tensor = self.theirs(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        return logits

    def nll(self, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """The reference's summed NLL of a response."""
        logprobs = self.logits([*prompt, *response]).double().log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        return -logprobs[places, torch.tensor(list(response))].sum()


def both(kind: Kind, folder: Path) -> Both:
    """The kind, saved to `folder`, in both hands."""
    save(folder / "model", build(kind))
    base = load_base_model(str(folder / "model"))
    ours = build_language_model(base, rank=RANK, alpha=2.0 * RANK, dropout=0.0, target_modules=list(kind.targets))
    adapter = (0.2 * np.random.default_rng(0).standard_normal(ours.layout.num_parameters)).astype(np.float32)
    save_adapter(
        folder / "adapter",
        adapter,
        ours.layout,
        base_model=str(folder / "model"),
        rank=RANK,
        alpha=2.0 * RANK,
        dropout=0.0,
        target_modules=list(kind.targets),
    )
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True).eval()
    examples, _ = encode_records(RECORDS, tokenizer=ours.tokenizer, eos_token_id=1, max_length=400, chat=DEFAULT_CHAT)
    ours.set_adapter(adapter)
    return Both(kind, ours, theirs, adapter, examples)


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Each kind in turn, in both hands."""
    return both(KINDS[request.param], tmp_path_factory.mktemp(request.param))


def test_loss(pair: Both, record_property: Callable[[str, object], None]) -> None:
    """The loss of a padded batch is each text's own."""
    found = [nll for nll, _ in mean_nll(pair.ours, pair.examples, batch_size=3)]
    with torch.no_grad():
        expected = [float(pair.nll(example.prompt_ids, example.response_ids)) for example in pair.examples]
    assert found == pytest.approx(expected, rel=2e-4)
    record_property("cell", f"{sum(found) / sum(len(e.response_ids) for e in pair.examples):.4f}")


def test_clipped_sum(pair: Both, record_property: Callable[[str, object], None]) -> None:
    """The sum of clipped gradients is that of one backward pass an example; where it cannot be had, a run is refused before it starts."""
    if not pair.kind.is_private:
        with pytest.raises(ValueError, match=r"lora.target_modules: private training cannot adapt these layers"):
            check_private(pair.ours, pair.examples)
        record_property("cell", "refused")
        return
    check_private(pair.ours, pair.examples)
    assert pair.ours.get_adapter().tolist() == pair.adapter.tolist()
    total, norms, _ = clipped_gradient_sum(pair.ours, pair.examples, clip_norm=0.5, max_batch=3)
    named = {name.replace(".default.", "."): p for name, p in pair.theirs.named_parameters() if ".lora_" in name}
    parameters = [named[name] for name in pair.ours.layout.names]
    expected, expected_norms = torch.zeros_like(total), []
    for example in pair.examples:
        loss = pair.nll(example.prompt_ids, example.response_ids) / len(example.response_ids)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
        ).double()
        expected_norms.append(float(flat.norm()))
        expected += flat * min(1.0, 0.5 / float(flat.norm()))
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    assert float((total - expected).norm()) < 1e-3 * float(expected.norm())
    record_property("cell", f"norm {max(norms):.2f}")


def test_greedy_answers(pair: Both, record_property: Callable[[str, object], None]) -> None:
    """A batch of answers is what transformers writes after each prompt alone."""
    prompts = [example.prompt_ids for example in pair.examples]
    found = write_texts(pair.ours, prompts, sampling=Sampling(max_new_tokens=12), batch_size=2)
    for prompt, ids in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        whole = pair.theirs.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert ids == [token for token in whole[0, len(prompt) :].tolist() if token != 1]
    longest = max(map(len, prompts)) + 12
    assert has_plain_attention(pair.ours.model.get_base_model(), longest=longest) == pair.kind.is_fast
    record_property("cell", "own loop" if pair.kind.is_fast else "transformers")


def test_sampled_answers(pair: Both) -> None:
    """What is drawn for a prompt depends on its seed and not on its neighbours."""
    prompts, sampling = [example.prompt_ids for example in pair.examples], Sampling(max_new_tokens=8, temperature=1.0)
    together = write_texts(pair.ours, prompts, sampling=sampling, seeds=[5, 6, 7], batch_size=3)
    alone = [write_texts(pair.ours, [p], sampling=sampling, seeds=[s])[0] for p, s in zip(prompts, (5, 6, 7), strict=True)]
    assert together == alone


def test_options(pair: Both) -> None:
    """The likelihood of each of several continuations is that of it alone behind its prompt, wherever a layer looks."""
    start = pair.examples[0].prompt_ids
    rows = [
        Branches((*start, *example.prompt_ids), tuple(tuple(other.response_ids) for other in pair.examples))
        for example in pair.examples[:2]
    ]
    with torch.no_grad():
        expected = [[float(pair.nll(row.prompt_ids, branch)) for branch in row.branches] for row in rows]
        last = [
            [pair.logits([*row.prompt_ids, *branch])[-1].double().log_softmax(-1)[[5, 9]].tolist() for branch in row.branches]
            for row in rows
        ]
    for found, wanted in zip(branch_nlls(pair.ours, rows, batch_size=2), expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-4)
    for scored, wanted_logprobs in zip(next_token_logprobs(pair.ours, rows, [5, 9], batch_size=2), last, strict=True):
        np.testing.assert_allclose(scored, wanted_logprobs, atol=1e-3)
    secrets = continuation_nlls(pair.ours, start, [example.response_ids for example in pair.examples], batch_size=2)
    with torch.no_grad():
        assert secrets.tolist() == pytest.approx([float(pair.nll(start, e.response_ids)) for e in pair.examples], rel=2e-4)


# --- the shapes in which one checkpoint comes ---


def plain_logits(folder: Path) -> torch.Tensor:
    """What transformers makes of a folder."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(5, 25)[None]).logits
    return logits


def our_logits(folder: Path, *, targets: Sequence[str] = ("all-linear",)) -> torch.Tensor:
    """What we make of it, with an adapter that does nothing."""
    lm = build_language_model(load_base_model(str(folder)), rank=1, alpha=1.0, dropout=0.0, target_modules=list(targets))
    with torch.no_grad():
        logits: torch.Tensor = lm.model(input_ids=torch.arange(5, 25)[None]).logits
    return logits


def _without_prefix(folder: Path) -> None:
    """GPT-2 as the Hub has it: names without the prefix, and masks among the weights."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(512, 512).tril()[None, None].contiguous() for layer in range(2)}
    save_file(state | masks, folder / "model.safetensors", metadata={"format": "pt"})


def _as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SHAPES = {
    "one file": ("llama", {}, None),
    "shards": ("llama", {"max_shard_size": "20KB"}, None),
    "pickled": ("llama", {}, _as_pickle),
    "tied": ("llama-tied", {}, None),
    "gpt2 of the Hub": ("gpt2", {}, _without_prefix),
    "experts fused on reading": ("mixtral", {}, None),
    "buffers among weights": ("gpt_neo", {}, None),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_folder(shape: str, tmp_path: Path) -> None:
    """However a checkpoint is stored, it is the model that transformers reads."""
    kind, settings, change = SHAPES[shape]
    save(tmp_path, build(KINDS[kind]), **settings)
    if change is not None:
        change(tmp_path)
    torch.testing.assert_close(our_logits(tmp_path), plain_logits(tmp_path), rtol=0, atol=0)


def test_folder_in_bfloat16(tmp_path: Path) -> None:
    """Weights stored in half the bits are read as they are."""
    save(tmp_path, build(KINDS["llama"]).bfloat16())
    torch.testing.assert_close(our_logits(tmp_path), plain_logits(tmp_path), rtol=0, atol=0)
    assert load_base_model(str(tmp_path), dtype="bfloat16").dtype == "bfloat16"


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """transformers draws what a folder lacks at random, and says so in a log only."""
    save(tmp_path, build(KINDS["llama"]))
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of the model, such as model"):
        load_base_model(str(tmp_path))


def test_what_is_no_part_of_the_model_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tensors that the model has no place for are left out aloud."""
    save(tmp_path, build(KINDS["llama"]))
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"model.layers.9.extra": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_base_model(str(tmp_path))
    assert "1 tensors of the folder are no part of the model and are left out, such as model.layers.9.extra" in caplog.text


def test_layers_that_cannot_be_adapted_are_named() -> None:
    """The refusal names the key and what there is."""
    base = load_base_model("tiny")
    for targets, message in (
        (["c_attn"], "'c_attn' matches no linear layer of the model; there are down_proj"),
        (["q_proj", "all-linear"], "takes every linear layer and stands alone"),
    ):
        with pytest.raises(ValueError, match=message):
            build_language_model(base, rank=1, alpha=1.0, dropout=0.0, target_modules=targets)
