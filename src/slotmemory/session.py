"""One stream in progress, and the only loop over chunks in the code base: read, denoise, write, update.

A session owns what changes (script position, memory state, random streams, recent latents); the engine it runs on does
not. `step` either finishes a chunk or leaves the session as it was, so an interrupted session can go on or be saved.

Legend: B batch (independent streams of one script), F latent frames, C channels, h, w latent size.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from slotmemory.backbones.attention import Buffered, Pattern
from slotmemory.backbones.causal_wan import Seen, TextKeys
from slotmemory.backbones.rope import averaging, grid_positions, rotate, rotation
from slotmemory.codecs.base import to_uint8
from slotmemory.errors import InputError
from slotmemory.guard import Watch, not_finite, settled, started
from slotmemory.memory import Bank, Now, Prefix, State, Written, from_plain, to_plain
from slotmemory.sampler import add_noise
from slotmemory.trace import record

if TYPE_CHECKING:
    from slotmemory.engine import Engine


@dataclass(frozen=True)
class Chunk:
    """What one step made: latents [B, F, C, h, w], frames uint8 [B, T, 3, H, W], and its trace record."""

    index: int
    shot: int
    prompt: str
    start: float  # seconds
    stop: float
    latents: Tensor
    frames: Tensor
    trace: dict[str, Any]


class Told(NamedTuple):
    """A prompt as the backbone takes it; tokens [B] counts its words."""

    prompt: str
    keys: TextKeys
    tokens: Tensor


class Noise(Protocol):
    """Where random numbers come from; every call returns the next [B, F, C, h, w] of the stream."""

    def first(self, shape: Sequence[int]) -> Tensor: ...
    def fresh(self, shape: Sequence[int]) -> Tensor: ...
    def state(self) -> Any: ...
    def restore(self, state: Any) -> None: ...


class SeededNoise:
    """One generator per batch row, so that a row does not depend on its neighbours. Drawn on the CPU for every device."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def first(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in self.generators])

    fresh = first

    def state(self) -> list[Tensor]:
        return [g.get_state() for g in self.generators]

    def restore(self, state: list[Tensor]) -> None:
        for generator, saved in zip(self.generators, state):
            generator.set_state(saved.cpu())  # a state loaded onto an accelerator


def _recording_if_asked(method):
    """Record gradients in a method of a session only where the session is `differentiable` and its caller records."""

    @functools.wraps(method)
    def run(self, *given):
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return method(self, *given)

    return run


