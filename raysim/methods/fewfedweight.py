"""FewFedWeight: few-shot learning with pseudo data from the global model; after Dong et al. (2022), arXiv 2212.08354. A RECONSTRUCTION.

Known of the published method: each client lets the global model answer its own few-shot inputs, an energy-based weight holds noisy
answers down, and client models get aggregation weights by how well they do. Its formulas were not available to us. What stands here is
our reading of it, to be called that wherever its results are shown:

- answers y' are decoded greedily by the shared model from the prompts x of the client's own records; empty ones are left out, and
  prompts that leave no room for one;
- the energy of a pair is its mean token loss under the client's own adapter of its last round (at first, the shared one);
- w_i = m softmax(-E_i / energy_temperature) over the client's m pairs, so 1 on average;
- the loss is that on the real records plus pseudo_weight times w_i on the pairs, in the same batches;
- a client's weight is exp(-L_k / aggregation_temperature) for its loss L_k on records it holds back, so that after division by the sum
  the weights are a softmax. A client with a single record, or with validation_share 0, takes its training records for it.

Real updates are sent, so what is trained on leaks as with FEDIT; what is held back is never trained on.
"""

import math
from collections.abc import Sequence

import numpy as np

from raysim.data.configured import chat_format
from raysim.data.records import Record
from raysim.data.similarity import largest_rouge_l
from raysim.data.tokens import Example, end_of_turn
from raysim.data.written import written_text
from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall, ClientResult, ClientState, one_by_one
from raysim.methods.synthesis.pool import as_rows
from raysim.methods.synthesis.write import Candidate
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel
from raysim.model.train import mean_nll, train_adapter
from raysim.rng import numpy_rng, seed_for


@one_by_one
def fewfedweight(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: let the shared model answer its prompts, train on records and weighted answers, say how well it does."""
    ours = call.config.fewfedweight
    own = call.state.arrays["own"] if call.state else call.adapter
    real, held_back = hold_back(call.shard, share=ours.validation_share, seed=seed_for(call.config.seed, "client", call.client_id))

    written = answers(lm, call, real)
    pairs = [pair for pair in written if pair.record.response]
    energies = [nll / max(count, 1) for nll, count in _losses(lm, own, pairs, call=call)]
    pseudo_weights = ours.pseudo_weight * energy_weights(energies, temperature=ours.energy_temperature)
    adapter, stats = train_adapter(
        lm,
        call.adapter,
        [*real, *pairs],
        settings=call.train_settings(),
        seed=call.seed("train"),
        weights=[*[1.0] * len(real), *pseudo_weights.tolist()],
    )

    losses = _losses(lm, adapter, held_back, call=call)
    return call.result(
        adapter,
        stats=stats,
        state=ClientState(arrays={"own": adapter}),
        synthetic=as_rows(_rows(written, energies, real=real), call=call, own_prompts=True),
        weight=aggregation_weight(losses, temperature=ours.aggregation_temperature) if call.config.server.weighting == "adaptive" else None,
    )


def hold_back(shard: Sequence[Example], *, share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The records to train on and those to validate on, the same in every round; of two or more at least one each.

    With a share of 0, or fewer than two records, all of them are both.
    """
    if share == 0.0 or len(shard) < 2:
        return list(shard), list(shard)
    count = min(len(shard) - 1, max(1, round(share * len(shard))))
    chosen = set(numpy_rng(seed, "validation").permutation(len(shard))[:count].tolist())
    return [e for i, e in enumerate(shard) if i not in chosen], [e for i, e in enumerate(shard) if i in chosen]


def answers(lm: LanguageModel, call: ClientCall, examples: Sequence[Example]) -> list[Example]:
    """What the shared model answers to the prompts of `examples`, as examples whose response may be empty.

    A prompt that leaves no room for an answer in the model's context is not asked.
    """
    ours = call.config.fewfedweight
    asked = [example for example in examples if len(example.prompt_ids) + ours.max_response_tokens <= lm.max_positions]
    if not asked or ours.pseudo_weight == 0.0:
        return []
    lm.set_adapter(call.adapter)
    lm.model.eval()
    outputs = write_texts(
        lm,
        [example.prompt_ids for example in asked],
        sampling=Sampling(max_new_tokens=ours.max_response_tokens),
        seeds=None,
        batch_size=call.config.evaluate.batch_size,
    )
    turn_end = end_of_turn(lm.tokenizer, chat=chat_format(call.config.data))[1]
    end = lm.eos_token_ids[0] if turn_end is None else turn_end
    pairs = []
    for example, output in zip(asked, outputs, strict=True):
        text = written_text(lm.tokenizer, output).strip()
        record = Record(example.record.record_id, example.record.instruction, text, label="synthetic")
        ending = () if len(output) == ours.max_response_tokens else (end,)  # none where the answer was cut
        pairs.append(Example(record, prompt_ids=example.prompt_ids, response_ids=(*output, *ending)))
    return pairs


def energy_weights(energies: Sequence[float], *, temperature: float) -> np.ndarray:
    """m softmax(-E / temperature) of m energies, float64; a pair whose energy is not finite weighs nothing."""
    values = np.array(energies, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(len(values))
    with np.errstate(under="ignore"):
        scores = np.where(finite, np.exp(-(np.where(finite, values, 0.0) - values[finite].min()) / temperature), 0.0)
    return np.asarray(len(values) * scores / scores.sum())


def aggregation_weight(losses: Sequence[tuple[float, int]], *, temperature: float) -> float:
    """exp(-L / temperature) for the mean token loss L; 0 for a client that has nothing to show, or whose loss is not finite."""
    count = sum(n for _, n in losses)
    loss = sum(nll for nll, _ in losses) / count if count else math.inf
    return math.exp(-loss / temperature) if math.isfinite(loss) else 0.0


def _losses(lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, call: ClientCall) -> list[tuple[float, int]]:
    lm.set_adapter(adapter)
    return mean_nll(lm, examples, batch_size=call.config.train.batch_size)


def _rows(written: Sequence[Example], energies: Sequence[float], *, real: Sequence[Example]) -> list[Candidate]:
    """The answers, each with its energy as score and how near it is to a true one of the client's; empty ones are dropped (`response`)."""
    local = [example.record.response for example in real]
    remaining, rows = iter(energies), []
    for pair in written:
        instruction, text = pair.record.instruction, pair.record.response
        if not text:
            rows.append(Candidate(instruction, verdict="response"))
            continue
        energy = next(remaining)
        score = energy if math.isfinite(energy) else None
        rows.append(Candidate(instruction, text, max_rouge_l=largest_rouge_l(text, local), score=score))
    return rows
