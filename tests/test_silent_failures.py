"""What would go wrong without a word is an error: a factor that is frozen, a key not loaded, an adapter that did not change, a foreign upload.

And what only looks like it is none: empty shards and batches, learning rates of next to nothing, training that diverged, noise alone.
"""

import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from raysim.config import load
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.federation.assignment import Assignment
from raysim.federation.faults import check_outcomes
from raysim.federation.worker import Worker
from raysim.lora.layout import Vector, check_adapter, initial_adapter, load_adapter, save_adapter, unflatten
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, _flat_parameters, build_language_model
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_literal, train_private
from raysim.model.train import TrainSettings, train_adapter
from tests.conftest import SMALL
from tests.method_calls import alone, make_call
from tests.rounds import make_round
from tests.tiny_models import sharp_base

LOCAL = TrainSettings(num_epochs=1, max_steps=0, batch_size=4, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0)
PRIVATE = PrivateSettings(
    num_steps=2, batch_size=4, sampling_prob=1.0, lr=0.01, optimizer="adamw", clip_norm=1.0, noise_multiplier=0.0, secure_noise=False
)
NOISY = dataclasses.replace(PRIVATE, noise_multiplier=1.0)
TARGETS = ["q_proj", "v_proj"]
TRAININGS = [(train_adapter, LOCAL), (train_private, PRIVATE), (train_private, NOISY), (train_literal, PRIVATE), (train_literal, NOISY)]
IDS = ["plain", "private", "private, noised", "literal", "literal, noised"]
Train = Callable[..., tuple[Vector, object]]

every_training = pytest.mark.parametrize(("train", "settings"), TRAININGS, ids=IDS)


def build(targets: list[str] = TARGETS, *, rank: int = 2) -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=rank, alpha=8.0, dropout=0.0, target_modules=targets)


@pytest.fixture
def lm() -> LanguageModel:
    """A model of the test's own, to be spoilt."""
    return build()


def some_adapter(lm: LanguageModel, *, seed: int = 0) -> Vector:
    return (0.3 * np.random.default_rng(seed).standard_normal(lm.layout.num_parameters)).astype(np.float32)


def examples(count: int = 5) -> list[Example]:
    rng, record = np.random.default_rng(0), Record(record_id=0, instruction="", response="")
    return [
        Example(record=record, prompt_ids=tuple(rng.integers(5, 261, 6).tolist()), response_ids=tuple(rng.integers(5, 261, 4).tolist()))
        for _ in range(count)
    ]


def parameter(lm: LanguageModel, name: str) -> torch.nn.Parameter:
    return dict(lm.model.named_parameters())[name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")]


# --- a LoRA weight that is frozen, or whose gradient goes elsewhere ---


@every_training
@pytest.mark.parametrize("index", [0, 3, -1], ids=["first A", "a B", "last B"])
def test_a_frozen_lora_weight_is_refused(lm: LanguageModel, train: Train, settings: object, index: int) -> None:
    name = lm.layout.names[index]
    parameter(lm, name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"LoRA tensor {name} is frozen"):
        train(lm, some_adapter(lm), examples(), settings=settings, seed=0)


def test_a_lora_weight_that_is_frozen_from_the_start_is_refused(lm: LanguageModel) -> None:
    """It would be no part of the layout: never sent, never loaded, never trained."""
    name = lm.layout.names[2]
    parameter(lm, name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=f"{name} is a frozen LoRA tensor"):
        _flat_parameters(lm.model, device="cpu")


def test_a_base_weight_that_trains_is_refused(lm: LanguageModel) -> None:
    lm.model.get_parameter("base_model.model.model.embed_tokens.weight").requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight is a frozen LoRA tensor, or trains and is none"):
        _flat_parameters(lm.model, device="cpu")


@every_training
def test_a_gradient_that_does_not_reach_the_flat_one_is_refused(lm: LanguageModel, train: Train, settings: object) -> None:
    """As after `zero_grad` of any optimizer or model, which drops the views."""
    lm.model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match=f"gradient of LoRA tensor {lm.layout.names[0]} is no view"):
        train(lm, some_adapter(lm), examples(), settings=settings, seed=0)
    elsewhere = build()
    last = parameter(elsewhere, elsewhere.layout.names[-1])
    last.grad = torch.zeros_like(last)
    with pytest.raises(RuntimeError, match=f"gradient of LoRA tensor {lm.layout.names[-1]} is no view"):
        train(elsewhere, some_adapter(lm), examples(), settings=settings, seed=0)