class Session:
    """A stream: call `step` (or iterate) for the next chunk, `prompt` to steer, `save`, `load` and `fork` at will."""

    # training: latents and memory carry gradients to the weights; what a chunk leaves for the next is cut, but for what
    # a memory makes with weights of its own (training/rollout.py)
    differentiable = False

    def __init__(
        self,
        engine: Engine,
        prompts: dict[int, str],
        chunks: int | None = None,
        seeds: Sequence[int] = (0,),
        noise: Noise | None = None,
    ):
        """prompts: by the chunk at which each starts; chunks: how many in all, None for a live stream without an end."""
        if 0 not in prompts:
            raise InputError("a stream needs a prompt for its first chunk")
        self.engine = engine
        self.prompts = dict(prompts)
        self.chunks = chunks
        self.batch = len(seeds)
        self.noise = noise or SeededNoise(seeds)
        self.index = 0
        self.frame = 0  # next latent frame; runs ahead of index * frames_per_chunk after `prefill`
        self.state: State = started(engine.memory, self.batch)
        self.decoding = engine.codec.start()
        self.recent: Tensor | None = None  # the last clean latents, as many as the memory may ask to replay
        self.told: Told | None = None  # what the last chunk was told

    # steering

    @property
    def done(self) -> bool:
        return self.chunks is not None and self.index >= self.chunks

    def prompt_at(self, chunk: int) -> tuple[int, str]:
        """The shot number and prompt of a chunk."""
        starts = sorted(start for start in self.prompts if start <= chunk)
        return len(starts) - 1, self.prompts[starts[-1]]

    def prompt(self, text: str) -> int:
        """Switch to a new prompt at the next chunk, until the script's next shot; returns that chunk's number."""
        self.engine.text.check(text)
        self.prompts[self.index] = text
        return self.index

    # the loop

    def __iter__(self) -> Iterator[Chunk]:
        while not self.done:
            yield self.step()

    @_recording_if_asked
    def step(self) -> Chunk:
        """Make the next chunk."""
        if self.done:
            raise InputError(f"the stream is over after {self.chunks} chunks")
        engine, layout = self.engine, self.engine.layout
        index, random, clock = self.index, self.noise.state(), Clock()
        try:
            told = self._told()
            now, state = self._now(told), self.state
            if now.switched:
                state = self._switch(state, now)
                clock.lap("switch")
            read = self._read(state, now)
            pattern = self._pattern(state, now, read)
            clock.lap("read")
            made = self._denoised(now, told, pattern)
            latents = made.detach()
            if not bool(torch.isfinite(latents).all()):
                raise not_finite(engine.memory, now, read, pattern)
            clock.lap("denoise")
            written = self._clean_pass(latents, now, pattern)
            clock.lap("clean")
            kept = self._kept(state, written)
            clock.lap("write")
            layer = layout.layers // 2
            recorded = record(self.state, state, kept, read[layer], layer)
            del read, pattern, written  # what was read and seen makes room for the decoder
            clock.lap("record")
            video, decoding = engine.codec.push(latents.to(engine.codec.dtype), self.decoding)
            pixels = to_uint8(video)
            clock.lap("decode")
            start, last = (layout.chunk_frames(now.chunk)[i] / layout.fps for i in (0, -1))
            stop = last + 1 / layout.fps
            shot, prompt = self.prompt_at(now.chunk)
            trace = {
                "chunk": now.chunk,
                "seconds": [round(start, 4), round(stop, 4)],
                "shot": shot,
                "prompt": prompt,
                "switched": now.switched,
                **recorded,
                "milliseconds": clock.laps,
            }
            chunk = Chunk(now.chunk, shot, prompt, start, stop, made, pixels, trace)
            # all of it in one call, so that Ctrl-C falls before it or after it
            vars(self).update(self._past(latents, told), state=kept, decoding=decoding, index=index + 1)
        except BaseException:
            if self.index == index:
                self.noise.restore(random)
            raise
        return chunk

    @_recording_if_asked
    def prefill(self, latents: Tensor) -> None:
        """Take known clean latents [B, F, C, h, w] as the stream's past (video continuation); nothing is decoded."""
        step = self.engine.layout.frames_per_chunk
        for part in latents.split(step, 1):
            told = self._told()
            now = self._now(told, frames=part.shape[1])
            pattern = self._pattern(self.state, now, self._read(self.state, now))
            written = self._clean_pass(part, now, pattern)
            state = self._kept(self.state, written)
            vars(self).update(self._past(part, told), state=state)

    # parts of a step

    def _told(self) -> Told:
        """The prompt of the next chunk, encoded once for as long as it lasts."""
        prompt = self.prompt_at(self.index)[1]
        if self.told is not None and self.told.prompt == prompt:
            return self.told
        return self._encode(prompt)

    @_recording_if_asked
    def _encode(self, prompt: str) -> Told:
        embeddings, tokens = self.engine.text.encode([prompt] * self.batch)
        return Told(prompt, self.engine.backbone.text_keys(embeddings), tokens)

    def _now(self, told: Told, frames: int | None = None) -> Now:
        shot, _ = self.prompt_at(self.index)
        switched = self.told is not None and told is not self.told
        length = frames or self.engine.layout.frames_per_chunk
        text = [(keys.detach(), values.detach()) for keys, values in told.keys]  # a memory only compares with it
        return Now(self.index, self.frame, length, shot, switched, text, told.tokens)

    def _switch(self, state: State, now: Now) -> State:
        """Let the memory answer a new prompt; replay what it asks for as one clean pass under that prompt."""
        memory = self.engine.memory
        kept = 0 if self.recent is None else self.recent.shape[1]
        with Watch(memory, "switch", now, state=state) as watch:
            state, replay = watch.switched(memory.switch(state, now), self.batch, kept)
        if replay:
            past = Now(now.chunk, now.frame - replay, replay, now.shot, True, now.text, now.text_tokens, replay=True)
            pattern = self._pattern(state, past, self._read(state, past))
            written = self._clean_pass(self.recent[:, -replay:], past, pattern)
            state = self._kept(state, written)
        return state

    def _read(self, state: State, now: Now) -> list[list[Bank]]:
        memory, read = self.engine.memory, []
        with Watch(memory, "read", now, state=state) as watch:
            for layer in range(self.engine.layout.layers):
                watch.layer = layer
                read.append(watch.banks(memory.read(state, layer, now), self.batch, self.engine.dtype))
            watch.only_past(read)
        return read

    def _pattern(self, state: State, now: Now, read: list[list[Bank]]) -> Pattern:
        """How the chunk attends to what was read: as the memory says, else in one softmax."""
        memory, context = self.engine.memory, self._rotated(read)
        with Watch(memory, "attend", now, state=state, context=context) as watch:
            return watch.pattern(memory.attend(state, now, read, context)) or Buffered(context)

    def _rotated(self, read: list[list[Bank]]) -> list[tuple[Tensor, Tensor]]:
        """Join what was read per layer into one buffer and rotate its keys to where they stand."""
        layout, engine = self.engine.layout, self.engine
        empty = torch.zeros(self.batch, 0, layout.heads, layout.head_dim, device=engine.device, dtype=engine.dtype)
        context, places, turn = [], None, None
        for found in read:
            if not found:
                context.append((empty, empty))
                continue
            keys, values, positions = (
                torch.cat([getattr(bank, name).flatten(1, 2) for bank in found], 1)
                for name in ("keys", "values", "positions")
            )
            if places is None or places.shape != positions.shape or not torch.equal(places, positions):
                places, turn = positions, rotation(positions, layout.head_dim)  # layers mostly agree on places
            context.append((rotate(keys, *turn), values))
        return context

    def _denoised(self, now: Now, told: Told, pattern: Pattern) -> Tensor:
        """Make the chunk's latents out of the stream's noise."""
        engine, layout = self.engine, self.engine.layout
        frames = torch.arange(now.frame, now.frame + now.frames, device=engine.device)
        shape = (self.batch, now.frames, layout.latent_channels, layout.latent_height, layout.latent_width)

        def predict(noisy: Tensor, t: float) -> Tensor:
            steps = torch.full(shape[:2], t, device=engine.device)
            return engine.backbone(noisy, steps, told.keys, frames, pattern)[0]

        def draw() -> Tensor:
            return self.noise.fresh(shape).to(engine.device)

        return engine.sampler.denoise(predict, self.noise.first(shape).to(engine.device), draw)

    @torch.no_grad()
    def _clean_pass(self, latents: Tensor, now: Now, pattern: Pattern) -> Written:
        """Run the model once more on finished latents, at the noise level that contexts have."""
        engine, noise = self.engine, self.engine.context_noise
        if noise:
            latents_in = add_noise(latents, self.noise.fresh(latents.shape).to(latents.device), noise)
        else:
            latents_in = latents
        frames = torch.arange(now.frame, now.frame + now.frames, device=engine.device)
        steps = torch.full(latents.shape[:2], noise * 1000, device=engine.device)
        _, seen = engine.backbone(latents_in, steps, now.text, frames, pattern)
        return Written(now, seen, grid_positions(frames[None], *engine.layout.grid), latents, settled(pattern))

    def _kept(self, state: State, written: Written) -> State:
        """Let the memory take in a chunk; tokens that it makes itself run through the model first."""
        memory, now = self.engine.memory, written.now
        with Watch(memory, "prefix", now, state=state, written=written.layers) as watch:
            state, prefix = watch.prefix(memory.prefix(state, written), self.batch)
        if prefix is not None:
            written = replace(written, prefix=prefix, prefix_layers=self._prefix_pass(prefix, written.now))
        for name, call in (("write", memory.write), ("update", memory.update)):
            with Watch(memory, name, now, state=state, written=written.layers) as watch:
                state = watch.state(call(state, written), self.batch)
        return state

    def _prefix_pass(self, prefix: Prefix, now: Now) -> list[Seen]:
        """Run a memory's own tokens through all layers, as one latent frame without noise."""
        engine = self.engine
        cos, sin = rotation(prefix.positions, engine.layout.head_dim)
        shorter = None
        if prefix.extents is not None:
            shorter = averaging(prefix.extents, engine.layout.head_dim)
            cos, sin = cos * shorter, sin * shorter
        steps = torch.zeros(self.batch, 1, device=engine.device)
        pattern = Buffered(self._rotated(prefix.sees or [[]] * engine.layout.layers))
        tokens = prefix.tokens.to(engine.dtype)[:, None]
        _, _, seen = engine.backbone.run(tokens, steps, now.text, (cos, sin), pattern)
        if shorter is not None:  # the factor stays with the key: a policy may move it to another position
            factor = shorter.repeat_interleave(2, -1).unsqueeze(-2)
            seen = [layer._replace(keys=(layer.keys.float() * factor).to(layer.keys.dtype)) for layer in seen]
        return seen

    def _past(self, latents: Tensor, told: Told) -> dict[str, Any]:
        """What the session remembers of latents once they are made."""
        keep, recent = self.engine.memory.replays, None
        if keep:
            recent = (latents if self.recent is None else torch.cat((self.recent, latents), 1))[:, -keep:]
        return {"told": told, "frame": self.frame + latents.shape[1], "recent": recent}

    # copies of a stream

    def snapshot(self) -> dict[str, Any]:
        """Everything that changes, as a plain tree of tensors, numbers and text."""
        return {
            "prompts": [[chunk, text] for chunk, text in sorted(self.prompts.items())],
            "chunks": self.chunks,
            "index": self.index,
            "frame": self.frame,
            "told": self.told.prompt if self.told else None,
            "noise": self.noise.state(),
            "memory": to_plain(self.state),
            "decoding": self.decoding,
            "recent": self.recent,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on exactly where `snapshot` was taken, on the same engine; tensors may be on any device."""
        device = self.engine.device
        self.prompts = {int(chunk): text for chunk, text in saved["prompts"]}
        self.chunks, self.index, self.frame = saved["chunks"], saved["index"], saved["frame"]
        self.noise.restore(saved["noise"])
        self.state = from_plain(_moved(saved["memory"], device))
        self.decoding, self.recent = _moved(saved["decoding"], device), _moved(saved["recent"], device)
        self.told = None if saved["told"] is None else self._encode(saved["told"])

    def save(self, path) -> None:
        """Write the snapshot to a file, atomically."""
        from slotmemory.tree import tree_to_file

        tree_to_file(self.snapshot(), path)

    def load(self, path) -> None:
        """Restore a snapshot from a file."""
        from slotmemory.tree import tree_from_file

        self.restore(tree_from_file(path))  # on the CPU, where the random streams stay

    def fork(self) -> Session:
        """Return an independent stream that starts from this one's present; tensors are shared, never changed."""
        twin = copy.copy(self)
        twin.prompts = dict(self.prompts)
        twin.noise = copy.copy(self.noise)
        if isinstance(self.noise, SeededNoise):
            twin.noise.generators = [g.clone_state() for g in self.noise.generators]
        return twin


def _moved(tree: Any, device: torch.device) -> Any:
    """Put a plain tree's tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _moved(value, device) for key, value in tree.items()}
    return [_moved(value, device) for value in tree] if isinstance(tree, list) else tree


class Clock:
    """Milliseconds per part of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round((now - self.last) * 1000, 3), now
