"""Objective: teach a reader to name what generated frames of the narrative world show.

Rendered frames are too clean a lesson: many pass through the trained codec, with noise on their latents, all are
blurred, washed and grained at random in ways that leave the hue alone, and some are ruined, so that a reader learns
what is nobody. It does not know what the answers are for.

Reels are made and replaced as `narratives.Pool` does it, so a resumed run sees what an uninterrupted one would have.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from slotmemory.codecs.base import num_latents, to_float, to_uint8
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.evaluation.reader import ANSWERS, NOBODY, ONE, SEVERAL, Reader, Seen
from slotmemory.training import loop
from slotmemory.training.narratives import HELD_OUT, Pool, PoolSize, Refresh
from slotmemory.training.recipe import Frozen
from slotmemory.world.clock import FRAMES_PER_CHUNK, chunk_frames
from slotmemory.world.entities import Entity
from slotmemory.world.grammar import Role, ShotSpec
from slotmemory.world.narrative import Narrative
from slotmemory.world.vocabulary import ACTIONS, COLOURS, KINDS, SCENES

UNKNOWN = -1  # an answer that is not asked for
SHOWS, HIDDEN = 0.8, 0.08  # shares of a body from which on it counts, and up to which it does not


class Options(Frozen):
    """What the reader objective may be told."""

    widths: tuple[int, ...] = (24, 48, 96, 128)
    codec: str | None = Field(None, description="weights of the codec that frames pass through; none: they do not")
    coded: float = Field(0.6, ge=0, le=1, description="share of frames that come out of the codec")
    latent_noise: float = Field(0.3, ge=0, description="largest noise on normalised latents before decoding")
    frames: int = Field(9, ge=5, le=FRAMES_PER_CHUNK, description="pixel frames of a clip, 4 n + 1")
    every: int = Field(2, ge=1, description="of which every so many are kept")
    clips: int = Field(8, ge=1, description="clips of a reel")
    pool: PoolSize = 48
    refresh: Refresh = 3
    empty: float = Field(0.08, ge=0, le=1, description="share of clips that show nobody")
    pairs: float = Field(0.12, ge=0, le=1, description="share of clips that show two")
    entrance: float = Field(0.3, ge=0, le=1, description="share of clips of one in which it comes, or another leaves")
    blur: float = Field(0.6, ge=0, le=1, description="share of frames that are blurred")
    grain: float = Field(0.05, ge=0, description="largest noise on pixels in [-1, 1]")
    wash: float = Field(0.12, ge=0, description="largest change of brightness, contrast and saturation")
    ruined: float = Field(0.08, ge=0, le=1, description="share of frames that are ruined until nobody is left to see")
    hue_weight: float = Field(3.0, ge=0)
    held_out: int = Field(24, ge=1, description="reels of the validation")


@dataclass(frozen=True)
class Reel:
    """Frames and the truth about each; K frames, answers are positions in `ANSWERS` or UNKNOWN.

    clean, coded: uint8 [K, 3, H, W]; answers: by question [K]; hue: degrees [K]; rgb: body colour [K, 3] in [-1, 1]."""

    clean: Tensor
    coded: Tensor
    answers: dict[str, Tensor]
    hue: Tensor
    rgb: Tensor

    def take(self, index: Tensor) -> Reel:
        return self._map(lambda x: x[index])

    def _map(self, change) -> Reel:
        answers = {name: change(x) for name, x in self.answers.items()}
        return Reel(change(self.clean), change(self.coded), answers, change(self.hue), change(self.rgb))

    @staticmethod
    def join(reels: list[Reel]) -> Reel:
        parts = {f.name: [getattr(reel, f.name) for reel in reels] for f in fields(Reel) if f.name != "answers"}
        answers = {name: torch.cat([reel.answers[name] for reel in reels]) for name in ANSWERS}
        return Reel(**{name: torch.cat(tensors) for name, tensors in parts.items()}, answers=answers)


def sample_narrative(options: Options, rng: np.random.Generator, seed: int) -> Narrative:
    """Roll a short narrative of which the last two chunks are worth reading."""
    scene, before = (str(x) for x in rng.choice(SCENES, 2, replace=False))
    names = [(COLOURS[i // len(KINDS)], KINDS[i % len(KINDS)]) for i in rng.permutation(len(COLOURS) * len(KINDS))[:3]]
    cast = [Role(colour, kind, str(rng.choice(ACTIONS))) for colour, kind in names]
    roll = rng.random()
    shown = 0 if roll < options.empty else 2 if roll < options.empty + options.pairs else 1
    if shown == 1 and rng.random() < options.entrance:
        # in one scene people walk in and out; another scene would be a cut
        before = scene
    opening = ShotSpec(before, (cast[2],) if rng.random() < 0.5 else ())
    if opening.scene == scene and not opening.roles and not shown:
        opening = ShotSpec(scene, (cast[2],))
    return Narrative([(opening, 0), (ShotSpec(scene, tuple(cast[:shown])), 1)], 3, seed)


def label(narrative: Narrative, first: int, last: int, every: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Answer for every so many frames of first..last-1: answers, hue [K] and body colour [K, 3]."""
    visibility = narrative.truth(first, last).visibility[:, ::every]  # [E, K]
    frames = visibility.shape[1] if len(visibility) else len(range(first, last, every))
    answers = {name: torch.full((frames,), UNKNOWN) for name in ANSWERS}
    hue, rgb = torch.zeros(frames), torch.zeros(frames, 3)
    for k in range(frames):
        shares = visibility[:, k]
        whole = np.flatnonzero(shares >= SHOWS)
        if len(whole) + np.count_nonzero(shares <= HIDDEN) < len(shares):
            continue  # somebody is half there: neither answer would be wrong
        answers["count"][k] = ANSWERS["count"].index((NOBODY, ONE, SEVERAL)[min(len(whole), 2)])
        if len(whole) == 1:
            entity: Entity = narrative.entities[whole[0]]
            for name in ("kind", "colour", "pattern", "accessory"):
                answers[name][k] = ANSWERS[name].index(getattr(entity, name))
            hue[k] = entity.hue
            rgb[k] = torch.tensor(entity.rgb) / 127.5 - 1.0
    return answers, hue, rgb