@every_training
@pytest.mark.parametrize("index", [0, 3], ids=["A", "B"])
def test_a_factor_that_is_detached_within_the_model_is_refused(lm: LanguageModel, train: Train, settings: object, index: int) -> None:
    """Nothing is frozen and every gradient has its place, but none comes; under noise the tensor would even change."""
    name = lm.layout.names[index]
    module = lm.model.get_submodule(name.removesuffix(".weight") + ".default")
    module.register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(RuntimeError, match=r"no gradient reached LoRA tensor .*self_attn.*frozen or detached"):
        train(lm, some_adapter(lm), examples(), settings=settings, seed=0)


def test_a_gradient_sum_without_a_factor_is_refused(lm: LanguageModel) -> None:
    parameter(lm, lm.layout.names[0]).requires_grad_(False)
    lm.set_adapter(some_adapter(lm))
    with pytest.raises(RuntimeError, match=f"no gradient reached LoRA tensor {lm.layout.names[0]}"):
        clipped_gradient_sum(lm, examples(), clip_norm=1.0, max_batch=2)


# --- an adapter that did not change ---


@pytest.mark.parametrize(("train", "settings"), [TRAININGS[i] for i in (0, 1, 3)], ids=[IDS[i] for i in (0, 1, 3)])
def test_an_adapter_without_any_gradient_is_refused(lm: LanguageModel, train: Train, settings: object) -> None:
    """A and B both zero have no gradient, so that no training would ever begin."""
    zero = np.zeros(lm.layout.num_parameters, dtype=np.float32)
    with pytest.raises(
        RuntimeError, match=r"no gradient reached the adapter although its loss is \d+.*; A and B are both zero, or so large"
    ):
        train(lm, zero, examples(), settings=settings, seed=0)


@contextmanager
def optimizers_undone(lm: LanguageModel, start: Vector) -> Iterator[None]:
    """While open, every optimizer step is taken back: torch's own hook after steps puts the adapter back."""

    def take_back(*_: object) -> None:
        lm.flat.copy_(torch.from_numpy(start))

    handle = register_optimizer_step_post_hook(take_back)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("train", "settings"), TRAININGS[:3], ids=IDS[:3])
def test_an_adapter_that_did_not_change_is_refused(
    lm: LanguageModel, train: Train, settings: TrainSettings | PrivateSettings, optimizer: str
) -> None:
    start = some_adapter(lm)
    with optimizers_undone(lm, start), pytest.raises(RuntimeError, match=r"did not change .* learning rate is 0\.01"):
        train(lm, start, examples(), settings=dataclasses.replace(settings, optimizer=optimizer), seed=0)
    assert train(lm, start, examples(), settings=settings, seed=0)[0].tobytes() != start.tobytes()


def test_a_gradient_whose_norm_overflows_still_makes_a_step() -> None:
    """B of 1e34 and A of zero: the gradient is finite, its float32 norm is not, and scaling by it would make a step of nothing."""
    lm = build(["down_proj"])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], lm.layout.num_parameters)
    start = np.where(lm.layout.group_mask("B"), 1e34 * signs, 0.0).astype(np.float32)
    trained, _ = train_adapter(lm, start, examples(3), settings=dataclasses.replace(LOCAL, optimizer="sgd", lr=1.0), seed=0)
    assert not lm.flat_grad.norm().isinf(), "the gradient was scaled down in place"
    assert np.linalg.norm((trained - start)[lm.layout.group_mask("A")].astype(float)) == pytest.approx(1.0, rel=1e-3)


# --- what only looks like it ---


