"""What a full-size stream takes: a randomly initialised Wan2.1 transformer and autoencoder, one memory after another.

    python benchmarks/full_size.py --size 1.3B --seconds 60 --memories none,sink,slots --compile --out full_size.json

For each memory: frames per second, milliseconds per chunk (median and 95th percentile), the first frame's latency, the time
of a chunk at second 5 and at the end, all with every frame decoded and brought to the processor; the same chunk without
decoding; peak memory of device and process; and what share of the machine's measured matrix rate the transformer reaches,
by the floating-point operations that its sizes call for. Numbers do not depend on what weights say, so that random ones
do; prompts are random embeddings, a new one every 10 seconds, and the text encoder is not measured.

What cannot fit is refused before anything is made. Each memory is written to --out as soon as it is measured, and the same
command goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slotmemory import memory as policies
from slotmemory.backbones import kernels
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.backbones.compiled import compile_blocks
from slotmemory.backbones.quantise import quantise
from slotmemory.bench.machine import forget_peaks, matrix_rate, operations, peaks, percentile, synchronised
from slotmemory.checkpoints.layouts import PUBLISHED
from slotmemory.cli.fit import Forecast, advice, forecast
from slotmemory.cli.measures import size as written
from slotmemory.cli.prepare import DTYPES, dtype_for, find_device
from slotmemory.config import parse_steps
from slotmemory.engine import Engine
from slotmemory.errors import InputError, need_extra, unknown
from slotmemory.models import assemble, place_codec
from slotmemory.session import Chunk, Session

BASE, RIVAL = "none", "sink"  # what memories are compared with
SHOT_SECONDS = 10.0
EARLY = 5.0  # seconds of video after which a chunk's time is compared with the end's
AROUND = 8  # chunks whose median is a moment's time


@dataclass(frozen=True)
class Size:
    """What is built: the transformer's sizes, the autoencoder's, and the picture's unless it is asked for."""

    config: WanConfig
    codec: dict[str, Any] = field(default_factory=dict)  # as published
    width: int = 832
    height: int = 480
    memory: dict[str, Any] = field(
        default_factory=dict
    )  # arguments of memories, where the published ones are too large


