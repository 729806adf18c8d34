"""Networks over several processes: sharded weights (FSDP2), shared tokens (Ulysses), and tensors of which each holds a part.

It knows that a transformer has `blocks` and what of them runs apart, and no training. Sharded weights live as one share per
process in fp32; a block's are gathered, cast, when it runs and let go afterwards. That takes the same passes on all
processes, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """Leave every process of the mesh a share of a transformer's weights, block by block; it runs in `dtype`.

    All processes must hold the same weights now. Gradients are averaged over the mesh in fp32."""
    how = {
        "mesh": mesh,
        "reshard_after_forward": True,  # of the root too: what stays gathered would miss the next update
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
    }
    for block in network.blocks:
        cross = block.cross_attn
        fully_shard([cross.k, cross.norm_k, cross.v], **how)  # a prompt's keys are made outside the block's pass
        fully_shard(block, **how)
    fully_shard(network, **how)
    # nothing that a network returns is edited in place, of which torch warns with every step
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for method in ("text_keys", "run"):
        register_fsdp_forward_method(network, method)


def sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def fixed(module: nn.Module) -> Iterator[None]:
    """Let what a module's weights compute in here take no gradient to them."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# tensors of which every process holds a part


def local(tensor: Tensor) -> Tensor:
    """This process's part; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is a part, all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`; the tensor itself where `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def spread(part: Tensor, like: Tensor) -> Tensor:
    """Name a process's part as such, of a tensor that is spread as `like` is; whole where `like` is."""
    if not isinstance(like, DTensor) or part.shape != like.to_local().shape:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a module's weights and buffers, of which this process may hold a part."""
    for name, tensor in module.state_dict().items():
        local(tensor).copy_(part_of(tensors[name], tensor))


# groups of processes


def groups(degree: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Divide all processes: those with samples of their own beside this one, and those with the same samples.

    degree: neighbours that share the tokens of the same samples. None where there is one group, or nothing to share."""
    if degree == 1:
        return None, None
    world, rank = dist.get_world_size(), dist.get_rank()
    across = [dist.new_group(list(range(first, world, degree))) for first in range(degree)]
    within = [dist.new_group(list(range(first, first + degree))) for first in range(0, world, degree)]
    return across[rank % degree], within[rank // degree]
