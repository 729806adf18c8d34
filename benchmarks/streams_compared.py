"""Do streams keep their looks and their motion? Models side by side on the same held-out minutes of prompts.

    python benchmarks/streams_compared.py --models tiny,my-model,my-model@slots --names before,after,slots --reference

Every model streams the same narratives, prompt after prompt, from the same seeds; `@MEMORY` gives one a memory of its own.
Measured are drift (`slotmemory/evaluation/drift.py`) and motion (`motion.py`) against the world's own tellings of the same
prompts, and whether chunks show what their prompts ask for (`prompts.py`). `--reference` adds `rendered`, no model: one
more telling, through the first model's codec, which is what any model can reach. Results are kept one line per (model,
script), so a stopped run goes on where it was; weights that have changed are streamed anew. Writes report.md, report.json
and filmstrip.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slotmemory import models
from slotmemory.codecs.base import to_float, to_uint8
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation import drift, motion, prompts
from slotmemory.evaluation.reader import Reader
from slotmemory.evaluation.results import Lines, shown, status_of, table
from slotmemory.evaluation.returning import FIRST_SEED, bootstrap, paired
from slotmemory.layout import Layout
from slotmemory.pictures import filmstrip
from slotmemory.run import finite
from slotmemory.world.clock import FPS, FRAMES_PER_LATENT, LATENTS_PER_CHUNK, chunk_of
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

RENDERED = "rendered"
SEEDS = FIRST_SEED + 1_000_000  # beyond what anything was trained, validated or asked for returns on
MEASURED = ["drift", "motion", "prompts"]  # lines of a folder all say the same
TELLINGS = 3  # of each script by the world, to compare with
APART = 10_000  # between the seeds of two tellings


@dataclass(frozen=True)
class Column:
    """A quantity of the report: its name in a line, how it is written."""

    name: str
    title: str
    form: str
    scale: float = 1.0


SUMMARY = (
    Column("speed", "frames/s", ".1f"),
    Column("distance.first", "distance, start", ".2f"),
    Column("distance.last", "distance, end", ".2f"),
    Column("distance.slope", "distance, per minute", "+.2f"),
    Column("sharpness.last", "sharpness, end, %", ".0f", 100),
    Column("saturation.last", "saturation, end, %", ".0f", 100),
    Column("amount", "motion, %", ".0f", 100),
    Column("static", "static, %", ".0f", 100),
    Column("unrest", "unrest, %", ".2f", 100),
    Column("flicker", "flicker", ".2f"),
    Column("at_cuts", "right at cuts, %", ".0f", 100),
    Column("between", "right between, %", ".0f", 100),
    Column("kept", "looks kept, %", ".0f", 100),
)
LEGEND = (
    "Means over scripts with bootstrapped 95 % intervals. *frames/s*: of processor time, decoding included. *distance*: "
    "Frechet, of latents to those of the world's tellings, 1 where one more telling would be, in the first and the last "
    "window of about 10 s. *sharpness* and the other looks: in % of the world's. *motion*: blocks that move, in % of the "
    "world's; *static*: seconds in which the world moves and the video does not; *unrest*: blocks that move while the "
    "world stands still; *flicker*: change where chunks meet by change at other latents, 1 as in the world. *right*: "
    "chunks that show who their prompt asks for, those after a cut and all others; *looks kept*: chunks of a lone one "
    "that agree on pattern and accessory with the one before in their shot."
)


@dataclass(frozen=True)
class Contestant:
    """Who streams: a model with a memory; weights: what tells its files apart."""

    name: str
    model: str
    memory: str
    weights: str

    @classmethod
    def of(cls, name: str, model: str, memory: str) -> Contestant:
        return cls(name, model, memory, models.find(model).fingerprint())


def contestants(given: argparse.Namespace) -> list[Contestant]:
    """Read who is to stream. Raises InputError for names that do not tell them apart."""
    specs = [spec.strip() for spec in given.models.split(",") if spec.strip()]
    names = [name.strip() for name in given.names.split(",")] if given.names else specs
    if not specs or len(names) != len(specs):
        raise InputError(f"{len(specs)} models and {len(names)} names; expected at least one, and a name for each")
    found = []
    for name, spec in zip(names, specs):
        model, memory = spec.rsplit("@", 1) if "@" in spec else (spec, given.memory)
        found.append(Contestant.of(name, model, memory))
    if given.reference:
        found.append(Contestant.of(RENDERED, found[0].model, "none"))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise InputError(f"names {', '.join(names)}: two are the same; give others with --names")
    return found


def load(who: Contestant, device: str) -> Engine:
    """Load a contestant. Raises InputError where its time is not the world's."""
    engine = Engine.from_pretrained(who.model, who.memory, device=device)
    layout = engine.layout
    clock = layout.fps, layout.temporal_stride, layout.frames_per_chunk
    if clock != (FPS, FRAMES_PER_LATENT, LATENTS_PER_CHUNK):
        raise InputError(
            f"{who.model} has {clock[0]} frames/s, {clock[1]} frames in a latent and {clock[2]} latents in a chunk; the "
            f"narrative world has {FPS}, {FRAMES_PER_LATENT} and {LATENTS_PER_CHUNK}"
        )
    return engine


