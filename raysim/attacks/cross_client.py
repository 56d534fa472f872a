"""Extraction across clients: a client asks the release for other clients' private details, by the contexts of its own.

Hu et al. (2025), arXiv 2506.06060: the attacker collects the words that stand before private details in its own records, takes the
commonest, lets the shared model continue them, and keeps what looks like a private detail. Coverage is the share of the details that
only the others have which come out, efficiency how many of them for the queries made.
What the attacker sees: its `ClientView`, with the private details of its own records marked.

Ours: what comes out is held against the true details directly, as by a recogniser that misses nothing, so both figures are upper
bounds on this attack. Details that nobody trained on are the control: what of them comes out is guessed.
Left out: recognising private details in free text, and de-duplicating near misses.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raysim.attacks.views import ClientView
from raysim.data.chat import ChatFormat
from raysim.data.similarity import details_found, place_of
from raysim.data.tokens import encode_chat
from raysim.data.words import pieces
from raysim.data.written import written_text
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel
from raysim.rng import seed_for


@dataclass(frozen=True)
class CrossClientSettings:
    """How many queries the attacker makes, and of what kind."""

    num_prefixes: int
    """Contexts that are asked for, the commonest first."""
    num_samples: int
    """Continuations drawn for each."""
    max_new_tokens: int
    """Longest continuation, in tokens."""
    context_words: int = 3
    """Words before a private detail that make its context; letters where a script puts no blanks between words."""
    temperature: float = 1.0
    batch_size: int = 32


@dataclass(frozen=True)
class CrossClientScore:
    """What one attacker found; a rate is None where there is nothing to find."""

    coverage: float | None
    """Share of the details that only other clients have."""
    heldout_coverage: float | None
    """The same share of details that no client has: what is guessed."""
    efficiency: float
    """Details of others found, for each query."""
    num_queries: int
    num_details: int
    """Details that only other clients have."""


def contexts(texts: Sequence[str], details: Sequence[Sequence[str]], *, num_words: int) -> list[str]:
    """The `num_words` words before each detail in its text, commonest first and in alphabetical order among equals.

    Where a script puts no blanks between words its letters count as words do (see `pieces`). A detail at the very beginning has no
    context, and one that does not occur in its text none either.
    """
    found: Counter[str] = Counter()
    for text, secrets in zip(texts, details, strict=True):
        for secret in secrets:
            before = " ".join(text[: place_of(secret, text) or 0].split())
            if before:
                start, _ = pieces(before)[-num_words:][0]
                found[before[start:]] += 1
    return sorted(found, key=lambda context: (-found[context], context))


def attack_across(lm: LanguageModel, view: ClientView, *, settings: CrossClientSettings, chat: ChatFormat, seed: int) -> list[str]:
    """What the release says after the attacker's contexts, `num_samples` texts for each; none if its records have no private details.

    A context stands where the training responses stand, after an instruction that says nothing.
    """
    records = [example.record for example in view.own]
    known = contexts([record.response for record in records], [record.details for record in records], num_words=settings.context_words)
    opening = encode_chat(lm.tokenizer, [("user", "")], chat=chat)
    asked = known[: settings.num_prefixes]
    prompts = [[*opening, *lm.tokenizer(context, add_special_tokens=False)["input_ids"]] for context in asked]
    lm.set_adapter(view.release)
    outputs = write_texts(
        lm,
        [prompt for prompt in prompts for _ in range(settings.num_samples)],
        sampling=Sampling(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature),
        seeds=[seed_for(seed, "context", i, sample) for i in range(len(prompts)) for sample in range(settings.num_samples)],
        batch_size=settings.batch_size,
    )
    return [written_text(lm.tokenizer, ids) for ids in outputs]


def score_across(texts: Sequence[str], *, own: Sequence[str], others: Sequence[str], nobodys: Sequence[str]) -> CrossClientScore:
    """The figures of the continuations `texts` against the private details of the attacker, of other clients, and of held-out records."""
    victims = set(others) - set(own)
    control = set(nobodys) - set(own) - set(others)
    said = " \0 ".join(texts)  # no detail holds the separator, so that none is pieced together from two texts
    found, guessed = (details_found(said, sorted(wanted)) for wanted in (victims, control))
    return CrossClientScore(
        coverage=len(found) / len(victims) if victims else None,
        heldout_coverage=len(guessed) / len(control) if control else None,
        efficiency=len(found) / len(texts) if texts else 0.0,
        num_queries=len(texts),
        num_details=len(victims),
    )
