"""The causal Wan transformer, configured by size: 1.3B, 14B and the embedded model are one class.

It knows latents, timesteps, text and positions. It does not know what a memory is: what to attend to beside the given
frames comes in as an attention pattern (`attention.py`), and what a memory may want to keep goes out as `Seen`.
Module names are those of the published Wan2.1 weights. Source: Wan2.1 `wan/modules/model.py` and its causal descendants
(Self-Forcing): per-frame modulation, full-width RMS norm of q and k, three-axis rotary positions, padded text attended.

Legend: B batch, F latent frames, n tokens per latent frame, N = F n, H heads, D head dim, C = H D width, L text tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.backbones.attention import Dense, Pattern, attend
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.backbones.sequence import Gathered, Ulysses

TextKeys = Sequence[tuple[Tensor, Tensor]]  # per layer: keys and values [B, L, H, D] of the prompt


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one Wan transformer; the defaults are T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.patch[0] != 1:
            raise ValueError(f"patch={self.patch} joins latent frames; the causal transformer needs (1, height, width)")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WanConfig:
        values = json.loads(text)
        return cls(**{**values, "patch": tuple(values["patch"])})


class Seen(NamedTuple):
    """What one layer saw in a pass: the raw material of every memory.

    keys, values [B, N, H, D] un-rotated; hidden [B, N, C] the normed, modulated input of self-attention;
    text_query [B, N, H, D] the cross-attention queries of the same tokens; query [B, N, H, D] the self-attention queries,
    un-rotated.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor
    text_query: Tensor
    query: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, in fp32, before the split into heads."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections shared by self- and cross-attention."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer-norm x [B, F, n, C] without weights, then scale and shift per frame ([B, F, 1, C])."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        turn: tuple[Tensor, Tensor],
        pattern: Pattern,
        layer: int,
    ) -> tuple[Tensor, Seen]:
        """x [B, F, n, C], modulation [B, F, 6, C] -> x and what this layer saw."""
        # [B, F, 6, 1, C]: shift, scale and gate of attention, then of the feed-forward part
        modulation = (self.modulation + modulation).unsqueeze(3)
        query, key, value, hidden, turned = self.enter(x, modulation, turn)
        mixed = pattern(layer, *turned, value, hidden)
        x, text_query = self.leave(x, mixed, modulation, text)
        return x, Seen(key, value, hidden, text_query, query)

    # what comes before and after self-attention, by itself: these two are compiled where that is asked for, and take the
    # block's whole modulation [B, F, 6, 1, C]

    def enter(
        self, x: Tensor, modulation: Tensor, turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """-> query, key, value [B, N, H, D], hidden [B, N, C], and query and key rotated."""
        shift, scale = modulation.unbind(2)[:2]
        hidden = modulate(x, shift, scale, self.eps).flatten(1, 2)
        query = self.self_attn.query(hidden)
        key, value = self.self_attn.key_value(hidden)
        return query, key, value, hidden, (rotate(query, *turn), rotate(key, *turn))

    def leave(self, x: Tensor, mixed: Tensor, modulation: Tensor, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Attended values mixed [B, N, H, D] -> x, and the queries of cross-attention [B, N, H, D]."""
        gate1, shift, scale, gate2 = modulation.unbind(2)[2:]
        x = x + gate1 * self.self_attn.o(mixed.flatten(2)).view(x.shape)
        text_query = self.cross_attn.query(self.norm3(x).flatten(1, 2))
        x = x + self.cross_attn.o(attend(text_query, *text).flatten(2)).view(x.shape)
        x = x + gate2 * self.ffn(modulate(x, shift, scale, self.eps))
        return x, text_query


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        # the head is modulated by the time embedding itself, not by its six-way projection
        shift, scale = (self.modulation + embedded.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class CausalWan(nn.Module):
    """Predict the flow of latent frames, given their noise levels, a prompt, positions and an attention pattern."""

    sequence: Ulysses | None = None  # with whom the tokens of a pass are shared

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.initialise()

    def initialise(self) -> None:
        """Set the starting weights of Wan: xavier linears, small text and time embeddings, a head that predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def patchify(self, latents: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """latents [B, F, C, h, w] -> tokens [B, F, n, dim] and the token grid (rows, columns)."""
        _, ph, pw = self.config.patch
        rows, columns = latents.shape[-2] // ph, latents.shape[-1] // pw
        if (rows * ph, columns * pw) != tuple(latents.shape[-2:]):
            raise ValueError(f"latents of {tuple(latents.shape[-2:])} do not divide into patches of {(ph, pw)}")
        cells = latents.unflatten(-1, (columns, pw)).unflatten(-3, (rows, ph))  # [B, F, C, rows, ph, columns, pw]
        cells = cells.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        # a patch embedding with stride = kernel is a matrix product; 3-D convolutions are slow on CPUs
        return F.linear(cells, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias), (rows, columns)

    def unpatchify(self, cells: Tensor, grid: tuple[int, int]) -> Tensor:
        """cells [B, F, n, ph pw out] (channels last, as the published head orders them) -> [B, F, out, h, w]."""
        _, ph, pw = self.config.patch
        cells = cells.unflatten(-1, (ph, pw, self.config.out_dim)).unflatten(2, grid)  # [B, F, rows, cols, ph, pw, out]
        return cells.permute(0, 1, 6, 2, 4, 3, 5).flatten(-2).flatten(-3, -2)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """timesteps [B, F] in [0, 1000] -> [B, F, dim]; sinusoid [cos | sin] in float64, as published."""
        half = self.config.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        angles = timesteps.to(torch.float64)[..., None] * 10000.0 ** (-steps / half)
        return self.time_embedding(torch.cat((angles.cos(), angles.sin()), -1).to(self.dtype))

    def text_keys(self, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Project a prompt once for all layers: embeddings [B, <= text_len, text_dim] -> per layer K, V [B, text_len, H, D].

        Padding rows are zero before the text embedding and are attended, as in the published checkpoints.
        """
        missing = self.config.text_len - embeddings.shape[1]
        if missing < 0:
            raise ValueError(f"the prompt has {embeddings.shape[1]} tokens; the model takes {self.config.text_len}")
        embedded = self.text_embedding(F.pad(embeddings.to(self.dtype), (0, 0, 0, missing)))
        return [block.cross_attn.key_value(embedded) for block in self.blocks]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextKeys,
        frames: Tensor,
        pattern: Pattern | None = None,
    ) -> tuple[Tensor, list[Seen]]:
        """Predict the flow (noise minus clean) of latents [B, F, C, h, w].

        timesteps [B, F] in [0, 1000]; text from `text_keys`; frames [F] or [B, F] temporal positions; pattern says what
        is attended (default: all given frames see each other). Returns flow [B, F, out, h, w] in latents' dtype and what
        each layer saw.
        """
        x, grid = self.patchify(latents.to(self.dtype))
        turn = rotation(grid_positions(frames.reshape(-1, latents.shape[1]), *grid), self.config.head_dim)
        # the class's own: where weights are sharded, the instance's `run` is an entrance that gathers them first
        x, embedded, seen = CausalWan.run(self, x, timesteps, text, turn, pattern or Dense())
        return self.unpatchify(self.head(x, embedded), grid).to(latents.dtype), seen

    def run(
        self, x: Tensor, timesteps: Tensor, text: TextKeys, turn: tuple[Tensor, Tensor], pattern: Pattern
    ) -> tuple[Tensor, Tensor, list[Seen]]:
        """Run tokens x [B, F, n, dim], wherever they come from, through all layers -> x, embedded timesteps, what was seen.

        turn: `rope.rotation` of their positions [B or 1, F n, 3]; timesteps [B, F] and text as in `forward`.
        """
        embedded = self.embed_time(timesteps)
        modulation = self.time_projection(embedded).unflatten(-1, (6, -1))
        seen, frames, shared = [], x.shape[1], self.sequence
        if shared is not None and not shared.divides(x.shape[2], self.config.num_heads):
            shared = None
        if shared is not None:
            x, turn, pattern = shared.mine(x, 2), shared.turn(turn, frames), shared.pattern(pattern, frames)
        for layer, block in enumerate(self.blocks):
            x, saw = block(x, modulation, text[layer], turn, pattern, layer)
            seen.append(saw)
        if shared is not None:
            x, seen = shared.joined(x), [Gathered(shared, layer, frames) for layer in seen]
        return x, embedded, seen