def tell(script: int, seconds: float, layout: Layout, telling: int) -> Narrative:
    """A script's prompts, told with other unstated looks for every telling."""
    size = WorldSize(layout.width, layout.height)
    plot = Narrative.random(SEEDS + script, seconds, size)
    shots = [(shot.prompt, shot.start_chunk) for shot in plot.shots]
    return Narrative(shots, plot.chunks, SEEDS + script + APART * telling, size)


@torch.no_grad()
def streamed(engine: Engine, narrative: Narrative, seed: int) -> Tensor:
    """Stream a narrative's prompts -> uint8 [T, 3, H, W]."""
    session = engine.session({shot.start_chunk: shot.prompt for shot in narrative.shots}, seed)
    return torch.cat([session.step().frames[0].cpu() for _ in range(narrative.chunks)])


@torch.no_grad()
def rendered(engine: Engine, narrative: Narrative) -> Tensor:
    """The world's own frames through the codec -> uint8 [T, 3, H, W]."""
    video = to_float(torch.from_numpy(narrative.render()))[None].to(engine.device, engine.codec.dtype)
    return to_uint8(engine.codec.decode(engine.codec.encode(video).to(video.dtype)))[0].cpu()


class World:
    """What the world makes of a script, to compare videos with."""

    def __init__(self, script: int, seconds: float, layout: Layout, eye: PreviewCodec, reader: Reader) -> None:
        self.eye, self.reader = eye, reader
        told = [tell(script, seconds, layout, telling) for telling in range(1, TELLINGS + 1)]
        self.plot = told[0]
        self.switches = [shot.start_chunk for shot in self.plot.shots]
        self.videos = [torch.from_numpy(narrative.render()) for narrative in told]
        self.windows = drift.describe(self.videos, eye)

    def measure(self, video: Tensor) -> dict[str, Any]:
        """What is kept of a video: every window's drift, its motion, and how it follows prompts."""
        return {
            "windows": [round(window.seconds, 3) for window in self.windows],
            "drift": drift.measure(video, self.windows, self.eye),
            "motion": motion.measure(video, self.videos, self.switches)._asdict(),
            "prompts": prompts.measure(video, self.plot, self.reader)._asdict(),
        }


# the report


def quantities(line: Mapping[str, Any]) -> dict[str, float | None]:
    """All that a line says, by name: drift as `quantity.first`, `.last` and `.slope` (per minute)."""
    found: dict[str, float | None] = {"speed": line["frames"] / line["seconds"] if line["seconds"] else None}
    for name, values in line["drift"].items():
        course = drift.course(values, line["windows"])
        found |= {f"{name}.{part}": value for part, value in course._asdict().items()}
    return found | line["motion"] | line["prompts"]


