"""Which items of a full bank say what others say too: a bank that covers what was seen, in place of what is asked for.

Ours, beside SlotMemory (arXiv 2605.31033), which evicts what is least relevant to the present prompt - and so first of all
whoever the prompt does not name, who is away. It knows vectors, scores and counts, not what they stand for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.slots.precision import full_precision


@full_precision
@torch.no_grad()
def covering(looks: Tensor, score: Tensor, present: Tensor, free: Tensor, count: int) -> Tensor:
    """Choose which items stay, until every row has `count`: [B, M] bool, among those present.

    looks [B, M, C]: what items are compared by, cosine about their mean; score [B, M]: of the two most alike the lower
    leaves; present, free [B, M] bool: which items there are, and which of them may leave. Items of score -inf leave first.
    A row whose items may not leave keeps more than `count`."""
    number = present.sum(1)
    mean = (looks * present[..., None]).sum(1, keepdim=True) / number.clamp_min(1)[:, None, None]
    directions = F.normalize(looks - mean, dim=-1)
    alike = directions @ directions.mT
    alike.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
    stays, worthless = present.clone(), free & present & score.isneginf()
    rows = torch.arange(len(looks), device=looks.device)
    for _ in range(max(0, looks.shape[1] - count)):
        may = stays & free
        pairs = stays[:, :, None] & stays[:, None] & (may[:, :, None] | may[:, None])
        closest, pair = alike.masked_fill(~pairs, float("-inf")).flatten(1).max(1)
        i, j = pair // looks.shape[1], pair % looks.shape[1]
        first = may[rows, i] & (~may[rows, j] | (score[rows, i] < score[rows, j]))
        rejected = (worthless & stays).any(1)
        leaves = torch.where(rejected, (worthless & stays).to(torch.uint8).argmax(1), torch.where(first, i, j))
        too_many = (stays.sum(1) > count) & (rejected | closest.isfinite())
        stays[rows, leaves] &= ~too_many
    return stays