@every_training
def test_an_empty_shard_is_no_failure(lm: LanguageModel, train: Train, settings: object) -> None:
    start = some_adapter(lm)
    assert train(lm, start, [], settings=settings, seed=0)[0].tobytes() == start.tobytes()


@every_training
@pytest.mark.parametrize("lr", [1e-6, 1e-12, 1e-30, 1e-45])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_learning_rate_of_next_to_nothing_is_no_failure(
    lm: LanguageModel, train: Train, settings: TrainSettings | PrivateSettings, lr: float, optimizer: str
) -> None:
    """A schedule may end there, and the step may be lost in float32, from the first adapter (B = 0) and from later ones."""
    for start in (initial_adapter(lm.layout, seed=0), some_adapter(lm)):
        trained, _ = train(lm, start, examples(), settings=dataclasses.replace(settings, lr=lr, optimizer=optimizer), seed=0)
        np.testing.assert_allclose(trained, start, atol=10 * lr)


def test_a_poisson_batch_without_examples_is_no_failure(lm: LanguageModel) -> None:
    start = some_adapter(lm)
    trained, stats = train_private(lm, start, examples(), settings=dataclasses.replace(PRIVATE, sampling_prob=0.0), seed=0)
    assert trained.tobytes() == start.tobytes()
    assert (stats.num_steps, stats.loss) == (2, None)


@pytest.mark.parametrize("train", [train_private, train_literal])
def test_noise_alone_is_no_failure(lm: LanguageModel, train: Train) -> None:
    """It is what lifts an adapter of zeros, in which no example has a gradient; and an empty batch gets it as well."""
    zero = np.zeros(lm.layout.num_parameters, dtype=np.float32)
    assert train(lm, zero, examples(), settings=NOISY, seed=0)[0].all()
    if train is train_private:
        assert train(lm, zero, examples(), settings=dataclasses.replace(NOISY, sampling_prob=0.0), seed=0)[0].all()


@every_training
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged_is_dropped_later_and_not_refused(lm: LanguageModel, train: Train, settings: object, value: float) -> None:
    start = np.full(lm.layout.num_parameters, value, dtype=np.float32)
    trained, stats = train(lm, start, examples(), settings=settings, seed=0)
    assert not np.isfinite(trained).any()
    assert stats.loss is None  # type: ignore[attr-defined]  # the stats of any of them


@every_training
def test_a_loss_of_zero_has_no_gradient_and_is_no_failure(train: Train, settings: object) -> None:
    """Every next token certain in float32: nothing is left to learn."""
    base = sharp_base()
    embedding = np.random.default_rng(0).choice([-1.0, 1.0], size=base.tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    head = np.zeros_like(embedding)
    head[50] = 300 * embedding[60] + 300 * embedding[50]
    silent = {name: np.zeros_like(t) for name, t in base.tensors.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    certain = base.tensors | silent | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    lm = build_language_model(dataclasses.replace(base, tensors=certain), rank=2, alpha=8.0, dropout=0.0, target_modules=TARGETS)
    known = [Example(record=Record(record_id=0, instruction="", response=""), prompt_ids=(60,), response_ids=(50, 50))]
    trained, stats = train(lm, some_adapter(lm), known, settings=settings, seed=0)
    assert stats.loss == 0.0  # type: ignore[attr-defined]  # the stats of any of them
    assert np.isfinite(trained).all()


# --- a key that was not loaded ---


def saved(lm: LanguageModel, folder: Path) -> Path:
    save_adapter(folder, some_adapter(lm), lm.layout, base_model="tiny", rank=2, alpha=8.0, dropout=0.0, target_modules=TARGETS)
    return folder


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (["q_proj"], 2, "v_proj.lora_A.weight is not part of the layout"),
        (["q_proj", "v_proj", "up_proj"], 2, "up_proj.lora_A.weight is missing"),
        (["q_proj", "k_proj"], 2, "v_proj.lora_A.weight is not part of the layout"),
        (TARGETS, 3, r"has shape \(2, 32\), expected \(3, 32\)"),
    ],
    ids=["more targets", "fewer targets", "other targets", "another rank"],
)
def test_an_adapter_of_another_layout_is_not_loaded_in_part(
    lm: LanguageModel, tmp_path: Path, targets: list[str], rank: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_adapter(saved(lm, tmp_path), build(targets, rank=rank).layout)


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (lambda name: name.removeprefix("base_model.model."), "not part of the layout"),
        (lambda name: name.replace(".weight", ".default.weight"), "not part of the layout"),
        (lambda name: name.replace(".lora_B.", ".lora_C."), "lora_C.weight is not part of the layout"),
    ],
    ids=["without prefix", "with PEFT's inner name", "another factor"],
)
def test_keys_of_another_spelling_are_not_passed_over(
    lm: LanguageModel, tmp_path: Path, renamed: Callable[[str], str], message: str
) -> None:
    """A load that is not strict would leave the model as it was and say nothing."""
    path = saved(lm, tmp_path) / "adapter_model.safetensors"
    save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, lm.layout)