class Reels:
    """Make reels; everything about one follows from its seed."""

    def __init__(self, options: Options, codec: PreviewCodec | None) -> None:
        self.options, self.codec = options, codec
        num_latents(options.frames)

    def make(self, seed: int) -> Reel:
        options = self.options
        rng = np.random.default_rng(seed)
        clips, answers, hues, colours = [], [], [], []
        for _ in range(options.clips):
            # a narrative's seed settles who is who: held-out reels show individuals that training never met
            own = int(rng.integers(HELD_OUT)) + (seed >= HELD_OUT) * HELD_OUT
            narrative = sample_narrative(options, rng, own)
            first = int(rng.integers(chunk_frames(1).start, chunk_frames(2).stop - options.frames + 1))
            clips.append(torch.from_numpy(narrative.render(first, first + options.frames)))
            found, hue, rgb = label(narrative, first, first + options.frames, options.every)
            answers.append(found)
            hues.append(hue)
            colours.append(rgb)
        clean = torch.stack(clips)
        coded = self.through_codec(clean, torch.Generator().manual_seed(seed))
        return Reel(
            clean[:, :: options.every].flatten(0, 1),
            coded[:, :: options.every].flatten(0, 1),
            {name: torch.cat([found[name] for found in answers]) for name in ANSWERS},
            torch.cat(hues),
            torch.cat(colours),
        )

    @torch.no_grad()
    def through_codec(self, clips: Tensor, random: torch.Generator) -> Tensor:
        """Encode, add noise to the latents and decode: uint8 [B, T, 3, H, W] -> the same."""
        if self.codec is None:
            return clips
        latents = self.codec.encode(to_float(clips).to(self.codec.dtype)).float()
        amount = torch.rand(len(clips), 1, 1, 1, 1, generator=random) * self.options.latent_noise
        latents = latents + amount * torch.randn(latents.shape, generator=random)
        return to_uint8(self.codec.decode(latents.to(self.codec.dtype)))