SIZES = {
    "tiny": Size(
        WanConfig(48, 96, 2, 2, freq_dim=16, text_dim=16, text_len=16),
        {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        96,
        64,
        {"slots": 2, "tokens_per_slot": 6, "slot_dim": 8, "record_every": 1, "bank": 2, "window": 9},
    ),
    **{name: Size(config) for name, config in PUBLISHED.items()},
}


class RandomText:
    """Embeddings [B, L, C] drawn from each prompt's own seed, in place of the text encoder."""

    def __init__(self, config: WanConfig, device: torch.device):
        self.shape, self.device = (config.text_len, config.text_dim), device

    def check(self, prompt: str) -> None:
        pass

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        seeds = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        rows = torch.stack([torch.randn(self.shape, generator=seed) for seed in seeds])
        return rows.to(self.device), torch.full((len(prompts),), self.shape[0] // 4, device=self.device)


class Undecoded:
    """A codec that decodes nothing: what a chunk costs without it."""

    dtype = torch.float32

    def push(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        return latents[:, :, :3], state


def build(given: argparse.Namespace, device: torch.device) -> Engine:
    """Make the engine on a device, `meta` for its shapes alone, in the numbers it computes in from the start."""
    size, dtype = SIZES[given.size], DTYPES[given.dtype]
    module = need_extra("diffusers.models.autoencoders.autoencoder_kl_wan", "wan", "the Wan VAE")
    from slotmemory.codecs.wan_vae import WanVAE

    away = given.offload and find_device(given.device).type != "cpu"
    with torch.device("meta"):
        backbone = CausalWan(size.config).to(dtype).requires_grad_(False)
        codec = WanVAE(module.AutoencoderKLWan(**size.codec)).to(dtype).requires_grad_(False)
    if device.type != "meta":
        backbone = randomised(backbone.to_empty(device=device)).eval()
        codec = randomised(codec.to_empty(device="cpu" if away else device)).eval()
    if given.quant:
        quantise(backbone, given.quant)
    codec = place_codec(codec, device, dtype, away)
    settings = {"width": given.width, "height": given.height, "fps": 16, "shift": 5.0, "context_noise": 0.0}
    settings |= {"steps": parse_steps(given.steps), "memory": size.memory}
    return assemble(backbone, codec, RandomText(size.config, device), settings)


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """Fill weights so that numbers keep their size from layer to layer."""
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim < 2:
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    for name, tensor in module.named_parameters():
        if name.endswith("bias"):
            tensor.zero_()
    return module


def timed(session: Session, device: torch.device) -> tuple[Chunk, float]:
    """Make a chunk and bring its frames to the processor -> it, and its milliseconds."""
    begun = synchronised(device)
    chunk = session.step()
    chunk.frames.cpu()
    return chunk, 1000 * (synchronised(device) - begun)


def measure(engine: Engine, chunks: int, undecoded: int, rate: float) -> dict[str, Any]:
    """Stream `chunks` chunks with every frame decoded and `undecoded` more without."""
    layout, device = engine.layout, engine.device
    shot = max(1, layout.chunks(SHOT_SECONDS))
    prompts = {start: f"shot {i}" for i, start in enumerate(range(0, chunks, shot))}
    forget_peaks(device)
    session, taken, frames, read = engine.session(prompts, 0), [], 0, 0
    for _ in range(chunks):
        chunk, lasted = timed(session, device)
        taken.append(lasted)
        frames += chunk.frames.shape[1]
        read = sum(chunk.trace["read"].values())
    most = peaks(device)
    session.engine = replace(engine, codec=Undecoded())
    bare = statistics.median(timed(session, device)[1] for _ in range(undecoded))
    after = taken[1:] or taken
    early = min(layout.chunks(EARLY), len(taken))
    steady, per_chunk = statistics.median(taken[-AROUND:]), layout.frames_per_chunk * layout.temporal_stride
    passes = len(engine.sampler.timesteps) + 1
    count = operations(engine.modules[0].config, layout.tokens_per_chunk, read, passes)
    return {
        "video_s": layout.seconds(chunks),
        "video_chunks": chunks,
        "frames": frames,
        "frames_per_s": 1000 * frames / sum(taken),
        "first_frame_ms": taken[0],
        "chunk_ms": {"p50": statistics.median(after), "p95": percentile(after, 0.95)},
        "chunk_ms_early": statistics.median(taken[max(1, early - AROUND // 2) : early + AROUND // 2] or taken),
        "chunk_ms_end": steady,
        "undecoded_ms": bare,
        "undecoded_frames_per_s": 1000 * per_chunk / bare,
        "tokens_read": read,
        "operations_per_chunk": count,
        "share": count / (bare / 1000) / rate,
        "share_with_decode": count / (steady / 1000) / rate,
        "peak": most,
        "all_ms": [round(each, 3) for each in taken],
    }


def forecasts(given: argparse.Namespace, names: Sequence[str], chunks: int) -> dict[str, Forecast | str]:
    """What each memory's stream will take, before any weights are made; a sentence where the memory cannot be built."""
    shapes, device, found = build(given, torch.device("meta")), find_device(given.device), {}
    for name in names:
        try:
            arguments = shapes.defaults_for(name, {})
            found[name] = forecast(shapes, name, given.budget, arguments, chunks, device)
        except InputError as error:
            found[name] = str(error)
    return found


def refusal(found: Forecast | str, dtype: torch.dtype) -> str | None:
    """Why a stream is not begun, None where it fits."""
    if isinstance(found, str):
        return found
    if found.fits:
        return None
    needed, free = written(found.needed), written(found.free)
    return f"needs about {needed} and {free} are free: {advice(found, dtype)}"


def opened(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before with the same settings, else an empty report."""
    if path is None or not path.exists():
        return {"settings": settings, "memories": {}}
    try:
        report = json.loads(path.read_text())
        other = [name for name in settings if report["settings"].get(name) != settings[name]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} holds no report of this benchmark; choose another --out") from None
    if other:
        name = other[0]
        raise InputError(
            f"{path} was measured with {name}={report['settings'].get(name)}, now {name}={settings[name]}; "
            "choose another --out"
        )
    return report


def kept(report: dict[str, Any], path: Path | None) -> None:
    """Write the report whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1))
    os.replace(part, path)


def table(report: dict[str, Any]) -> list[str]:
    """Lines for people: one memory each, and what each costs beside none and beside sink + window."""
    rows = report["memories"]
    lines = [
        f"{report['machine']['name']}, matrix rate {report['matrix_rate'] / 1e12:.2f} TFLOP/s in "
        f"{report['settings']['dtype']}, kernel {report['kernel']}",
        f"{'memory':14s}{'tokens':>7s}{'frames/s':>9s}{'p50 ms':>9s}{'p95':>9s}{'first':>9s}{'at 5 s':>9s}{'end':>9s}"
        f"{'no decode':>10s}{'share':>7s}{'device':>10s}{'host':>10s}   time and memory against {BASE}; time against {RIVAL}",
    ]
    for name, row in rows.items():
        if "frames" not in row:
            lines.append(f"{name:14s}{row.get('refused') or row.get('failed')}")
            continue
        device, host = (written(row["peak"][part]) if row["peak"][part] else "-" for part in ("device", "host"))
        lines.append(
            f"{name:14s}{row['tokens_read']:7d}{row['frames_per_s']:9.2f}{row['chunk_ms']['p50']:9.1f}"
            f"{row['chunk_ms']['p95']:9.1f}{row['first_frame_ms']:9.1f}{row['chunk_ms_early']:9.1f}"
            f"{row['chunk_ms_end']:9.1f}{row['undecoded_ms']:10.1f}{row['share']:7.1%}{device:>10s}{host:>10s}   "
            + compared(row, rows)
        )
    return lines


def compared(row: dict[str, Any], rows: dict[str, Any]) -> str:
    """A memory beside none and beside sink + window, at the end of their streams."""
    said = []
    base, rival = (rows.get(name, {}) for name in (BASE, RIVAL))
    if "frames" in base:
        part = "device" if row["peak"]["device"] is not None else "host"
        more = (row["peak"][part] or 0) - (base["peak"][part] or 0)
        said.append(
            f"{row['chunk_ms_end'] / base['chunk_ms_end']:.3f} x, {'-' if more < 0 else '+'}{written(abs(more))}"
        )
    if "frames" in rival:
        said.append(f"{row['chunk_ms_end'] / rival['chunk_ms_end']:.3f} x")
    return "; ".join(said)


def run(given: argparse.Namespace) -> int:
    device = find_device(given.device)
    given.dtype = given.dtype or dtype_for(device)[0]
    given.width, given.height = given.width or SIZES[given.size].width, given.height or SIZES[given.size].height
    if given.threads:
        torch.set_num_threads(given.threads)
    wanted = (
        policies.names() if given.memories == "all" else [x.strip() for x in given.memories.split(",") if x.strip()]
    )
    for name in wanted:
        if name not in policies.names() and not name.endswith(".py"):
            raise InputError(unknown("memory", name, policies.names()))
    wanted = list(dict.fromkeys([BASE, *wanted]))
    settings = {k: v for k, v in vars(given).items() if k not in ("memories", "out")} | {"device": str(device)}
    report = opened(given.out, settings)
    chunks = build(given, torch.device("meta")).layout.chunks(given.seconds)
    missing = [name for name in wanted if "frames" not in report["memories"].get(name, {})]
    expected = forecasts(given, missing, chunks)
    if BASE in expected and (reason := refusal(expected[BASE], DTYPES[given.dtype])):
        raise InputError(f"a {given.size} stream of {given.width}x{given.height} without a memory {reason}")
    if missing:
        engine = build(given, device)
        config = engine.modules[0].config
        report["kernel"] = kernels.use(given.kernel, device, engine.dtype, config.head_dim)
        regions = compile_blocks(engine.modules[0]) if given.compile else []
        report["matrix_rate"] = matrix_rate(device, engine.dtype)
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        )
        report["machine"] = {"name": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        report["config"] = asdict(config)
    for name in missing:
        reason = refusal(expected[name], DTYPES[given.dtype])
        if reason:
            report["memories"][name] = {"refused": reason}
        else:
            print(f"{name}: {chunks} chunks ...", file=sys.stderr, flush=True)
            try:
                row = measure(engine.with_memory(name, given.budget), chunks, given.undecoded, report["matrix_rate"])
                row["forecast"] = expected[name].footprint.streaming
                report["memories"][name] = row
            except (InputError, torch.OutOfMemoryError) as error:
                report["memories"][name] = {"failed": " ".join(str(error).split())[:300]}
        report["compiled"] = {region.name: not region.dropped for region in regions}
        kept(report, given.out)
    report["memories"] = {name: report["memories"][name] for name in wanted} | report["memories"]
    kept(report, given.out)
    print("\n".join(table(report)))
    return 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: 832)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: 480)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of video for each memory")
    parser.add_argument("--memories", default="none,window,sink,slots", help="with commas, or all")
    parser.add_argument("--budget", type=int, help="tokens per layer for each memory (default: each memory's own)")
    parser.add_argument("--steps", default="1000,750,500,250", help="as in `slotmemory generate`")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the device is fast at")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--quant", choices=("int8", "fp8"), help="eight-bit weights in the transformer's blocks")
    parser.add_argument("--kernel", choices=kernels.KERNELS, help="of attention (default: torch's)")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--offload", action="store_true", help="let the autoencoder rest on the processor")
    parser.add_argument("--undecoded", type=int, default=AROUND, help="chunks that are timed without decoding")
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's choice)")
    parser.add_argument(
        "--out", type=Path, help="a JSON file, written after each memory; the same command goes on with it"
    )
    try:
        return run(parser.parse_args(words))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
