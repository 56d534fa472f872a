"""DP-LoRA: low-rank updates under differential privacy; Liu et al. (2023), arXiv 2312.17493.

`example` is DP-SGD on the LoRA factors (per-example clipping, noise sigma C / B on the mean gradient), which protects each
record of a client. `literal` is the published algorithm, whose noise per batch gives far less than its formula says; the
ledger carries what an accountant makes of it. The paper's own text was not available to us: `literal` follows secondary
sources that agree with one another.
"""

from raysim.methods.call import ClientCall, ClientResult, one_by_one
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import frozen_coordinates, train_literal, train_private


@one_by_one
def dplora(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: private steps from the shared adapter, send the difference."""
    step = train_literal if call.mechanism.kind == "literal" else train_private
    adapter, stats = step(lm, call.adapter, call.shard, settings=call.private_settings(), seed=call.seed("train"))
    change = {"adapter": adapter - call.adapter}
    return call.result(adapter, stats=stats, state=call.noted(change, frozen=frozen_coordinates(lm)))
