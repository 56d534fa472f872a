"""Canaries: invented records with random secrets, put into shards so that what a model remembers of them can be measured.

A canary asks for the number of an invented thing and answers with nine random digits. Nobody can know them but from
training, so how the secret ranks among other secrets says what was memorised, with no judgement of what is likely text.
Of the NUM_SECRETS secrets there are, a hash keeps half for canaries and half for references: a reference is never the
secret of any canary, of whatever seed, and the two halves are otherwise alike.
Left out: canaries in the form of real records, and updates of canary clients (they are vectors, not records).

Shape legend: R = references.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raysim.data.chat import DEFAULT_CHAT, ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_chat
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches, branch_nlls
from raysim.rng import numpy_rng

Floats = NDArray[np.float64]

NUM_SECRETS = 10**9
"""Size of the space of secrets, nine digits; half of it, as a hash decides, are canaries' secrets, and half references."""
MAX_DRAWN = 10**6
"""Most secrets, or names, drawn at once: far fewer than there are, so that redrawing what is taken already stays rare."""
LABEL = "canary"
"""`Record.label` of every canary."""
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
"""Four of them make the name of the invented thing that a canary asks about."""


@dataclass(frozen=True)
class Canary:
    """An invented record with a secret, and how it is to be trained on."""

    record: Record
    """Its response ends with the secret."""
    secret: str
    """Nine random digits, as `482-109-375`."""
    multiplicity: int
    """How often the record is put into training data if it is included."""
    included: bool
    """Whether it is put into training data."""

    @property
    def num_copies(self) -> int:
        """Times the record is put into training data."""
        return self.multiplicity if self.included else 0


# --- records ---


def make_canaries(*, multiplicities: Sequence[int], num_per_multiplicity: int, seed: int, first_record_id: int) -> list[Canary]:
    """`num_per_multiplicity` canaries for each of `multiplicities`, in order; multiplicity 0 makes a control, which is not included.

    Carlini et al. (2019), arXiv 1802.08232.
    """
    if any(multiplicity < 0 for multiplicity in multiplicities):
        raise ValueError(f"multiplicities={list(multiplicities)} must be at least 0")
    counts = [multiplicity for multiplicity in multiplicities for _ in range(num_per_multiplicity)]
    records = _records(
        len(counts),
        instruction="What is the access code of locker {}?",
        response="The access code is {}",
        seed=seed,
        first_record_id=first_record_id,
    )
    return [
        Canary(record=record, secret=record.details[0], multiplicity=count, included=count > 0)
        for record, count in zip(records, counts, strict=True)
    ]


def membership_canaries(num: int, *, seed: int, first_record_id: int) -> list[Canary]:
    """`num` canaries of multiplicity 1 for a one-run audit, each included if its own fair coin says so.

    The coins are drawn from a stream of their own, so that neither the records nor their order know anything of them.
    """
    records = _records(
        num,
        instruction="Which seal number does crate {} carry?",
        response="The seal number is {}",
        seed=seed,
        first_record_id=first_record_id,
    )
    coins = numpy_rng(seed, "canaries", "coins").integers(2, size=num).tolist()
    return [Canary(record=r, secret=r.details[0], multiplicity=1, included=coin == 1) for r, coin in zip(records, coins, strict=True)]


def references(canary: Canary, *, num_references: int, seed: int) -> list[str]:
    """Other secrets of the same form, all different and none of them any canary's, whatever seed that was made from.

    They depend on `seed` and on the canary's `record_id` only.
    """
    return _secrets(num_references, numpy_rng(seed, "canaries", "references", canary.record.record_id), of_canaries=False)


def _records(num: int, *, instruction: str, response: str, seed: int, first_record_id: int) -> list[Record]:
    """`num` records about things of different names with different secrets."""
    names = _names(num, numpy_rng(seed, "canaries", instruction, "names"))
    secrets = _secrets(num, numpy_rng(seed, "canaries", instruction, "secrets"), of_canaries=True)
    return [
        Record(
            record_id=first_record_id + index,
            instruction=instruction.format(name),
            response=response.format(secret),
            label=LABEL,
            details=(secret,),
            group=f"{LABEL}-{name}",
        )
        for index, (name, secret) in enumerate(zip(names, secrets, strict=True))
    ]


def _names(num: int, rng: np.random.Generator) -> list[str]:
    """`num` different invented names of four syllables."""
    names: dict[str, None] = {}
    while len(names) < _at_most_drawn(num):
        names["".join(rng.choice(SYLLABLES, size=4)).capitalize()] = None
    return list(names)


def _secrets(num: int, rng: np.random.Generator, *, of_canaries: bool) -> list[str]:
    """`num` different secrets, uniform over the canaries' half of the space or over the references'."""
    secrets: dict[str, None] = {}
    while len(secrets) < _at_most_drawn(num):
        digits = f"{rng.integers(NUM_SECRETS):09d}"
        secret = f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
        if _is_canarys(secret) == of_canaries:
            secrets[secret] = None
    return list(secrets)


def _is_canarys(secret: str) -> bool:
    """Whether the secret is of the canaries' half: one bit of its SHA-256."""
    return hashlib.sha256(secret.encode()).digest()[0] % 2 == 0


