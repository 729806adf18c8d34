"""Read frames of the narrative world: how many are there and, of a lone one, its kind, colour, hue, pattern, accessory.

A small network of our own, so that generated frames can be judged without a human. It knows single frames: not prompts,
not time, and not who is meant. Its weights ship in `assets/reader`; `training/reader.py` makes them.

Legend: N frames, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from slotmemory.codecs.base import check_tensors, read_metadata_json, read_tensors, to_float
from slotmemory.errors import InputError
from slotmemory.tree import atomic_file
from slotmemory.world.entities import ACCESSORIES, PATTERNS
from slotmemory.world.vocabulary import COLOURS, KINDS

HEIGHT, WIDTH = 48, 80  # pixels: half the world's size shows all that is asked
NOBODY, ONE, SEVERAL = "nobody", "one", "several"
ANSWERS: dict[str, tuple[str, ...]] = {
    "count": (NOBODY, ONE, SEVERAL),
    "kind": KINDS,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "accessory": ACCESSORIES,
}


@dataclass(frozen=True)
class Reading:
    """What some frames of one moment show. hue in degrees; sure: the probability of each answer given."""

    count: str
    kind: str
    colour: str
    hue: float
    pattern: str
    accessory: str
    sure: Mapping[str, float]

    @property
    def present(self) -> bool:
        return self.count != NOBODY

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain values for JSON; `Reading(**values)` reads them back."""
        return {k: dict(v) if k == "sure" else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Seen:
    """Answers per frame: logits by question [N, answers], body colour [N, 3] in [-1, 1], hue as (cos, sin) [N, 2]."""

    logits: dict[str, Tensor]
    rgb: Tensor
    guess: Tensor  # [N, 3]: the body colour expected before looking at pixels; for the loss
    hue: Tensor


def hue_vector(rgb: Tensor) -> Tensor:
    """Hue of colours [..., 3] (any scale and offset) as (cos, sin) [..., 2]: the hexagonal hue of HSL and HSV."""
    (red, green, blue), top, low = rgb.unbind(-1), rgb.amax(-1), rgb.amin(-1)
    spread = (top - low).clamp_min(1e-4)
    sector = torch.where(
        top == red,
        (green - blue) / spread,
        torch.where(top == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    angle = sector * (math.pi / 3)
    return torch.stack((angle.cos(), angle.sin()), -1)


def degrees(vector: Tensor) -> Tensor:
    """(cos, sin) [..., 2] -> degrees in [0, 360)."""
    return torch.rad2deg(torch.atan2(vector[..., 1], vector[..., 0])) % 360.0


class Reader(nn.Module):
    """Convolutions name what is there; the hue is not guessed but measured, over the pixels near the named colour."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128), size: tuple[int, int] | None = None) -> None:
        """size: height and width that frames are scaled to; default HEIGHT, WIDTH."""
        super().__init__()
        self.widths, self.size = tuple(widths), tuple(size or (HEIGHT, WIDTH))
        first, second, third, last = self.widths
        self.shapes = nn.Sequential(
            *_block(3, first, 5, stride=2), *_block(first, second, 3, stride=2), *_block(second, third, 3, stride=2)
        )
        # + 2: where a cell is, for a hat is a hat by its place
        self.whole = nn.Sequential(*_block(third + 2, last, 3), *_block(last, last, 3))
        self.code = nn.Sequential(nn.Linear(2 * last, last), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(last, len(answers)) for name, answers in ANSWERS.items()})
        self.body = nn.Linear(last, 3)
        self.place = nn.Conv2d(last, 1, 1)
        self.strictness = nn.Parameter(torch.tensor(2.0))  # log of how fast pixels of another colour stop counting

    def forward(self, frames: Tensor) -> Seen:
        """frames [N, 3, H, W] in [-1, 1]."""
        if frames.shape[-2:] != self.size:
            frames = F.interpolate(frames, self.size, mode="bilinear", align_corners=False, antialias=True)
        x = self.shapes(frames)
        x = self.whole(torch.cat((x, _coordinates(x)), 1))
        code = self.code(torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1))
        guess = self.body(code)
        near = (frames - guess[..., None, None]).square().sum(1)  # [N, H, W]
        place = F.interpolate(self.place(x), self.size, mode="bilinear", align_corners=False)[:, 0]
        weight = (place - self.strictness.exp() * near).flatten(1).softmax(-1)
        rgb = (frames.flatten(2) * weight[:, None]).sum(-1)
        return Seen({name: head(code) for name, head in self.heads.items()}, rgb, guess, hue_vector(rgb))

    @torch.no_grad()
    def read(self, frames: Tensor) -> Reading:
        """Read frames uint8 [N, 3, H, W] of one moment as one; their answers are averaged in logit space."""
        return self.summarise(self(to_float(frames)))

    @staticmethod
    def summarise(seen: Seen) -> Reading:
        """Average the answers of all frames into one reading."""
        answers, sure = {}, {}
        for name, logits in seen.logits.items():
            probability, best = logits.float().mean(0).softmax(-1).max(-1)
            answers[name], sure[name] = ANSWERS[name][int(best)], round(float(probability), 4)
        return Reading(**answers, hue=round(float(degrees(seen.hue.mean(0))), 2), sure=sure)

    def metadata(self) -> dict[str, str]:
        """What a weights file says about itself."""
        config = {"widths": self.widths, "size": self.size}
        return {"kind": "reader", "config": json.dumps(config), "answers": json.dumps(ANSWERS)}

    def save(self, path: str | Path) -> None:
        """Write the weights in fp16: half the bytes, and no answer changes."""
        tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_file(path) as file:
            file.write(to_bytes(tensors, metadata=self.metadata()))

    @classmethod
    def load(cls, path: str | Path | None = None) -> Reader:
        """Read weights, by default those that ship; computes in fp32."""
        path = Path(path) if path else shipped()
        tensors, metadata = read_tensors(path)
        answers = read_metadata_json(metadata, "answers", path)
        if {name: tuple(known) for name, known in answers.items()} != ANSWERS:
            raise InputError(f"{path} gives other answers than {ANSWERS}; train recipes/train/tiny/reader.yaml anew")
        reader = cls(**read_metadata_json(metadata, "config", path))
        check_tensors(tensors, reader.state_dict(), path)
        reader.load_state_dict(tensors)
        return reader.eval().requires_grad_(False)


def shipped() -> Path:
    """Where the package keeps the reader's weights."""
    return Path(str(files("slotmemory") / "assets" / "reader" / "reader.safetensors"))


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.GroupNorm(8, outputs), nn.ReLU(inplace=True)]


def _coordinates(x: Tensor) -> Tensor:
    """Columns and rows of x [N, C, h, w] in [-1, 1]: [N, 2, h, w]."""
    height, width = x.shape[-2:]
    across = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device).expand(height, width)
    down = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)[:, None].expand(height, width)
    return torch.stack((across, down)).expand(len(x), -1, -1, -1)
