"""How fast is a stream, does it stay so, and what does a memory cost?

    python benchmarks/stream.py --model tiny --memory slots

Prints the first frame's latency, wall time of 957 frames, peak memory, time per chunk after 5 s, 60 s and 10 minutes of
video, and each memory's time per chunk as a multiple of sink + window's, in one process and turn by turn so that a
busy machine slows all alike. Files are not written: this is the session loop, decoding included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.session import Chunk, Session

FRAMES = 957
SHOT_CHUNKS = 13
PROMPTS = (
    "The meadow is empty.",
    "A red cat walks in the meadow.",
    "A blue robot waits on the beach.",
    "A red cat jumps and a blue robot waits on the beach.",
    "The night is empty.",
    "A blue robot walks in the night.",
)
MOMENTS = (5, 60, 600)  # seconds of video
AROUND = 8  # chunks whose median is a moment's time
WARM_CHUNKS = 24  # after these, windows and banks are full
BASE = "sink"


def prompts(chunks: int) -> dict[int, str]:
    """A script of 10-second shots that goes round."""
    return {start: PROMPTS[i % len(PROMPTS)] for i, start in enumerate(range(0, chunks, SHOT_CHUNKS))}


def timed(session: Session) -> tuple[Chunk, float]:
    """Make a chunk -> it, and its milliseconds."""
    started = time.perf_counter()
    chunk = session.step()
    return chunk, 1000 * (time.perf_counter() - started)


def peak_mib() -> float:
    """Most memory this process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 1024**2


def stream(engine: Engine, seconds: float) -> dict[str, Any]:
    """Stream for so many seconds of video and time every chunk."""
    layout = engine.layout
    chunks = max(layout.chunks(seconds), layout.chunks(FRAMES / layout.fps))
    session = engine.session(prompts(chunks), 0)
    results: dict[str, Any] = {}
    milliseconds, frames, started = [], 0, time.perf_counter()
    for number in range(chunks):
        chunk, lasted = timed(session)
        milliseconds.append(lasted)
        frames += chunk.frames.shape[1]
        if number == 0:
            results["first_frame_ms"] = lasted
        if frames >= FRAMES and "wall_s" not in results:
            wall = time.perf_counter() - started
            results |= {"frames": frames, "wall_s": wall, "frames_per_s": frames / wall, "peak_mib": peak_mib()}
    at = {}
    for moment in MOMENTS:
        last = min(layout.chunks(moment) + AROUND // 2, chunks)
        if layout.chunks(moment) <= chunks:
            at[moment] = statistics.median(milliseconds[max(last - AROUND, 1) : last])
    return {**results, "chunk_ms_at": at, "video_s": layout.seconds(chunks), "peak_mib_end": peak_mib()}


def overhead(engines: dict[str, Engine], chunks: int) -> dict[str, dict[str, float]]:
    """Step one session of each engine in turn -> median milliseconds, and the ratio to the base chunk by chunk."""
    sessions = {name: engine.session(prompts(WARM_CHUNKS + chunks), 0) for name, engine in engines.items()}
    taken: dict[str, list[float]] = {name: [] for name in engines}
    tokens = dict.fromkeys(engines, 0)
    names = list(engines)
    for number in range(WARM_CHUNKS + chunks):
        turn = names[number % len(names) :] + names[: number % len(names)]  # nobody always comes first
        for name in turn:
            chunk, lasted = timed(sessions[name])
            if number >= WARM_CHUNKS:
                taken[name].append(lasted)
                tokens[name] = max(tokens[name], sum(chunk.trace["read"].values()))
    found = {}
    for name in names:
        ratios = sorted(a / b for a, b in zip(taken[name], taken[BASE]))
        low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
        found[name] = {"tokens": tokens[name], "ms": statistics.median(taken[name])}
        found[name] |= {"ratio": middle, "q1": low, "q3": high}
    return found


def engines_for(engine: Engine, memories: Sequence[str], budget: int | None) -> dict[str, Engine]:
    """Give the engine each memory; beside a memory that reads more than the base, a base that reads as much."""
    made = {BASE: engine.with_memory(BASE, budget)}
    per_frame, step = engine.layout.tokens_per_frame, engine.layout.frames_per_chunk
    for name in memories:
        if name == BASE:
            continue
        made[name] = engine.with_memory(name, budget)
        held = made[name].memory.budget
        if budget is None and held is not None and held > made[BASE].memory.budget:
            made[f"{BASE} of as many tokens as {name}"] = engine.with_memory(BASE, window=held // per_frame + step)
    return made


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    engine = Engine.from_pretrained(
        arguments.model, arguments.memory, arguments.budget, steps=arguments.steps, device=arguments.device
    )
    loaded = time.perf_counter() - started
    found = stream(engine, 60 * arguments.minutes)
    print(f"{arguments.model}, memory {arguments.memory}, {torch.get_num_threads()} threads, {engine.dtype}")
    print(f"loading                {loaded:8.2f} s")
    print(f"first frame            {found['first_frame_ms']:8.0f} ms after the session opens (a chunk is made whole)")
    print(f"{found['frames']} frames             {found['wall_s']:8.1f} s = {found['frames_per_s']:.1f} frames/s")
    later = f"{found['peak_mib_end']:.0f} MiB after {found['video_s']:.0f} s"
    print(f"peak memory            {found['peak_mib']:8.0f} MiB, {later}")
    first = None
    for moment, milliseconds in found["chunk_ms_at"].items():
        first = first or milliseconds
        print(
            f"a chunk at {moment:4d} s       {milliseconds:8.1f} ms = {milliseconds / first:.2f} x the first of these"
        )

    names = [name.strip() for name in arguments.memories.split(",") if name.strip()]
    found["memories"] = overhead(engines_for(engine, names, arguments.budget), arguments.chunks)
    print(f"\nper chunk, turn by turn over {arguments.chunks} chunks:")
    print(f"{'memory':40s} {'tokens read':>11s} {'ms':>8s}   x {BASE} (quartiles)")
    for name, one in found["memories"].items():
        ratio = f"{one['ratio']:.3f} ({one['q1']:.3f} to {one['q3']:.3f})"
        print(f"{name:40s} {one['tokens']:11d} {one['ms']:8.1f}   {ratio}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"settings": vars(arguments), **found}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a folder")
    parser.add_argument("--memory", default="slots", help="of the long stream")
    parser.add_argument("--memories", default="none,window,sink,slots", help="that are compared with sink + window")
    parser.add_argument("--budget", type=int, help="tokens per layer for each memory (default: each memory's own)")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the model's own steps)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of video in the long stream; at least 957 frames")
    parser.add_argument("--chunks", type=int, default=60, help="timed per memory in the comparison")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a JSON file")
    try:
        run(parser.parse_args())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