def _at_most_drawn(num: int) -> int:
    if not 0 <= num <= MAX_DRAWN:
        raise ValueError(f"canaries and references: {num} must be between 0 and {MAX_DRAWN}")
    return num


# --- exposure ---


def exposure(canary_nll: float, reference_nlls: Sequence[float] | Floats) -> float:
    """log2 of the size of a set over the canary's rank in it, for the set of the canary and its references.

    The rank is 1 plus the references that are as likely as the canary or likelier (ties count for the references), so the
    value is at least 0 and at most log2(R + 1) with R references. A secret never trained on has each rank equally often:
    an exposure of at least x with probability 2^-x at most. Carlini et al. (2019), arXiv 1802.08232, who define it over the
    whole space of secrets, of which this takes a sample.
    """
    nll_R = _checked_nlls(canary_nll, reference_nlls, at_least=1)
    return math.log2(len(nll_R) + 1) - math.log2(1 + int((nll_R <= canary_nll).sum()))


def _checked_nlls(canary_nll: float, reference_nlls: Sequence[float] | Floats, *, at_least: int) -> Floats:
    nll_R = np.asarray(reference_nlls, dtype=np.float64)
    if nll_R.ndim != 1 or len(nll_R) < at_least:
        raise ValueError(f"reference_nlls has shape {nll_R.shape}; give a list of at least {at_least}")
    if not (math.isfinite(canary_nll) and np.isfinite(nll_R).all()):
        raise ValueError("canary_nll and reference_nlls must be finite; a model that diverged cannot be audited")
    return nll_R


# --- scoring a model ---


def exposures(
    lm: LanguageModel,
    adapter: Vector,
    canaries: Sequence[Canary],
    *,
    num_references: int,
    seed: int,
    batch_size: int,
    chat: ChatFormat = DEFAULT_CHAT,
) -> list[float]:
    """The exposure of each canary under `adapter`, among `num_references` references of its own."""
    scored = secret_nlls(lm, adapter, canaries, num_references=num_references, seed=seed, batch_size=batch_size, chat=chat)
    return [exposure(own, others) for own, others in scored]


@torch.no_grad()
def secret_nlls(
    lm: LanguageModel,
    adapter: Vector,
    canaries: Sequence[Canary],
    *,
    num_references: int,
    seed: int,
    batch_size: int,
    chat: ChatFormat = DEFAULT_CHAT,
) -> list[tuple[float, Floats]]:
    """For each canary: the NLL (nats) of its secret's tokens under `adapter`, and of each reference in the secret's place, shape (R,).

    What comes before the secret is given: the question in the chat format `chat`, and the beginning of the answer.
    In bfloat16, rounding moves each figure by some tenths of a nat, canaries' and references' alike. `adapter` stays loaded.
    """
    lm.set_adapter(adapter)
    lm.model.eval()
    results = []
    for canary in canaries:
        secrets = [canary.secret, *references(canary, num_references=num_references, seed=seed)]
        nlls = continuation_nlls(lm, *secret_tokens(lm.tokenizer, canary, secrets, chat=chat), batch_size=batch_size)
        results.append((float(nlls[0]), nlls[1:]))
    return results


def secret_examples(tokenizer: Any, canaries: Sequence[Canary], *, chat: ChatFormat = DEFAULT_CHAT) -> list[Example]:
    """The canaries as examples whose scored part is the secret alone, for membership scores."""
    examples = []
    for canary in canaries:
        prompt, (secret,) = secret_tokens(tokenizer, canary, [canary.secret], chat=chat)
        examples.append(Example(record=canary.record, prompt_ids=tuple(prompt), response_ids=tuple(secret)))
    return examples


def secret_tokens(tokenizer: Any, canary: Canary, secrets: Sequence[str], *, chat: ChatFormat) -> tuple[list[int], list[list[int]]]:
    """Token ids of all that comes before the canary's secret, and of each of `secrets` in its place.

    A token in which the beginning of the answer and a secret run together belongs to the secret.
    """
    assert canary.record.response.endswith(canary.secret), canary
    opening = canary.record.response.removesuffix(canary.secret)
    opening_ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
    answers = [tokenizer(opening + secret, add_special_tokens=False)["input_ids"] for secret in secrets]
    shared = min(_num_shared(opening_ids, answer) for answer in answers)
    prompt = encode_chat(tokenizer, [("user", canary.record.instruction)], chat=chat)
    return prompt + list(opening_ids[:shared]), [list(answer[shared:]) for answer in answers]


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def continuation_nlls(lm: LanguageModel, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]], *, batch_size: int) -> Floats:
    """The summed NLL (nats) of each continuation of one prompt, under the adapter that is loaded; float64, one each.

    Equal to scoring prompt and continuation together (see `branches`); `batch_size` continuations are behind one another in a row.
    """
    rows = [
        Branches(tuple(prompt_ids), tuple(tuple(ids) for ids in continuations[start : start + batch_size]))
        for start in range(0, len(continuations), batch_size)
    ]
    return np.array([nll for nlls in branch_nlls(lm, rows, batch_size=1) for nll in nlls])