JUNK: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "a pickle": pickle.dumps({"a": [1.0]}, protocol=4),
    "a pickle of torch": b"PK\x03\x04" + bytes(200),
    "a header of 2^60 bytes": (2**60).to_bytes(8, "little") + b"{}",
    "a header that is no JSON": (4).to_bytes(8, "little") + b"nope",
    "a header that is a list": (2).to_bytes(8, "little") + b"[]",
    "a header that is deeply nested": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a tensor beyond the end": (88).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'.ljust(88),
    "an unknown type": (64).to_bytes(8, "little") + b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4),
}


@pytest.mark.parametrize("junk", [*JUNK, "missing", "a folder", "half of one", "not finite"])
def test_a_file_that_is_no_adapter_is_one_line_with_its_name(lm: LanguageModel, tmp_path: Path, junk: str) -> None:
    path = saved(lm, tmp_path) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if junk == "a folder":
        path.mkdir()
    elif junk != "missing":
        odd = {"half of one": content[: len(content) // 2], "not finite": content[:-4] + np.float32(np.nan).tobytes()}
        path.write_bytes((JUNK | odd)[junk])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors.+; restore the file, or run into another folder$") as caught:
        load_adapter(tmp_path, lm.layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["dropped", "added", "integers"])
def test_a_file_with_one_odd_key_is_refused(lm: LanguageModel, tmp_path: Path, change: str) -> None:
    path, name = saved(lm, tmp_path) / "adapter_model.safetensors", lm.layout.names[3]
    tensors = load_file(path)
    if change == "dropped":
        del tensors[name]
    elif change == "added":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path)
    expected = {
        "dropped": f"{name} is missing",
        "added": "lm_head.weight is not part of the layout",
        "integers": f"{name} holds torch.int8",
    }
    with pytest.raises(ValueError, match=expected[change]):
        load_adapter(tmp_path, lm.layout)


def test_every_key_that_is_loaded_reaches_the_model(lm: LanguageModel, tmp_path: Path) -> None:
    lm.set_adapter(load_adapter(saved(lm, tmp_path), lm.layout))
    for name, tensor in unflatten(some_adapter(lm), lm.layout).items():
        assert torch.equal(parameter(lm, name).detach(), tensor), name


@pytest.mark.parametrize("index", [0, -1])
def test_a_tensor_that_loading_would_not_reach_is_refused(lm: LanguageModel, index: int) -> None:
    """As after a cast or a move of the model, which gives its tensors a memory of their own."""
    name = lm.layout.names[index]
    parameter(lm, name).data = parameter(lm, name).data.clone()
    with pytest.raises(RuntimeError, match=f"LoRA tensor {name} is no view"):
        lm.set_adapter(some_adapter(lm))


def test_a_lora_tensor_that_the_layout_lacks_is_refused(lm: LanguageModel) -> None:
    """A second adapter, which would take part in the forward pass and be in no upload."""
    lm.model.add_adapter("other", lm.model.peft_config["default"])
    with pytest.raises(RuntimeError, match=r"lora_A\.other\.weight is in the model or in its layout, but not in both"):
        lm.set_adapter(some_adapter(lm))


# --- an upload that holds more than the adapter ---

FOREIGN: list[tuple[str, Callable[[Vector], object], str]] = [
    ("longer", lambda v: np.append(v, v[:1]), r"float32 of shape \(\d+,\), expected float32 of shape"),
    ("shorter", lambda v: v[:-1], r"float32 of shape \(\d+,\), expected float32 of shape"),
    ("a scalar", lambda v: v[:1], r"float32 of shape \(1,\), expected"),
    ("twice", lambda v: np.stack([v, v]), r"float32 of shape \(2, \d+\), expected"),
    ("a row", lambda v: v[None], r"float32 of shape \(1, \d+\), expected"),
    ("double", lambda v: v.astype(np.float64), r"float64 of shape \(\d+,\), expected float32"),
    ("half", lambda v: v.astype(np.float16), r"float16 of shape \(\d+,\), expected float32"),
    ("integers", lambda v: v.view(np.int32), r"int32 of shape \(\d+,\), expected float32"),
    ("objects", lambda v: v.astype(object), r"object of shape \(\d+,\), expected float32"),
    ("a list", lambda v: v.tolist(), r"list instead of a vector of \d+ float32"),
    ("tensors by name", lambda v: {"update": v, "records": ["private"]}, r"dict instead of a vector of \d+ float32"),
    ("with a companion", lambda v: (v, v), r"tuple instead of a vector of \d+ float32"),
]

foreign = pytest.mark.parametrize(("change", "message"), [(c, m) for _, c, m in FOREIGN], ids=[name for name, _, _ in FOREIGN])


@foreign
def test_what_is_no_adapter_is_refused(lm: LanguageModel, change: Callable[[Vector], Vector], message: str) -> None:
    """Where it is checked as an upload, where it is loaded, and where it is saved."""
    odd = change(some_adapter(lm))
    for use in (lambda: check_adapter(odd, lm.layout), lambda: lm.set_adapter(odd), lambda: unflatten(odd, lm.layout)):
        with pytest.raises(ValueError, match=f"^adapter: {message}"):
            use()


def test_an_adapter_is_passed_through_as_it_is(lm: LanguageModel) -> None:
    vector = some_adapter(lm)
    assert check_adapter(vector, lm.layout) is vector
    not_finite = np.full_like(vector, np.nan)  # is dropped and counted where updates are summed
    assert check_adapter(not_finite, lm.layout) is not_finite


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=fedit",),
        ("method.name=fedit", "privacy.unit=client"),
        ("method.name=dplora",),
        ("method.name=dplora", "dplora.mode=literal"),
        ("method.name=locit",),
    ],
)
def test_what_a_client_sends_is_an_adapter_and_nothing_more(overrides: tuple[str, ...]) -> None:
    lm = build_language_model(load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=TARGETS)
    call = make_call(lm, *overrides)
    upload = alone(method_of(call.config.method.name))(lm, call).upload
    assert list(upload) == ["adapter"]
    assert check_adapter(upload["adapter"], lm.layout) is upload["adapter"]


# --- the client is named ---


def run_client(adapter_of: Callable[[LanguageModel], Vector]) -> None:
    """Client 2's call in round 4, from the adapter given, in a worker."""
    worker, config = Worker(load_base_model("tiny"), device="cpu", num_threads=1), load("", SMALL)
    lm = worker.language_model(config.lora)
    call = make_call(lm)
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    round = make_round(call.mechanism, {"adapter": adapter_of(lm)}, index=4)
    check_outcomes(worker.run_chunk(assignment, (2,), round, [call.shard], [None])[1], round_index=4)


def test_a_client_that_fails_in_silence_is_named_with_its_round() -> None:
    with pytest.raises(RuntimeError, match=r"^round 4, client 2: RuntimeError: training: no gradient reached the adapter"):
        run_client(lambda lm: np.zeros(lm.layout.num_parameters, dtype=np.float32))
    with pytest.raises(RuntimeError, match=r"^round 4, client 2: ValueError: adapter: float32 of shape"):
        run_client(lambda lm: np.zeros(lm.layout.num_parameters + 1, dtype=np.float32))
    run_client(some_adapter)
