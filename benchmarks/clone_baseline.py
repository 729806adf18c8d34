"""What does reading memory once per chunk save? MemFlow's bank in this engine, against the obvious way to write it.

    python benchmarks/clone_baseline.py --model tiny

The obvious way keeps one cache per layer and, in every forward pass of every denoising step, clones it, rolls it, writes
the chunk into the clone, joins sink, bank and window anew, and attends; the clean pass's clone becomes the cache. With
positions other than native, its keys are kept un-rotated and rotated in every pass. Everything else - the loop, the model,
the noise, what is kept, what is attended to - is the same, and the videos are compared to prove it.

Both make their chunks in turn in one process. Prints milliseconds per chunk and their ratio; with --threads 1 on a CPU, of
processor time, which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slotmemory.backbones.attention import attend
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.bench import clock
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS, cap_frames
from slotmemory.memory import Bank, Memory, Now, State, Written

SHOT_CHUNKS = 13
PROMPTS = ("A red cat walks in the meadow.", "A blue robot waits on the beach.", "The night is empty.")
SINK, WINDOW, BANK, RECORD_EVERY = 3, 12, 3, 3  # the published sizes, in latent frames and chunks
REACH = 21
FULL_CHUNKS = 12  # after which bank and window are full


class Cloning(Memory):
    """Sink, window and MemFlow's bank, cloned in every pass. `read` returns nothing: attention does it all."""

    def __init__(self, layout: Layout, placing: str):
        super().__init__(layout)
        self.placing = placing

    def start(self, batch: int) -> State:
        # frames: latent frames in the caches, sink first, then the window
        return {"caches": [], "frames": [], "kept": []}

    def attend(self, state: State, now: Now, read: Sequence, context: Sequence) -> ClonedCaches:
        return ClonedCaches(self, state, now)

    def write(self, state: State, written: Written) -> State:
        pattern = written.pattern
        if self.placing != "native":  # the pattern saw the chunk's keys rotated
            for seen, (keys, _) in zip(written.layers, pattern.clones):
                keys[:, pattern.start : pattern.stop] = seen.keys
        kept = [self._recorded(state, written, layer) for layer in range(len(written.layers))]
        now = written.now
        frames = [*pattern.frames, *range(now.frame, now.frame + now.frames)]
        return {"caches": pattern.clones, "frames": frames, "kept": kept}

    def _recorded(self, state: State, written: Written, layer: int) -> Bank:
        """MemFlow's choice: the chunk's first frame enters; of a full bank, the frame that fits the prompt least leaves."""
        first = written.bank(layer).first(1)
        bank = state["kept"][layer] if state["kept"] else first.first(0)
        if written.now.chunk % RECORD_EVERY:
            return bank
        if bank.items == BANK:
            fit = torch.einsum("bhd,bmhd->bmh", written.now.words(layer), bank.keys.float().mean(2)).mean(-1)
            bank = bank.take(fit.topk(BANK - 1).indices.sort(1).values)
        return bank.join(first)


