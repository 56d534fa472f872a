"""A client as a group of ranks under DeepSpeed: the frozen base partitioned among them, and the state of the adapter's optimizer.

Rajbhandari et al. (2020), arXiv 1910.02054. Stage 1 partitions the optimizer's state, 2 the gradient as well, 3 the base too: each rank holds its
part of every weight, and has a layer whole only while it computes. Ranks share the examples of a batch; what is generated or scored, each of them
computes, since all must go through the layers together. The adapter is small, and whole at every rank.
Left out: pipelines and tensor parallelism, and quantised bases, whose weights are no floating-point numbers that could be cut anywhere.
"""

import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

WAIT_S = 600.0
"""How long a rank waits for the others before it takes them for lost."""


@dataclass(frozen=True)
class Sharding:
    """What of a client is partitioned among its ranks."""

    num_ranks: int = 1
    zero_stage: int = 0
    offload: str = "none"
    """`cpu` where what is partitioned waits in the memory of the processor."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of DeepSpeed's configuration."""


@dataclass(frozen=True)
class Group:
    """A process's place among the ranks of its client."""

    rank: int
    sharding: Sharding

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return self.sharding.num_ranks

    def share(self, batch: Sequence[int]) -> list[tuple[int, bool]]:
        """What of a batch this rank does, and whether it counts: all ranks do as many, and who has too few does one again for nothing."""
        own = [(index, True) for index in batch[self.rank :: self.num_ranks]]
        most = -(-len(batch) // self.num_ranks)
        return own + [(batch[0], False)] * (most - len(own))

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of their tensors, in place."""
        distributed.all_reduce(tensor)
        return tensor


def check_library() -> None:
    """Refuses to go on without DeepSpeed, before anything is loaded.

    Errors: ValueError if it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("train.engine='deepspeed' needs the package deepspeed; run: DS_BUILD_OPS=0 pip install 'raysim[deepspeed]'")


def library() -> Any:
    """DeepSpeed.

    Errors: ValueError if it is not installed.
    """
    check_library()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed  # seconds, and only train.engine=deepspeed needs it

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled on first use, by every rank at once
    return deepspeed


def free_address() -> str:
    """`host:port` on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def join(address: str, rank: int, sharding: Sharding) -> Group:
    """This process's place in the group that meets at `address`, once all of it are there."""
    deepspeed = library()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(sharding.num_ranks)}
    os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = address.rpartition(":")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=sharding.num_ranks, timeout=timedelta(seconds=WAIT_S)
    )
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return Group(rank, sharding)


def has_joined() -> bool:
    """Whether this process is in a group, or was in one that lost a rank."""
    return distributed.is_initialized()


def leave() -> None:
    """Ends this process's part in its group."""
    distributed.destroy_process_group()


def settings_of(sharding: Sharding, *, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for a model in `dtype` at a ZeRO stage."""
    plain = dict(sharding.settings)
    zero = dict(plain.pop("zero_optimization", {})) | {"stage": stage}
    if sharding.offload == "cpu" and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    if sharding.offload == "cpu" and 0 < stage < 3:
        zero["offload_optimizer"] = {"device": "cpu"}
    return plain | {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": 0.0,  # DeepSpeed clips to 1 unless it is told
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def partition(core: Any, group: Group, *, dtype: torch.dtype) -> Any:
    """The model with every weight partitioned among the ranks, at stage 3; as it is at a lower one.

    A weight is taken out of the copy that processes share one at a time, so that no rank ever has all of them.
    """
    if group.sharding.zero_stage < 3:
        return core
    deepspeed, settings = library(), settings_of(group.sharding, stage=3, dtype=dtype)
    for module in core.modules():
        whole = [one for one in module.parameters(recurse=False) if not is_partitioned(one)]
        for one in whole:
            one.data = one.data.clone()  # what is shared may not be written, as the ranks do to agree on it
        if whole:
            only = torch.nn.ParameterList(whole)
            deepspeed.zero.Init(module=only, config_dict_or_path=settings, dtype=dtype)
    deepspeed.initialize(model=core, config=settings)
    return core


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed has a weight in parts."""
    return "ds_id" in vars(parameter)


def held(core: torch.nn.Module) -> int:
    """How many numbers of the base this rank holds."""
    frozen = [one for one in core.parameters() if not one.requires_grad]
    return sum(vars(one)["ds_tensor"].numel() if is_partitioned(one) else one.numel() for one in frozen)


class Holder(torch.nn.Module):
    """A model of one parameter, whose gradient is what it is called with: what DeepSpeed steps along."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__()
        self.flat = torch.nn.Parameter(flat.detach().clone())

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The product, whose derivative is `gradient`."""
        return (self.flat * gradient).sum()


class ShardedOptimizer:
    """The optimizer of an adapter, its state partitioned from stage 1 on; begun anew for each client without being built again."""

    def __init__(self, optimizer: torch.optim.Optimizer, holder: Holder, group: Group) -> None:
        self._stage = min(group.sharding.zero_stage, 2)
        self._holder = holder
        self._engine, *_ = library().initialize(
            model=holder, optimizer=optimizer, config=settings_of(group.sharding, stage=self._stage, dtype=torch.float32)
        )

    def begin(self, **settings: float) -> None:
        """Forgets every step, and takes these settings of the optimizer (`lr`, `weight_decay`)."""
        inner = self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer
        inner.state.clear()
        for group in inner.param_groups:
            group.update({name: value for name, value in settings.items() if name in group})

    def step(self, flat: torch.Tensor, gradient: torch.Tensor) -> None:
        """Steps `flat` along the gradient, which is the same at every rank."""
        self._holder.flat.data.copy_(flat)
        if self._stage:
            self._engine.optimizer.refresh_fp32_params()
        self._engine.backward(self._engine(gradient))
        self._engine.step()
        flat.copy_(self._holder.flat.data)
