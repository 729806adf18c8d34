"""Does memory matter? Heroes leave for 5 to 25 seconds: do they come back, and as themselves?

    python benchmarks/returning_entity.py --model tiny --memories window,sink,slots --out runs/returning

Every memory makes the same held-out scripts from the same noise; the frames of the hero's first appearance and of its
return are read by the trained reader, and those of somebody else in between, who may share looks by chance only. Results
are kept one line per (memory, script), so a stopped run goes on where it was. `rendered` is no memory: the world's own
frames through the model's codec, read the same way, which is what the measurement itself loses. Writes report.md,
report.json and filmstrip.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slotmemory.codecs.base import to_float, to_uint8
from slotmemory.engine import Engine
from slotmemory.evaluation import returning
from slotmemory.evaluation.reader import Reader, Reading
from slotmemory.evaluation.results import Lines, shown, status_of, table
from slotmemory.evaluation.returning import Interval, ReturnScript, Score
from slotmemory.pictures import filmstrip
from slotmemory.run import finite
from slotmemory.world.clock import chunk_frames
from slotmemory.world.narrative import Narrative

RENDERED = "rendered"
MEMORIES = f"{RENDERED},none,window,sink,slots,everything"
LEAD_CHUNKS = 2  # decoded and thrown away before a span: longer than what the codec's blocks remember
FRAME_STEP = 3  # of a span's frames every third is read
COLUMNS = ("present", "kind", "colour", "pattern", "accessory", "itself")


class Undecoded:
    """Stands in for a codec while chunks are made that nobody will look at."""

    def __init__(self, codec: Any) -> None:
        self.dtype = codec.dtype

    def start(self) -> dict[str, list[Tensor]]:
        return {}

    def push(self, latents: Tensor, state: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return latents.new_zeros(len(latents), 0, 3, 1, 1), state


@dataclass(frozen=True)
class Made:
    """What one memory made of one script: frames uint8 [B, T, 3, H, W] by what they show (`spans_of`), and what it read."""

    frames: dict[str, Tensor]
    tokens: int


def spans_of(script: ReturnScript) -> dict[str, range]:
    """The chunks that are read: of the hero's first appearance, of its return, and of a stranger if there is one."""
    spans = {"first": script.first, "back": script.back}
    return spans if script.stranger is None else {**spans, "stranger": script.stranger[1]}


def make(engine: Engine, script: ReturnScript, seeds: Sequence[int]) -> Made:
    """Stream a script, decoding only the chunks that are read."""
    session = replace(engine, codec=Undecoded(engine.codec)).session(script.prompts, list(seeds))
    chunks, tokens = [], 0
    for _ in range(script.chunks):
        chunk = session.step()
        chunks.append(chunk.latents)
        tokens = max(tokens, sum(chunk.trace["read"].values()))
    return Made({name: decode(engine.codec, chunks, span) for name, span in spans_of(script).items()}, tokens)


@torch.no_grad()
def decode(codec: Any, chunks: Sequence[Tensor], span: range) -> Tensor:
    """Decode the chunks of a span [B, F, C, h, w] each -> uint8 [B, T, 3, H, W]."""
    lead = max(span.start - LEAD_CHUNKS, 0)
    frames = codec.push(torch.cat(list(chunks[lead : span.stop]), 1).to(codec.dtype), codec.start())[0]
    # a decoder starts with a short group of frames, so the span is counted from the end
    return to_uint8(frames)[:, -sum(len(chunk_frames(k)) for k in span) :].cpu()


@torch.no_grad()
def render(engine: Engine, script: ReturnScript, seeds: Sequence[int]) -> Made:
    """Draw what the script asks for, and pass it through the codec."""
    shots = [(prompt, start) for start, prompt in script.prompts.items()]
    made: dict[str, list[Tensor]] = {name: [] for name in spans_of(script)}
    for seed in seeds:
        narrative = Narrative(shots, script.chunks, seed)
        for name, span in spans_of(script).items():
            pixels = torch.from_numpy(narrative.render(chunk_frames(span[0]).start, chunk_frames(span[-1]).stop))
            pixels = pixels[(len(pixels) - 1) % engine.layout.temporal_stride :]
            video = to_float(pixels)[None].to(engine.device, engine.codec.dtype)
            made[name].append(to_uint8(engine.codec.decode(engine.codec.encode(video).to(video.dtype)))[0].cpu())
    return Made({name: torch.stack(frames) for name, frames in made.items()}, 0)


# results on disk