class ClonedCaches:
    """Attention of one chunk: every call clones its layer's cache."""

    def __init__(self, policy: Cloning, state: State, now: Now):
        layout = policy.layout
        per_frame = layout.tokens_per_frame
        self.state, self.native = state, policy.placing == "native"
        self.sink, self.size, self.new = SINK * per_frame, WINDOW * per_frame, now.frames * per_frame
        self.rolls = len(state["frames"]) + now.frames > WINDOW
        self.frames = state["frames"][:SINK] + state["frames"][SINK + now.frames :] if self.rolls else state["frames"]
        self.start = len(self.frames) * per_frame
        self.stop = self.start + self.new
        self.clones: list[tuple[Tensor, Tensor]] = [()] * layout.layers
        self.turns = [self._turn(layer, now, layout, policy.placing) for layer in range(layout.layers)]

    def _turn(self, layer: int, now: Now, layout: Layout, placing: str) -> tuple[Tensor, Tensor]:
        """Where sink, bank and window stand, as the engine would have it, once per chunk."""
        kept = self.state["kept"][layer].born[0].tolist() if self.state["kept"] else []
        frames = torch.tensor([*self.frames[:SINK], *kept, *self.frames[SINK:]])
        if placing == "capped":
            frames = cap_frames(frames, now.frame, now.frames, REACH)
        elif placing == "relative":
            frames = torch.arange(now.frame - len(frames), now.frame)
        return rotation(grid_positions(frames.long(), *layout.grid)[None].to(now.text[0][0].device), layout.head_dim)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        if self.state["caches"]:
            keys, values = (cache.clone() for cache in self.state["caches"][layer])
        else:
            keys, values = (x.new_zeros(x.shape[0], self.size, *x.shape[2:]) for x in (key, value))
        if self.rolls:
            for cache in (keys, values):
                cache[:, self.sink : -self.new] = cache[:, self.sink + self.new :].clone()
        keys[:, self.start : self.stop], values[:, self.start : self.stop] = key, value
        self.clones[layer] = keys, values
        kept = self.state["kept"][layer] if self.state["kept"] else None
        parts = []
        for cache, name in ((keys, "keys"), (values, "values")):
            bank = [getattr(kept, name).flatten(1, 2)] if kept else []
            parts.append([cache[:, : min(self.sink, self.start)], *bank, cache[:, self.sink : self.start]])
        if self.native:  # cached keys are rotated; those of the bank are chosen by content and are not
            if kept:
                where = slice(self.sink, self.sink + kept.tokens)
                parts[0][1] = rotate(parts[0][1], *(x[:, where] for x in self.turns[layer]))
            past = torch.cat(parts[0], 1)
        else:
            past = rotate(torch.cat(parts[0], 1), *self.turns[layer])
        return attend(query, torch.cat((past, key), 1), torch.cat((*parts[1], value), 1))


def compare(engine: Engine, placing: str, chunks: int) -> tuple[list[float], list[float], float]:
    """Step both in turn -> milliseconds per chunk of each, once memory is full, and how far their latents are apart."""
    prompts = {start: PROMPTS[i % len(PROMPTS)] for i, start in enumerate(range(0, FULL_CHUNKS + chunks, SHOT_CHUNKS))}
    sizes = {"sink": SINK, "window": WINDOW, "bank": BANK, "record_every": RECORD_EVERY}
    bank = engine.with_memory("narrative", **sizes, placing=placing, reach=REACH, recache=False)
    cloned = replace(engine, memory=Cloning(engine.layout, placing).to(engine.device))
    sessions = [engine_of.session(prompts, 0) for engine_of in (bank, cloned)]
    taken: list[list[float]] = [[], []]
    apart = 0.0
    for number in range(FULL_CHUNKS + chunks):
        made = [torch.empty(0)] * 2
        for which in (number % 2, 1 - number % 2):  # neither always comes first
            begun = clock(engine.device)
            made[which] = sessions[which].step().latents
            if number >= FULL_CHUNKS:
                taken[which].append(1000 * (clock(engine.device) - begun))
        apart = max(apart, float((made[0].float() - made[1].float()).abs().max()))
    return taken[0], taken[1], apart


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    engine = Engine.from_pretrained(arguments.model, "none", steps=arguments.steps, device=arguments.device)
    print(
        f"{arguments.model}, {engine.dtype}, {torch.get_num_threads()} threads, {engine.device}, {arguments.chunks} chunks"
    )
    print(f"{'positions':10s} {'engine ms':>10s} {'cloning ms':>11s}   cloning / engine (quartiles)   latents apart")
    for placing in arguments.placings.split(","):
        ours, theirs, apart = compare(engine, placing.strip(), arguments.chunks)
        ratios = sorted(b / a for a, b in zip(ours, theirs))
        low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
        print(
            f"{placing:10s} {statistics.median(ours):10.1f} {statistics.median(theirs):11.1f}   "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) {'':12s} {apart:.2g}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a folder")
    parser.add_argument("--placings", default="native,capped", help=f"of {', '.join(PLACINGS)}")
    parser.add_argument("--chunks", type=int, default=40, help="timed, once memory is full")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the model's own steps)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
