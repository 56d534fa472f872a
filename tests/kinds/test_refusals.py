"""What a model or a template cannot do is refused before any work, in one line, whatever a run would have come to only at its end."""

from dataclasses import replace
from pathlib import Path

import pytest

from raysim.config import load
from raysim.runs.run import run
from tests.kinds.models import KINDS, LLAMA, Kind, build
from tests.kinds.tokenizers import SHAPES, make

SMALL = [
    "data.num_train=6",
    "data.num_heldout=3",
    "data.max_length=400",
    "data.source=general",
    "partition.num_clients=2",
    "lora.rank=2",
    "server.num_rounds=1",
    "train.dtype=float32",
    "evaluate.num_generated=1",
    "evaluate.max_new_tokens=2",
    "evaluate.every=0",
    "attack.num_examples=1",
    "dplora.batch_size=2",
    "dplora.num_steps=1",
    "resources.backend=local",
]
WRITING = ["method.name=fedpit", "fedpit.max_instruction_tokens=8", "fedpit.max_response_tokens=8"]
PRIVATE_WRITING = [*WRITING, "privacy.unit=example", "fedpit.scorer=none", "privacy.delta=1e-3"]
LONG = Kind("llama", LLAMA | {"max_position_embeddings": 2048})
GPT2 = KINDS["gpt2"]

# name -> (model, tokenizer, overrides, what the line says)
REFUSED: dict[str, tuple[Kind, str, list[str], str]] = {
    "layers that the model has not": (
        LONG,
        "turns",
        ["lora.target_modules=[c_attn]"],
        r"^lora\.target_modules: 'c_attn' matches no linear layer",
    ),
    "experts under privacy": (
        KINDS["mixtral"],
        "turns",
        ["method.name=dplora", "lora.target_modules=[all-linear]"],
        r"^lora\.target_modules: private training cannot adapt these layers",
    ),
    "private writing with a window": (
        KINDS["gemma3_text"],
        "turns",
        PRIVATE_WRITING,
        r"^model\.name: private self-generation .* needs full attention over",
    ),
    "writing more than the context": (
        KINDS["llama"],
        "turns",
        ["method.name=fedpit", "fedpit.max_instruction_tokens=300", "fedpit.max_response_tokens=300"],
        r"^fedpit\.max_instruction_tokens=300 with fedpit\.max_response_tokens=300 .* more than the model's context of 512",
    ),
    "inversion where positions enter": (
        KINDS["opt"],
        "turns",
        ["audit.inversion=true"],
        r"^audit\.inversion=true: model\.name: the position enters the first layer's input",
    ),
    "inversion without projections": (
        GPT2,
        "turns",
        ["audit.inversion=true", "lora.target_modules=[c_attn]"],
        r"^audit\.inversion=true: lora\.target_modules: the attack needs q_proj",
    ),
    "records longer than the context": (
        LONG,
        "turns",
        ["data.max_length=3000"],
        r"^data\.max_length=3000 .* more than the model's context of 2048",
    ),
    "a system prompt without a role": (
        LONG,
        "strict",
        ["data.system_prompt=Be brief."],
        r"^data\.system_prompt='Be brief\.': the model's chat template",
    ),
    "scores that are no tokens": (LONG, "turns", ["judge.kind=likelihood", "data.max_length=500"], r"^judge\.kind='likelihood': "),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_before_any_work(name: str, tmp_path: Path) -> None:
    """One line, and no round was begun."""
    kind, shape, overrides, message = REFUSED[name]
    merges = (("Ġ", "1"),) if name == "scores that are no tokens" else ()
    model, tokenizer = build(kind), make(replace(SHAPES[shape], merges=merges))
    model.resize_token_embeddings(max(len(tokenizer), 270))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    targets = "lora.target_modules=[q_proj]" if kind is not GPT2 else "lora.target_modules=[c_attn]"
    config = load("", [*SMALL, f"model.name={tmp_path / 'model'}", targets, f"out={tmp_path / 'run'}", *overrides])
    with pytest.raises(ValueError, match=message) as error:
        run(config, display=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