class Results(Lines):
    """Lines of readings, and a picture of each."""

    def has(self, memory: str, script: int) -> bool:
        return bool(self.of(memory=memory, script=script))

    def add(self, line: dict[str, Any], made: Made) -> None:
        picture = self.picture(line["memory"], line["script"])
        picture.parent.mkdir(parents=True, exist_ok=True)
        both = (made.frames["first"], made.frames["back"])
        pair = torch.cat([frames[0, frames.shape[1] // 2] for frames in both], 1)
        Image.fromarray(pair.permute(1, 2, 0).numpy()).save(picture)
        super().add(line)

    def picture(self, memory: str, script: int) -> Path:
        return self.folder / "frames" / memory.replace("/", "_") / f"{script:03d}.png"

    def readings(self, memory: str, scripts: Sequence[ReturnScript]) -> dict[tuple[int, int], tuple]:
        """(hero, first, back) of one memory, by (script, seed)."""
        heroes = {script.number: script.hero for script in scripts}
        return {
            (line["script"], take["seed"]): (
                heroes[line["script"]],
                Reading(**take["first"]),
                Reading(**take["back"]),
            )
            for line in self.lines
            if line["memory"] == memory and line["script"] in heroes
            for take in line["takes"]
        }

    def lent(self, memory: str, scripts: Sequence[ReturnScript]) -> dict[str, dict[int, list[bool]]]:
        """Which looks of the hero strangers share, by attribute and script."""
        cast = {script.number: (script.hero, script.stranger) for script in scripts}
        found: dict[str, dict[int, list[bool]]] = {name: {} for name in returning.UNSTATED}
        for line in self.lines:
            hero, stranger = cast.get(line["script"], (None, None))
            if line["memory"] != memory or stranger is None:
                continue
            for take in line["takes"]:
                if "stranger" in take:  # folders of earlier versions have none
                    looks = Reading(**take["first"]), stranger[0], Reading(**take["stranger"])
                    for name, same in (returning.lent(hero, *looks) or {}).items():
                        found[name].setdefault(line["script"], []).append(same)
        return found


# the report


def report(results: Results, scripts: Sequence[ReturnScript], memories: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Put all results into words and numbers: markdown, JSON."""
    readings = {memory: results.readings(memory, scripts) for memory in memories}
    scores: dict[str, dict[tuple[int, int], Score]] = {
        memory: {key: returning.score(*reading) for key, reading in found.items()} for memory, found in readings.items()
    }
    nominal = float(np.mean([returning.expected_hue_difference(script.hero[0]) for script in scripts]))
    numbers: dict[str, Any] = {
        "scripts": len(scripts),
        "nominal_chance": {**returning.NOMINAL_CHANCE, "hue_error": nominal},
    }
    rows, gap_rows, difference_rows, lent_rows = [], [], [], []
    reference = next((m for m in memories if m == "sink"), None)
    for memory in memories:
        found = returning.summary(scores[memory])
        shuffled = returning.shuffled(list(readings[memory].values()))
        tokens = max((line["tokens"] for line in results.lines if line["memory"] == memory), default=0)
        gaps = {name: returning.by_gap(scores[memory], scripts, name) for name in ("itself", "hue_error")}
        numbers[memory] = {
            "tokens": tokens,
            "takes": len(scores[memory]),
            "rates": {name: asdict(interval) for name, interval in found.items()},
            "shuffled": shuffled,
            "gaps": {name: [asdict(interval) for interval in intervals] for name, intervals in gaps.items()},
        }
        rows.append(
            [memory, str(tokens), f"{100 * found['readable'].mean:.0f} %"]
            + [_percent(found[name]) for name in COLUMNS]
            + [_degrees(found["hue_error"])]
        )
        chance = [_known(100 * shuffled[name], ".0f") for name in returning.UNSTATED]
        rows.append(["*by chance*", "", "", "", "", "", *chance, "", _known(shuffled["hue_error"], ".1f")])
        gap_rows.append([memory, *(_percent(x) for x in gaps["itself"]), *(_degrees(x) for x in gaps["hue_error"])])
        lent = {name: returning.rate(by_script) for name, by_script in results.lent(memory, scripts).items()}
        numbers[memory]["lent"] = {name: asdict(interval) for name, interval in lent.items()}
        lent_rows.append([memory, str(lent["pattern"].scripts), *(_percent(lent[name]) for name in returning.UNSTATED)])
        if reference and memory not in (reference, RENDERED):
            compared = returning.comparison(scores[memory], scores[reference])
            numbers[memory][f"minus_{reference}"] = {name: asdict(x) for name, x in compared.items()}
            difference_rows.append(
                [memory, str(compared["itself"].scripts)]
                + [_percent(compared[name], "+.0f") for name in COLUMNS]
                + [_degrees(compared["hue_error"], "+.1f")]
            )
    spans = [f"{low:g}-{high:g} s" for low, high in returning.GAPS]
    text = [
        f"# Returning entities: {len(scripts)} scripts",
        "Rates with 95 % intervals. Stated (present, kind, colour): all scripts, against the prompt. Unstated "
        "(pattern, accessory, hue in degrees) and *itself* (all five right): against its own first appearance, over "
        "the scripts in which that is readable. *By chance*: against first appearances of other scripts of the same "
        f"memory; for even draws it would be 25 %, 25 % and {nominal:.1f} degrees.",
        table(["memory", "tokens", "readable", *COLUMNS, "hue error"], rows),
        "## Itself, and hue error, by seconds away",
        table(["memory", *spans, *(f"hue {span}" for span in spans)], gap_rows),
    ]
    text += [
        "## Lent looks",
        "How often somebody else, alone while the hero is away, has the pattern or the accessory of the hero's first "
        "appearance. More than by chance (above) means that a memory lends looks to whom they do not belong.",
        table(["memory", "scripts", *returning.UNSTATED], lent_rows),
    ]
    if difference_rows:
        text += [
            f"## Minus `{reference}`, the same scripts and noise",
            "Points, and degrees of hue; *scripts*: those whose first appearance is readable with both.",
            table(["memory", "scripts", *COLUMNS, "hue error"], difference_rows),
        ]
    return "\n\n".join(text) + "\n", numbers


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _percent(x: Interval, form: str = ".0f") -> str:
    return shown(x, form, 100)


def _degrees(x: Interval, form: str = ".1f") -> str:
    return shown(x, form)


def draw_filmstrip(results: Results, scripts: Sequence[ReturnScript], memories: Sequence[str], count: int) -> None:
    """A row per script, a column per memory: the first appearance above the return. Scripts without pictures of all
    memories, as in a folder that came without its frames, are left out."""
    drawn = [s for s in scripts if all(results.picture(memory, s.number).exists() for memory in memories)]
    shots, captions = [], []
    for script in drawn[:count]:
        for memory in memories:
            pair = np.asarray(Image.open(results.picture(memory, script.number)))
            shots.append(pair.reshape(2, -1, *pair.shape[1:]).transpose(0, 3, 1, 2))
            captions.append(f"{memory}\n{' '.join(script.hero)}, away {script.gap_seconds:.0f} s")
    if shots:
        filmstrip(shots, captions, results.folder / "filmstrip.png", columns=len(memories), frame_width=240)


# the command


def run(arguments: argparse.Namespace) -> None:
    scripts = returning.scripts(arguments.scripts)
    memories = [name.strip() for name in arguments.memories.split(",") if name.strip()]
    settings = {
        "model": arguments.model,
        "budget": arguments.budget,
        "steps": arguments.steps,
        "seeds": arguments.batch,
    }
    results = Results(Path(arguments.out), settings)
    reader = Reader.load(arguments.reader)
    engine = Engine.from_pretrained(arguments.model, "none", steps=arguments.steps, device=arguments.device)
    waiting = [(m, s) for s in scripts for m in memories if not results.has(m, s.number)]
    begun, spent = time.monotonic(), 0
    total = sum(script.chunks for _, script in waiting)
    for memory, script in waiting:
        started = time.monotonic()
        seeds = [script.seed + 1000 * k for k in range(arguments.batch)]
        if memory == RENDERED:
            made = render(engine, script, seeds)
        else:
            made = make(engine.with_memory(memory, arguments.budget), script, seeds)
        takes = [
            {"seed": seed, **{k: reader.read(x[row, ::FRAME_STEP]).to_dict() for k, x in made.frames.items()}}
            for row, seed in enumerate(seeds)
        ]
        line = {"memory": memory, "script": script.number, "hero": script.hero, "gap": script.gap_seconds}
        line |= {"tokens": made.tokens, "seconds": round(time.monotonic() - started, 2), "takes": takes}
        results.add(line, made)
        spent += script.chunks
        left = (time.monotonic() - begun) / spent * (total - spent)
        done = f"{memory} script {script.number + 1}/{len(scripts)}"
        print(f"{done}: {line['seconds']} s, {left / 60:.0f} min left", flush=True)

    text, numbers = report(results, scripts, memories)
    (results.folder / "report.md").write_text(text)
    (results.folder / "report.json").write_text(json.dumps(finite({"settings": settings, **numbers}), indent=1))
    draw_filmstrip(results, scripts, memories, arguments.strips)
    print(f"\n{text}\n{results.folder}: report.md, report.json, and filmstrip.png where frames were kept")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name or a folder")
    parser.add_argument(
        "--memories", default=MEMORIES, help="names or policy files, with commas (default: %(default)s)"
    )
    parser.add_argument("--budget", type=int, help="tokens per layer for each memory (default: each memory's own)")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the model's own steps)")
    parser.add_argument("--scripts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="noise seeds of each script, made together")
    parser.add_argument("--strips", type=int, default=6, help="scripts in the filmstrip")
    parser.add_argument("--reader", help="weights of another reader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/returning")
    given = parser.parse_args()
    return status_of(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
