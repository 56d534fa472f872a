"""What a mechanism promises, in words: the neighbouring relation and one plain sentence for the ledger, the model card and the page.

Left out: any number. The mechanism fills those in.
"""

RELATIONS = {
    "none": None,
    "client": "add or remove one client",
    "client-fixed": "replace one client",
    "client-local": "a client's data are used or not (its update is replaced by zero)",
    "example": "add or remove one record",
    "literal": "replace one record",
    "synthesis": "add or remove one record",
}
"""By promise, the pairs of data sets that the released adapters cannot tell apart."""

PROMISES = {
    "client": "Client-level: {num_rounds} rounds are {budget} with respect to adding or removing any one client with all its records "
    "(updates clipped to {clip}, noise at a trusted server)",
    "client-fixed": "Client-level: {num_rounds} rounds are {budget} with respect to replacing any one client with all its records "
    "(updates clipped to {clip}, cohorts of a fixed size, noise at a trusted server)",
    "client-cyclic": "Client-level: {num_rounds} rounds are {budget} with respect to adding or removing any one client with all its records "
    "(updates clipped to {clip}, clients in a fixed order, noise correlated over {num_bands} rounds at a trusted server)",
    "client-local": "Client-level, local: what a client sends in {num_rounds} rounds is {budget} with respect to whether its data are used at "
    "all, against the server and all others (updates clipped to {clip}, noise at the client, no amplification by sampling)",
    "client-distributed": "Client-level: {num_rounds} rounds are {budget} with respect to whether a client's data are used at all, against all "
    "others and a server that follows the protocol and sees only masked sums (updates clipped to {clip}, each client adds a share of "
    "the noise, clients do not collude, no amplification by sampling)",
    "example": "Record-level: what a client sends in {num_rounds} rounds is {budget} with respect to adding or removing any one of its "
    "records, against the server and all others (gradients clipped to {clip} per record, noise at the client, its client in every "
    "cohort, shard sizes public)",
    "literal": "Record-level: what a client sends in {num_rounds} rounds is {budget} with respect to replacing any one of its records, "
    "against the server and all others (gradients of A and of B each clipped to {clip} per batch, hence a sensitivity of 2 sqrt(2) "
    "times that, no amplification by sampling, its client in every cohort, shard sizes public)",
    "synthesis": "Record-level: what a client sends in {num_rounds} rounds is {budget} with respect to adding or removing any one of its "
    "records, against the server and all others (synthetic records are drawn from noised sums of next-token distributions, and the "
    "shared adapter is trained on nothing else; its client in every cohort, shard sizes public)",
}

SIMULATED = "Simulated, not given by this run: with cohorts of {noise_cohort_size} out of {population} clients and the same noise on the average, it would be: "