def spoil(frames: Tensor, rgb: Tensor, options: Options, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spoil frames [K, 3, H, W] in [-1, 1] and the body colours [K, 3] that they show; hues stay."""
    count = len(frames)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=random)

    flip = draw(1, 1, 1) < 0.5
    frames = torch.where(flip, frames.flip(-1), frames)
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(3, 1, 5, 5)
    soft = F.conv2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    frames = frames.lerp(soft, draw(1, 1, 1) * (draw(1, 1, 1) < options.blur))
    # grey mixed in, scale and offset equal in all channels: none of them turns the hue
    grey, scale = 1 + options.wash * (2 * draw(1, 1, 1) - 1), 1 + options.wash * (2 * draw(1, 1, 1) - 1)
    offset = options.wash * (2 * draw(1, 1, 1) - 1)

    def wash(x: Tensor) -> Tensor:
        luma = x.mean(1, keepdim=True)
        return (luma + (x - luma) * grey) * scale + offset

    noise = draw(1, 1, 1) * options.grain * torch.randn(frames.shape, generator=random)
    return (wash(frames) + noise).clamp(-1, 1), wash(rgb[..., None, None])[..., 0, 0]


def ruin(frames: Tensor, random: torch.Generator, block: int = 8) -> Tensor:
    """Make frames [K, 3, H, W] that show nobody any more: blocks exchanged, or one colour per block.

    Bad generated frames look like this, and a reader must not see somebody in them."""
    count, _, height, width = frames.shape
    cells = F.pixel_unshuffle(frames, block).flatten(2)  # [K, 3 block block, blocks]
    order = torch.rand(count, 1, cells.shape[-1], generator=random).argsort(-1).expand_as(cells)
    shuffled = F.pixel_shuffle(cells.gather(-1, order).unflatten(-1, (height // block, width // block)), block)
    flat = F.interpolate(F.avg_pool2d(frames, block), (height, width), mode="bilinear", align_corners=False)
    return torch.where(torch.rand(count, 1, 1, 1, generator=random) < 0.5, shuffled, flat)


class Objective(loop.Objective):
    def __init__(self, options: Options, context: loop.Context):
        self.options, self.context = options, context
        self.reader = Reader(options.widths)
        codec = None
        if options.codec:
            codec = PreviewCodec.load(options.codec).eval().requires_grad_(False)
        self.reels = Reels(options, codec)
        self.pool = Pool(self.reels.make, options.pool, options.refresh, context.seed, context.rank)
        self.held_out: dict[str, Reel] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"reader": self.reader}

    def metadata(self, module: str) -> dict[str, str]:
        return self.reader.metadata()

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        reels, device = self.pool.at(step), self.context.device
        chosen = torch.randint(len(reels), (self.context.batch,), generator=generator).tolist()
        picks = torch.rand(self.context.batch, generator=generator).tolist()
        rows = [reels[i].take(torch.tensor([int(pick * len(reels[i].hue))])) for i, pick in zip(chosen, picks)]
        batch = Reel.join(rows)
        coded = torch.rand(len(rows), 1, 1, 1, generator=generator) < self.options.coded
        frames, rgb = spoil(to_float(torch.where(coded, batch.coded, batch.clean)), batch.rgb, self.options, generator)
        ruined = torch.rand(len(rows), generator=generator) < self.options.ruined
        frames = torch.where(ruined[:, None, None, None], ruin(frames, generator), frames)
        for name, answer in batch.answers.items():
            answer[ruined] = ANSWERS["count"].index(NOBODY) if name == "count" else UNKNOWN
        seen = loop.cast_call(self.reader, self.context.dtype, frames.to(device, self.context.dtype))
        terms = losses(seen, batch, rgb)
        loss = sum(terms[name] for name in ANSWERS) + self.options.hue_weight * terms["hue"] + terms["rgb"]
        return loss, terms

    def validate(self, step: int) -> dict[str, float]:
        """Shares of clips of held-out narratives that are read right, and the hue's mean error, clean and coded."""
        if not self.held_out:
            options = self.options.model_copy(update={"latent_noise": 0.1})
            maker = Reels(options, self.reels.codec)
            reels = Reel.join([maker.make(HELD_OUT + i) for i in range(self.options.held_out)])
            self.held_out = {"clean": reels}
            if self.reels.codec is not None:
                self.held_out["coded"] = Reel(reels.coded, reels.coded, reels.answers, reels.hue, reels.rgb)
        per_clip = len(range(0, self.options.frames, self.options.every))
        results = {}
        for name, reel in self.held_out.items():
            results |= {f"{name}_{k}": v for k, v in accuracy(self.reader, reel, per_clip).items()}
        return results


def losses(seen: Seen, batch: Reel, rgb: Tensor) -> dict[str, Tensor]:
    """Cross-entropy per question, distance of the hue's unit vectors (about radians) and squared error of colours."""
    device = seen.rgb.device
    terms = {}
    for name, logits in seen.logits.items():
        target = batch.answers[name].to(device)
        total = F.cross_entropy(logits.float(), target, ignore_index=UNKNOWN, reduction="sum")
        terms[name] = total / (target != UNKNOWN).sum().clamp(min=1)
    one = (batch.answers["kind"] != UNKNOWN).to(device)
    among = one.sum().clamp(min=1)
    angle = torch.deg2rad(batch.hue).to(device)
    away = (seen.hue.float() - torch.stack((angle.cos(), angle.sin()), -1)).square().sum(-1)
    terms["hue"] = ((away + 1e-6).sqrt() * one).sum() / among
    error = (seen.guess.float() - rgb.to(device)).square() + (seen.rgb.float() - rgb.to(device)).square()
    terms["rgb"] = (error.sum(-1) * one).sum() / among
    return terms


@torch.no_grad()
def accuracy(reader: Reader, reel: Reel, per_clip: int) -> dict[str, float]:
    """Read every clip of a reel as one moment -> share right per question, mean and largest common hue error.

    Only clips count in which every frame has the same known answer."""
    device = next(reader.parameters()).device
    right: dict[str, list[float]] = {name: [] for name in (*ANSWERS, "hue")}
    for first in range(0, len(reel.hue), per_clip):
        clip = reel.take(torch.arange(first, first + per_clip))
        reading = reader.summarise(reader(to_float(clip.clean).to(device)))
        for name, known in ANSWERS.items():
            answer = clip.answers[name]
            if int(answer[0]) != UNKNOWN and bool((answer == answer[0]).all()):
                right[name].append(float(getattr(reading, name) == known[int(answer[0])]))
                if name == "kind":
                    right["hue"].append(abs((reading.hue - float(clip.hue[0]) + 180.0) % 360.0 - 180.0))
    results = {name: float(np.mean(values)) for name, values in right.items() if values and name != "hue"}
    if right["hue"]:
        results |= {"hue_error": float(np.mean(right["hue"])), "hue_error_p95": float(np.percentile(right["hue"], 95))}
    return results
