"""Pretraining of the history encoder: from few tokens per frame, a transformer shall paint any frame again.

Stage `query` (frame preservation, arXiv 2512.23851): of a clip, a few runs of frames are drawn at random; all others are
noised, so that what the encoder must keep is what it can see, and nothing tells it in advance where. Its tokens run
through the transformer once; then each run is denoised from noise with nothing but those tokens and its prompt in sight,
and the flow error reaches the encoder. Which frames are asked for is told by their places in time alone.
Stage `next`: the past is clean and complete, and the next chunk is denoised from its tokens and a window of one clean
chunk, exactly as a stream reads them. Started without `init`, it is the ablation without pretraining.

The transformer is fixed unless `tune`. Measured in both stages: PSNR and SSIM of asked-for frames on held-out clips whose
past is clean, against the codec's own picture of the truth, and the same without a memory. A run is decoded after a
copy of its first latent frame, so that nothing of its neighbours is shown.

Left open by the paper and chosen here: a query is a run of `run` consecutive frames (a chunk is what the transformer was
trained to denoise; 1 is the paper's single frame); one noise level hides all other frames of a clip; L(a, b), the shifted
logit-normal in a..b, is a + (b - a) warp(sigmoid(normal)); each encoded frame runs under the prompt it was written under.

Legend: B clips, T latent frames, K encoded frames, g tokens of one, Q queries, R rows, F frames of a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from slotmemory.backbones.attention import Buffered, Dense
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.codecs.base import to_uint8
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.errors import InputError
from slotmemory.evaluation.ssim import ssim
from slotmemory.memory import build
from slotmemory.models import load
from slotmemory.sampler import add_noise
from slotmemory.training import loop
from slotmemory.training.codec import psnr
from slotmemory.training.narratives import HELD_OUT, Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.recipe import Frozen
from slotmemory.training.videos import Shown, Videos
from slotmemory.world.narrative import Narrative

MEMORY = "memory.history"  # the exported file's name, as a model folder has it
ENCODER = ("rate", "width", "heads", "blocks", "span", "branches")  # options that are arguments of `history`

Context = list[tuple[Tensor, Tensor]]  # per layer rotated keys and values [B, M, H, D]


class Options(Frozen):
    """The encoder, the transformer that reads it, and what is asked for."""

    model: str = Field("tiny", description="the model whose transformer and words are used: a name or a folder")
    codec: str | None = Field(None, description="weights of the codec that made its latents; none: the model's own")
    stage: Literal["query", "next"] = "query"
    tune: bool = Field(False, description="train the transformer too")
    rate: str = Field("4x4x2", description="compression against the token grid, HEIGHTxWIDTHxTIME")
    width: int = 512
    heads: int = 8
    blocks: int = 1
    span: int = 8
    branches: Literal["both", "low", "high"] = "both"
    on: str = Field("world", description="the narrative world, or a folder of videos, some of which are only measured")
    seconds: Seconds = 24.0
    pool: PoolSize = 32
    refresh: Refresh = 2
    frames: int = Field(24, ge=6, description="latent frames of a clip")
    queries: int = Field(2, ge=1, description="runs asked for per clip")
    run: int = Field(3, ge=1, description="latent frames of a run")
    hide: tuple[float, float] = Field((0.2, 1.0), description="noise levels that hide the frames not asked for")
    entity_weight: float = Field(3.0, ge=1, description="weight of the loss where entities are")
    held_out: int = Field(4, ge=1, description="clips that are measured")


class Objective(loop.Objective):
    """Train a history encoder on latents of a codec, through a transformer."""

    def __init__(self, options: Options, context: loop.Context):
        self.options, self.context = options, context
        engine = load(options.model, context.device, torch.float32 if options.tune else context.dtype)
        self.engine, self.layout, self.transformer = engine, engine.layout, engine.backbone
        # pictures are drawn, and encoded, on the CPU
        codec = engine.codec if options.codec is None else PreviewCodec.load(options.codec)
        self.codec = codec.to("cpu", context.dtype).eval().requires_grad_(False)
        if self.codec.latent_channels != self.layout.latent_channels:
            raise InputError(
                f"codec {options.codec} makes {self.codec.latent_channels} latent channels, but model {options.model} "
                f"takes {self.layout.latent_channels}; give the codec it was trained with"
            )
        if options.run > options.frames or options.frames % self.size:
            raise InputError(f"frames={options.frames}: expected a multiple of {self.size}, and no less than run")
        self.memory = build("history", self.layout, **self.arguments)
        self.memory.adopt(*engine.patch)
        self.transformer.requires_grad_(options.tune)
        # the low-resolution branch is a copy of it
        self.transformer.patch_embedding.requires_grad_(False)
        self.schedule = engine.sampler.schedule
        self.videos = (
            None if options.on == "world" else Videos(options.on, self.layout, self.chunks).split(options.held_out)
        )
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)
        self.held_out: list[Encoded | Shown] = []

    @property
    def size(self) -> int:
        return self.layout.frames_per_chunk

    @property
    def chunks(self) -> int:
        return self.options.frames // self.size

    @property
    def arguments(self) -> dict:
        return {name: getattr(self.options, name) for name in ENCODER}

    def modules(self) -> dict[str, nn.Module]:
        return {MEMORY: self.memory, **({"transformer": self.transformer} if self.options.tune else {})}

    def metadata(self, module: str) -> dict[str, str]:
        return {"config": json.dumps(self.arguments) if module == MEMORY else self.transformer.config.to_json()}

    def make(self, seed: int) -> Encoded | Shown:
        if self.videos is not None:
            videos = self.videos[seed >= HELD_OUT]
            return videos.encoded(seed, self.chunks, lambda pixels: self.codec.encode(pixels.to(self.codec.dtype)))
        return encode(Narrative.random(seed, self.options.seconds), self.codec, self.size)

    # what the transformer is shown

    def call(self, method: str, *given):
        """Call the transformer at this run's precision, with gradients to its weights only where they are trained."""
        if self.options.tune:
            return loop.cast_call(self.transformer, self.context.dtype, *given, method=method)
        return getattr(self.transformer, method)(*given)

    def text(self, prompts: list[str]) -> Context:
        """Per layer keys and values of one prompt per row."""
        unique = sorted(set(prompts))
        keys = self.call("text_keys", self.engine.text.encode(unique)[0])
        which = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.context.device)
        return [(k[which], v[which]) for k, v in keys]

    def remember(self, latents: Tensor, prompts: list[list[str]]) -> Context:
        """Encode clips [B, T, c, h, w] with a prompt per chunk, as a stream would write them: [B, K g, H, D] per layer."""
        encoder, size = self.memory.encoder, self.size
        tokens, _ = loop.cast_call(encoder, self.context.dtype, latents.to(self.context.dtype))
        clips, count, cells, _ = tokens.shape
        written = ((torch.arange(count) + 1) * encoder.rate[2] - 1) // size  # the chunk that completes each
        text = self.text([told[chunk] for told in prompts for chunk in written.tolist()])
        places = self.memory.places(0, count).view(count, cells, 3).repeat(clips, 1, 1).to(latents.device)
        turn = rotation(places, self.layout.head_dim)
        pattern = Clips(count, (written[:, None] >= written).to(latents.device))
        steps = torch.zeros(clips * count, 1, device=latents.device)
        _, _, seen = self.call("run", tokens.flatten(0, 1)[:, None], steps, text, turn, pattern)
        rows = [(rotate(layer.keys, *turn), layer.values) for layer in seen]
        return [tuple(x.unflatten(0, (clips, count)).flatten(1, 2) for x in pair) for pair in rows]

    def flow(self, noisy: Tensor, sigma: Tensor, frames: Tensor, text: Context, context: Context):
        """The transformer on rows [R, F, c, h, w] at levels [R], frames [R, F] -> flow and what its layers saw."""
        steps = (sigma * 1000)[:, None].expand(frames.shape)
        return self.call("forward", noisy.to(self.context.dtype), steps, text, frames, Buffered(context))

    def with_window(self, context: Context, latents: Tensor, prompts: list[list[str]], noise: Tensor) -> Context:
        """Put the last chunk of a past [B, T, c, h, w] behind its tokens, as its clean pass leaves it; no gradients."""
        past = latents.shape[1] - self.size
        known = past // self.memory.encoder.rate[2] * self.memory.encoder.tokens
        before = [(keys[:, :known].detach(), values[:, :known].detach()) for keys, values in context]
        frames = torch.arange(past, past + self.size, device=latents.device).expand(len(latents), -1)
        level = torch.full((len(latents),), float(self.engine.context_noise), device=latents.device)
        with torch.no_grad():
            text = self.text([told[past // self.size] for told in prompts])
            noisy = add_noise(latents[:, past:], noise, level)
            _, seen = self.flow(noisy, level, frames, text, before)
        turn = rotation(grid_positions(frames, *self.layout.grid), self.layout.head_dim)
        window = [(rotate(layer.keys, *turn), layer.values) for layer in seen]
        return [tuple(torch.cat(x, 1) for x in zip(*pairs)) for pairs in zip(context, window)]

    # the loss

    def levels(self, count: int, low: float, high: float, random: torch.Generator) -> Tensor:
        """Draw from the paper's L(low, high): [count]."""
        drawn = self.schedule.warp(torch.randn(count, generator=random).sigmoid())
        return (low + (high - low) * drawn).to(self.context.device)

    def clips(self, items: list[Encoded | Shown], random: torch.Generator) -> tuple[Tensor, Tensor, list[list[str]]]:
        """Cut a clip from each narrative: latents [B, T, c, h, w], weights of the loss [B, T, h, w], prompts by chunk."""
        chunks = self.chunks
        parts, weights, prompts = [], [], []
        for item in items:
            start = int(torch.randint(max(item.chunks - chunks, 0) + 1, (), generator=random))
            cut = slice(start * self.size, (start + chunks) * self.size)
            parts.append(item.latents[cut])
            weights.append(self.weights(item, cut))
            prompts.append(item.prompts[start : start + chunks])
        device = self.context.device
        return torch.stack(parts).to(device), torch.stack(weights).to(device), prompts

    def weights(self, item: Encoded | Shown, cut: slice) -> Tensor:
        """Weights of the loss [T, h, w]: more where entities are, if it is known where."""
        if isinstance(item, Shown):
            return torch.ones(cut.stop - cut.start, *item.latents.shape[-2:])
        return 1 + (self.options.entity_weight - 1) * item.cells[:, cut].any(0).float()

    def noise(self, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=random).to(self.context.device)

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if self.options.branches == "low" and not self.options.tune:
            raise InputError(
                "options: branches=low has no weights of its own; train the transformer with it (tune=true), or only "
                "measure it (steps=0)"
            )
        pool = self.pool.at(step)
        chosen = torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()
        latents, weights, prompts = self.clips([pool[i] for i in chosen], generator)
        make = self.query if self.options.stage == "query" else self.next_chunk
        errors, weights = make(latents, weights, prompts, generator)
        entity = errors.detach()[weights > 1]
        told = {"plain": errors.detach().mean(), "entity": entity.mean() if len(entity) else torch.zeros(())}
        return (errors * weights).sum() / weights.sum(), told

    def query(self, latents: Tensor, weights: Tensor, prompts: list[list[str]], random: torch.Generator):
        """Hide all but the drawn runs and ask for those -> squared errors and weights [R, F, h, w]."""
        clips, length = latents.shape[:2]
        queries = min(self.options.queries, length - self.options.run + 1)
        drawn = [torch.randperm(length - self.options.run + 1, generator=random)[:queries] for _ in range(clips)]
        frames = torch.stack(drawn).flatten()[:, None] + torch.arange(self.options.run)  # [R, F]
        frames = frames.to(latents.device)
        which = torch.arange(clips, device=latents.device).repeat_interleave(queries)
        shown = torch.zeros(clips, length, dtype=torch.bool, device=latents.device)
        shown[which[:, None], frames] = True
        level = self.levels(clips, *self.options.hide, random)[:, None] * ~shown
        hidden = add_noise(latents, self.noise(latents.shape, random), level)
        context = [(k[which], v[which]) for k, v in self.remember(hidden, prompts)]
        target = latents[which[:, None], frames]
        told = [prompts[row][int(start) // self.size] for row, start in zip(which.tolist(), frames[:, 0])]
        return self.errors(target, frames, told, context, random), weights[which[:, None], frames]

    def next_chunk(self, latents: Tensor, weights: Tensor, prompts: list[list[str]], random: torch.Generator):
        """Ask for the chunk after a clean past of drawn length -> squared errors and weights [R, F, h, w]."""
        chunks = latents.shape[1] // self.size
        past = self.size * int(torch.randint(1, chunks, (), generator=random))
        noise = self.noise(latents[:, : self.size].shape, random)
        context = self.with_window(self.remember(latents[:, :past], prompts), latents[:, :past], prompts, noise)
        frames = torch.arange(past, past + self.size, device=latents.device).expand(len(latents), -1)
        told = [each[past // self.size] for each in prompts]
        made = slice(past, past + self.size)
        return self.errors(latents[:, made], frames, told, context, random), weights[:, made]

    def errors(self, target: Tensor, frames: Tensor, prompts: list[str], context: Context, random) -> Tensor:
        """Squared flow error of rows [R, F, c, h, w] at drawn levels: [R, F, h, w]."""
        noise = self.noise(target.shape, random)
        sigma = self.levels(len(target), 0.0, 1.0, random)
        flow, _ = self.flow(add_noise(target, noise, sigma), sigma, frames, self.text(prompts), context)
        return (flow.float() - (noise - target)).square().mean(2)

    # what is measured

    @torch.no_grad()
    def recall(self, item: Encoded | Shown, random: torch.Generator, memory: bool = True) -> tuple[Tensor, Tensor]:
        """Paint evenly spaced runs of a clean clip again -> pixels [R, T, 3, H, W] in [-1, 1]: painted, and the truth's."""
        device, run = self.context.device, self.options.run
        latents = item.latents[: self.options.frames].to(device)
        starts = torch.linspace(0, len(latents) - run, self.options.queries + 2).round().long()[1:-1]
        frames = (starts[:, None] + torch.arange(run)).to(device)
        text = self.text([item.prompts[int(start) // self.size] for start in starts])
        context = self.remember(latents[None], [item.prompts])
        context = [(k.expand(len(starts), -1, -1, -1), v.expand(len(starts), -1, -1, -1)) for k, v in context]
        if not memory:
            context = [(k[:, :0], v[:, :0]) for k, v in context]
        target = latents[frames]

        def predict(noisy: Tensor, t: float) -> Tensor:
            level = torch.full((len(noisy),), t / 1000, device=device)
            return self.flow(noisy, level, frames, text, context)[0].float()

        def draw() -> Tensor:
            return self.noise(target.shape, random)

        painted = self.engine.sampler.denoise(predict, draw(), draw)
        return self.decode(painted), self.decode(target)

    def decode(self, runs: Tensor) -> Tensor:
        """Decode runs [R, F, c, h, w] by themselves, each after a copy of its first frame; the copy's picture is left out."""
        after = torch.cat((runs[:, :1], runs), 1).to("cpu", self.codec.dtype)
        return self.codec.decode(after)[:, 1:].float().clamp(-1, 1)

    def validate(self, step: int) -> dict[str, float]:
        if not self.held_out:
            self.held_out = [self.make(HELD_OUT + i) for i in range(self.options.held_out)]
        encoder = self.memory.encoder
        found = {"compression": encoder.rate[2] * self.layout.tokens_per_frame / encoder.tokens}
        for name, memory in (("", True), ("_without", False)):
            random = torch.Generator().manual_seed(0)
            pairs = [self.recall(item, random, memory) for item in self.held_out]
            found[f"psnr{name}"] = sum(psnr((a - b).square().mean()) for a, b in pairs) / len(pairs)
            alike = torch.cat([ssim(a.flatten(0, 1), b.flatten(0, 1)) for a, b in pairs])
            found[f"ssim{name}"] = float(alike.mean())
        return found

    def sample(self, step: int, folder: Path) -> None:
        """Write recalled.png: asked-for frames of a held-out clip, as they are, with the memory and without it."""
        item = (self.held_out or [self.make(HELD_OUT)])[0]
        rows = []
        for memory in (True, False):
            painted, truth = self.recall(item, torch.Generator().manual_seed(0), memory)
            rows = [truth, *rows[1:], painted]
        sheet = to_uint8(torch.stack([row[:, -1] for row in rows]))  # [3, R, 3, H, W]
        pixels = (
            sheet.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
        )
        Image.fromarray(pixels.cpu().numpy()).save(folder / "recalled.png")


class Clips:
    """Rows are encoded frames; `count` consecutive rows are a clip, whose tokens see each other as `sees` [count, count]."""

    def __init__(self, count: int, sees: Tensor):
        self.count, self.dense = count, Dense(sees)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        together = (x.unflatten(0, (-1, self.count)).flatten(1, 2) for x in (query, key, value))
        return self.dense(layer, *together).unflatten(1, (self.count, -1)).flatten(0, 1)
