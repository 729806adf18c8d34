"""Who attends to whom: the ways a self-attention layer can be given keys and values beside the chunk's own.

The backbone computes rotated queries and keys and calls `pattern(layer, query, key, value, hidden)`; it does not know
which pattern, or which memory behind it, is in use. Query, key, value and what comes back are [B, N, H, D], hidden
[B, N, C] is the normed, modulated input they were projected from; softmax scale 1 / sqrt(D), accumulated in fp32 by the
kernel. Nothing here knows a backbone: policies that act inside attention (`Memory.attend`) build on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query [B, N, H, D], key and value [B, M, H, D] -> [B, N, H, D]


class Pattern(Protocol):
    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Chosen:
    """A kernel that takes the place of torch's, for the kind of tensors that it was checked on: device type, dtype and
    head dim. It need not know masks or gradients."""

    run: Attend
    kind: tuple[str, torch.dtype, int]

    def takes(self, query: Tensor) -> bool:
        if torch.is_grad_enabled() and query.requires_grad:
            return False
        return self.kind == (query.device.type, query.dtype, query.shape[-1])


_chosen: Chosen | None = None


def choose(kernel: Chosen | None) -> None:
    """Set the process's kernel, None for torch's; which are right is known in `kernels.py`."""
    global _chosen
    _chosen = kernel


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of query [B, N, H, D] over key, value [B, M, H, D]; mask broadcasts to [B, H, N, M]."""
    if mask is None and _chosen is not None and _chosen.takes(query):
        return _chosen.run(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None and query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        # the fused kernel's backward takes 5 times as long on CPUs when there are few keys, as a prompt's
        return _explicit(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention by matrix products, [B, H, N, D]; the softmax kernel sums in fp32 whatever the input's dtype."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (weights if bias is None else weights + bias.to(q.dtype)).softmax(-1) @ v


class Dense:
    """Tokens of one call attend to each other; `sees` [F, F] says which latent frame sees which (None: all see all)."""

    def __init__(self, sees: Tensor | None = None):
        self.sees = sees

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        if self.sees is None:
            return attend(query, key, value)
        per_frame = query.shape[1] // self.sees.shape[0]
        mask = self.sees.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
        return attend(query, key, value, mask)


class Buffered:
    """Streaming: every layer attends to [what was read from memory | the chunk's own tokens].

    `context` holds per layer rotated keys and values [B, M, H, D]. Without gradients the chunk's own keys and values are
    written into the tail of one buffer that lives as long as the chunk, so that no denoising step clones or joins caches.
    """

    def __init__(self, context: Sequence[tuple[Tensor, Tensor]]):
        self.context = context
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * len(context)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        return attend(query, *self.joined(layer, key, value))

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the chunk's own keys and values behind what was read: two [B, M + N, H, D], valid until the next call."""
        past_key, past_value = self.context[layer]
        past = past_key.shape[1]
        if past == 0:
            return key, value
        if torch.is_grad_enabled() and (key.requires_grad or past_key.requires_grad):
            return torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        buffer = self.buffers[layer]
        if buffer is None:
            buffer = (torch.cat((past_key, key), 1), torch.cat((past_value, value), 1))
            self.buffers[layer] = buffer
        else:
            buffer[0][:, past:], buffer[1][:, past:] = key, value
        return buffer


class Rows:
    """Training: batch rows are chunks, and row r attends to the tokens of the rows in table[r], always including itself.

    table [R, K] holds row numbers, -1 for nothing. hidden [R, N], if given, is True for tokens that other rows must not
    see (a row always sees all of itself). Explicit matrix products: on CPUs they are faster than the fused kernel in the
    backward pass of many short sequences.
    """

    def __init__(self, table: Tensor, tokens: int, hidden: Tensor | None = None):
        rows, reads = table.shape
        self.index = table.clamp(min=0).flatten()
        closed = (table < 0)[..., None].expand(rows, reads, tokens)
        if hidden is not None:
            closed = closed | hidden[self.index].view(rows, reads, tokens)
        closed = torch.cat((closed.flatten(1), torch.zeros(rows, tokens, dtype=torch.bool, device=table.device)), 1)
        self.bias = torch.zeros(rows, 1, 1, closed.shape[1], device=table.device).masked_fill_(
            closed[:, None, None], float("-inf")
        )
        self.reads = reads

    def gather(self, x: Tensor) -> Tensor:  # [R, N, H, D] -> [R, H, (K + 1) N, D]
        rows, tokens, heads, dim = x.shape
        read = x.index_select(0, self.index).view(rows, self.reads * tokens, heads, dim)
        return torch.cat((read, x), 1).transpose(1, 2)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        return _explicit(query.transpose(1, 2), self.gather(key), self.gather(value), self.bias).transpose(1, 2)
