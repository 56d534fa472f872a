"""SCAFFOLD: control variates against client drift; Karimireddy et al. (2020), arXiv 1910.06378, option II.

The server keeps a control variate c, each client a c_k of its own; both start at zero. A local step is w -= lr (g + c - c_k): the
client's own step, then a shift by lr (c - c_k). With SGD that is the paper's algorithm, g being the gradient after `train.max_grad_norm`.
With AdamW the shift follows AdamW's step, as practical federated code has it; c_k is then the mean direction of a step instead of
the mean gradient.
A client sends its update and what changed in c_k, so twice as much as with FEDIT, and a server that adds up what a client
sent knows that client's c_k. c is the mean of all c_k under the weights of the updates, those of clients that never came
included at zero (uniform weights: the paper).
Left out: client-level privacy, for which the second vector would need a bound and noise of its own.
"""

from collections.abc import Sequence

import numpy as np

from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.model.language_model import LanguageModel
from raysim.model.train_together import train_together


def scaffold(lm: LanguageModel, calls: Sequence[ClientCall]) -> list[ClientResult]:
    """One round of each client: corrected training from the shared adapter, send the difference and the change of its control variate."""
    control, settings = calls[0].round.broadcast["control"], calls[0].train_settings()
    owned = [call.state.arrays["control"] if call.state else np.zeros_like(control) for call in calls]
    trained = train_together(
        lm,
        [call.adapter for call in calls],
        [call.shard for call in calls],
        settings=settings,
        seeds=[call.seed("train") for call in calls],
        corrections=[control - own for own in owned],
    )
    results = []
    for call, own, (adapter, stats) in zip(calls, owned, trained, strict=True):
        change = control_change(adapter - call.adapter, control, num_steps=stats.num_steps, lr=settings.lr)
        state = ClientState(arrays={"control": own + change})
        results.append(call.result(adapter, stats=stats, further={"control": change}, state=state))
    return results


def control_change(update: Vector, control: Vector, *, num_steps: int, lr: float) -> Vector:
    """c_k' - c_k = -c + (w_global - w_k) / (S lr) for S local steps at a constant learning rate, float32 of shape (P,).

    Edge cases: zero where no step was made, and where the update or the change is not finite (an update that is dropped changes nothing).
    """
    if num_steps == 0:
        return np.zeros_like(control)
    with np.errstate(over="ignore", invalid="ignore"):
        change = (-control.astype(np.float64) - update.astype(np.float64) / (num_steps * lr)).astype(np.float32)
    return change if np.isfinite(change).all() else np.zeros_like(control)
