"""The embedded model's text encoder: a few words in, one vector per word out.

It knows token ids and nothing of the world that the words describe; `world.vocabulary` turns a prompt into words, and
an unknown word is refused there. Trained together with the transformer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slotmemory.world.grammar import parse
from slotmemory.world.vocabulary import WORDS, canonical

IDS = {word: i for i, word in enumerate(WORDS)}


class WordEncoder(nn.Module):
    """Embed canonical words and let them see each other once, so that a colour knows its noun."""

    def __init__(self, dim: int = 128, length: int = 12, heads: int = 4):
        super().__init__()
        self.dim, self.length, self.heads = dim, length, heads
        self.embedding = nn.Embedding(len(WORDS), dim)
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.mix = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)
        nn.init.normal_(self.embedding.weight, std=1.0)

    def tokenise(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into ids [B, length], padded with 0; an empty prompt is all padding (the unconditional text)."""
        ids = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = canonical(prompt) if prompt else []
            if len(words) > self.length:
                raise ValueError(f"prompt '{prompt[:60]}' has {len(words)} content words; at most {self.length} fit")
            ids[row, : len(words)] = torch.tensor([IDS[w] for w in words], dtype=torch.long)
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, length] -> [B, length, dim]; rows of padding are zero, as Wan's text encoder leaves them."""
        blank = ids == 0
        x = self.embedding(ids) + self.position
        # an unconditional row has nothing to attend to: let it attend to itself and blank the result
        x = self.mix(x, src_key_padding_mask=blank & ~blank.all(1, keepdim=True))
        return x.masked_fill(blank[..., None], 0.0)

    def check(self, prompt: str) -> None:
        """Raise for a prompt that cannot be understood, before anything is made of it."""
        self.tokenise([prompt])
        parse(prompt)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts -> embeddings [B, length, dim] and the number of words of each [B]."""
        ids = self.tokenise(prompts).to(self.position.device)
        return self(ids), (ids != 0).sum(1)
