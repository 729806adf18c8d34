"""What every latent cell shows, and a linear probe that a transformer's inner features learn to answer it through.

Diffusion models learn faster when an inner layer is also asked for what the clean picture means (REPA, arXiv
2410.06940, with a vision encoder's features). The narrative world knows the answers: who covers a cell, and which part.
It does not know the transformer.

Legend: L latent frames, n cells per latent frame, E entities.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.world.entities import ACCESSORIES, PATTERNS
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import Truth
from slotmemory.world.vocabulary import COLOURS, KINDS, SCENES

# questions and their answers; 0 stands for "nobody" in all but the scene
QUESTIONS = {"kind": KINDS, "colour": COLOURS, "pattern": PATTERNS, "accessory": ACCESSORIES}
SIZES = (*(len(answers) + 1 for answers in QUESTIONS.values()), len(SCENES))


def labels_of(narrative: Narrative, truth: Truth, shares: Tensor, frames_per_chunk: int = 3) -> tuple[Tensor, Tensor]:
    """Answers per cell: int64 [L, n, 5] (kind, colour, pattern, accessory, scene), and where on its owner a cell lies,
    [L, n, 2] (x, y) in half box sizes from the box's middle, 0 on the background.

    shares [E, L, h, w]: the share of each cell that an entity covers, 0 where it does not count."""
    count, latents, height, width = shares.shape
    answers = torch.zeros(count + 1, len(QUESTIONS), dtype=torch.long)
    for number, entity in enumerate(narrative.entities):
        known = [choices.index(getattr(entity, name)) + 1 for name, choices in QUESTIONS.items()]
        answers[number + 1] = torch.tensor(known)
    nobody = torch.full((1, latents, height, width), 1e-6)
    owner = torch.cat((nobody, shares)).argmax(0)  # [L, h, w], 0: nobody
    scenes = [narrative.shot(min(f // frames_per_chunk, narrative.chunks - 1)).spec.scene for f in range(latents)]
    scene = torch.tensor([SCENES.index(name) for name in scenes])[:, None, None].expand(owner.shape)
    labels = torch.cat((answers[owner], scene[..., None]), -1).flatten(1, 2)

    boxes = torch.from_numpy(np.ascontiguousarray(truth.boxes)).float()  # [E, T, 4], zeros when unseen
    boxes = torch.cat((torch.zeros(1, *boxes.shape[1:]), boxes))[:, [0, *range(2, boxes.shape[1], 4)]]  # [E + 1, L, 4]
    box = boxes[owner, torch.arange(latents)[:, None, None]]  # [L, h, w, 4]
    stride = narrative.size.width / width
    x = (torch.arange(width) + 0.5) * stride
    y = (torch.arange(height) + 0.5)[:, None] * stride
    middle, half = (box[..., :2] + box[..., 2:]) / 2, ((box[..., 2:] - box[..., :2]) / 2).clamp(min=1.0)
    place = (torch.stack((x.expand(height, width), y.expand(height, width)), -1) - middle) / half
    return labels, (place.clamp(-2, 2) * (owner > 0)[..., None]).flatten(1, 2)


class Probe(nn.Module):
    """Linear answers from features: [..., dim] -> logits of every question, and the place on the owner."""

    def __init__(self, dim: int):
        super().__init__()
        self.answer = nn.Linear(dim, sum(SIZES) + 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.answer(features)


def probe_loss(answers: Tensor, labels: Tensor, places: Tensor) -> Tensor:
    """Mean cross-entropy over the questions plus the squared error of the place: answers [..., sum(SIZES) + 2]."""
    parts = answers.float().split((*SIZES, 2), -1)
    asked = [F.cross_entropy(part.flatten(0, -2), labels[..., i].flatten()) for i, part in enumerate(parts[:-1])]
    owned = labels[..., 0] > 0
    error = ((parts[-1] - places).square().mean(-1) * owned).sum() / owned.sum().clamp(min=1)
    return torch.stack(asked).mean() + error