def report(found: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> tuple[str, dict[str, Any]]:
    """Put quantities by contestant and script into words and numbers: markdown, JSON."""
    first, *others = found
    names = list(next(iter(found[first].values())))

    def of(who: str, name: str) -> dict[tuple[int, int], float | None]:
        return {(script, 0): values[name] for script, values in found[who].items()}

    means = {
        who: {n: bootstrap({k: [] if x is None else [x] for (k, _), x in of(who, n).items()}) for n in names}
        for who in found
    }
    minus = {who: {n: paired(of(who, n), of(first, n)) for n in names} for who in others if who != RENDERED}
    titles = [column.title for column in SUMMARY]
    courses = []
    for who in found:
        for quantity in (*drift.LOOKS, drift.DISTANCE):
            form, scale = (".2f", 1) if quantity == drift.DISTANCE else (".0f", 100)
            cells = [means[who][f"{quantity}.{part}"] for part in drift.Course._fields]
            forms = form, form, f"+{form}"
            courses.append([who, quantity, *(shown(x, f, scale) for x, f in zip(cells, forms))])
    text = [
        f"# Streams compared: {len(found[first])} scripts",
        LEGEND,
        table(["model", *titles], [[w, *(shown(means[w][c.name], c.form, c.scale) for c in SUMMARY)] for w in found]),
        "## Drift",
        table(["model", "quantity", "first window", "last window", "per minute"], courses),
    ]
    if minus:
        rows = [[w, *(shown(minus[w][c.name], f"+{c.form.lstrip('+')}", c.scale) for c in SUMMARY)] for w in minus]
        text += [f"## Minus `{first}`, the same scripts and seeds", table(["model", *titles], rows)]
    numbers = {
        "scripts": len(found[first]),
        "means": {who: {n: asdict(x) for n, x in rates.items()} for who, rates in means.items()},
        f"minus_{first}": {who: {n: asdict(x) for n, x in rates.items()} for who, rates in minus.items()},
    }
    return "\n\n".join(text) + "\n", numbers


def picture(folder: Path, who: Contestant, script: int) -> Path:
    return folder / "frames" / f"{script:03d}" / f"{who.name.replace('/', '_')}.png"


def keep_moments(video: Tensor, moments: int, path: Path) -> None:
    """Write some frames of a video below each other, for the filmstrip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = video[[at(k, moments, len(video)) for k in range(moments)]]
    Image.fromarray(chosen.permute(0, 2, 3, 1).flatten(0, 1).numpy()).save(path)


def at(moment: int, moments: int, frames: int) -> int:
    """The frame of one of so many moments, evenly through a video."""
    return int((moment + 0.5) / moments * frames)


def draw(folder: Path, who: Sequence[Contestant], narratives: Sequence[Narrative], moments: int) -> None:
    """Per script a row for every contestant, time to the right."""
    shots, captions = [], []
    for script, narrative in enumerate(narratives):
        strips = [np.asarray(Image.open(picture(folder, one, script))) for one in who]
        if len({strip.shape for strip in strips}) > 1:
            raise InputError("the models make frames of different sizes: no filmstrip; use --strips 0")
        frames = np.stack([strip.reshape(moments, -1, *strip.shape[1:]) for strip in strips]).transpose(1, 0, 4, 2, 3)
        for moment, below in enumerate(frames):
            frame = at(moment, moments, narrative.frames)
            shots.append(below)
            captions.append(f"script {script}, {frame / FPS:.0f} s\n{narrative.prompt(chunk_of(frame))}")
    filmstrip(shots, captions, folder / "filmstrip.png", columns=moments, frame_width=240, labels=[w.name for w in who])


# the command


def stream_all(given: argparse.Namespace, who: Sequence[Contestant], results: Lines) -> list[Narrative]:
    """Stream what is not there yet, script by script -> the scripts' narratives, as large as the first model's frames."""
    engines, eye, reader = {one: load(one, given.device) for one in who}, drift.eye(), Reader.load()
    for script in range(given.scripts):
        worlds: dict[tuple[int, int], World] = {}
        for one in who:
            if results.of(script=script, **asdict(one)):
                continue
            engine = engines[one]
            narrative = tell(script, given.seconds, engine.layout, 0)
            started = time.process_time()
            if one.name == RENDERED:
                video, seconds = rendered(engine, narrative), 0.0
            else:
                video = streamed(engine, narrative, SEEDS + script)
                seconds = round(time.process_time() - started, 3)
            size = engine.layout.height, engine.layout.width
            if size not in worlds:
                worlds[size] = World(script, given.seconds, engine.layout, eye, reader)
            keep_moments(video, given.moments, picture(results.folder, one, script))
            line = {**asdict(one), "script": script, "frames": len(video), "seconds": seconds}
            results.add(line | worlds[size].measure(video))
            spent = f"{len(video) / seconds:.1f} frames/s" if seconds else "done"
            print(f"{one.name}, script {script + 1} of {given.scripts}: {spent}", flush=True)
    return [
        tell(script, given.seconds, engines[who[0]].layout, 0) for script in range(min(given.strips, given.scripts))
    ]


def run(given: argparse.Namespace) -> None:
    if given.threads:
        torch.set_num_threads(given.threads)
    if min(given.scripts, given.moments) < 1:
        raise InputError(f"--scripts {given.scripts} --moments {given.moments}; expected at least one of each")
    who = contestants(given)
    settings = {"seconds": given.seconds, "moments": given.moments, "measured": MEASURED}
    results = Lines(Path(given.out), settings)
    narratives = stream_all(given, who, results)
    found = {
        one.name: {
            line["script"]: quantities(line) for line in results.of(**asdict(one)) if line["script"] < given.scripts
        }
        for one in who
    }
    text, numbers = report(found)
    (results.folder / "report.md").write_text(text)
    numbers |= {"settings": settings, "models": [asdict(one) for one in who]}
    (results.folder / "report.json").write_text(json.dumps(finite(numbers), indent=1))
    if narratives:
        draw(results.folder, who, narratives, given.moments)
    print(f"\n{text}\n{results.folder}/report.md, report.json{', filmstrip.png' if narratives else ''}")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny", help="names or folders with commas, each with @MEMORY if need be")
    parser.add_argument("--names", help="what to call them (default: as they are given)")
    parser.add_argument("--memory", default="sink", help="of models that name none (default: %(default)s)")
    parser.add_argument("--reference", action="store_true", help="also the world's own frames, through the codec")
    parser.add_argument("--scripts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--strips", type=int, default=3, help="scripts in the filmstrip")
    parser.add_argument("--moments", type=int, default=8, help="frames of each script in the filmstrip")
    parser.add_argument("--threads", type=int, default=1, help="0: as many as there are (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/streams")
    given = parser.parse_args(words)
    return status_of(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
