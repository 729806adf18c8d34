"""What a training will take, before it starts: weights trained, memory of a process, arithmetic of a step.

Networks are built on the device `meta`, as shapes; of a published model nothing needs to be on this machine. Arithmetic is
counted in matrix products; memory in what is sure (weights, gradients, averages, optimiser, what a memory reads) and an
estimate of what the backward pass keeps. Transformers may be sharded over the processes, and rows' tokens shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.checkpoints import presets
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.models import assemble

if TYPE_CHECKING:
    from slotmemory.training.recipe import Recipe
    from slotmemory.training.student import Student

SIZES = {"1.3B": WanConfig(), "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)}
# of the published models: the UMT5-XXL encoder and the Wan VAE
TEXT_PARAMETERS, CODEC_PARAMETERS = 5_680_910_336, 126_892_531
# bytes of a trained weight: fp32 with its average, its gradient, the flat gradient that is averaged, AdamW's two moments
TRAINED = 4 * 6
# of one that is sharded, over all processes: its gradient is averaged where it arises
SHARDED = 4 * 5


@dataclass(frozen=True)
class Work:
    """Passes of a network in an average step, for one stream: `rows` rows of so many tokens, that read `keys` more."""

    name: str
    config: WanConfig
    rows: float
    tokens: int
    keys: int
    times: float
    backward: bool = False
    recompute: bool = False

    @property
    def flops(self) -> float:
        # a backward pass takes twice the products of a forward pass, recomputing it once more
        return (
            self.rows
            * self.times
            * (3 + self.recompute if self.backward else 1)
            * forward(self.config, self.tokens, self.keys)
        )

    @property
    def kept(self) -> float:
        """Values that the backward pass keeps of one such pass over all its rows, an estimate."""
        c, layers = self.config, self.config.num_layers
        block = 18 * c.dim + 3 * c.ffn_dim  # per token: norms, projections, rotations, gates, the two halves of the MLP
        per_token = layers * c.dim + block if self.recompute else layers * block
        return self.rows * self.tokens * per_token if self.backward else 0.0


def forward(config: WanConfig, tokens: int, keys: int) -> float:
    """Floating-point operations of one row's pass; a multiplication and an addition count two."""
    dim, text = config.dim, config.text_len
    per_token = 6 * dim * dim + 2 * dim * config.ffn_dim  # q, k, v, o; cross q and o; the MLP: products of one token
    attended = 2 * dim * (tokens + keys + text)
    return 2.0 * config.num_layers * tokens * (per_token + attended)


@dataclass(frozen=True)
class Plan:
    """Per process: parameters by module (trained, all), bytes by what holds them, operations of an average step."""

    parameters: dict[str, tuple[int, int]]
    memory: dict[str, float]
    flops: dict[str, float]
    steps: int
    shares: int = 1  # processes over which transformers are sharded
    minutes: float | None = None  # after which it ends, however many steps were taken

    def steps_per_hour(self, tflops: float) -> float:
        """Steps per hour at so many sustained TFLOP/s of a process."""
        total = sum(self.flops.values())
        return 3600 * tflops * 1e12 / total if total else float("nan")


def plan(recipe: Recipe) -> Plan:
    """Plan a stage that trains a student; InputError for others, whose sizes are small and whose data is rendered."""
    from slotmemory.training.loop import DTYPES, Context
    from slotmemory.training.recipe import find_objective
    from slotmemory.training.student import Student

    objective = find_objective(recipe.objective).Objective
    if not issubclass(objective, Student):
        raise InputError(f"objective {recipe.objective} trains no student; a dry run has nothing to plan for it")
    batch, shares = recipe.samples, recipe.processes if recipe.shard == "fsdp" else 1
    student = objective(recipe.options, Context(batch, device=torch.device("meta"), dtype=DTYPES[recipe.precision]))
    modules = {**student.modules(), "teacher": student.teacher.module}
    parameters = {name: count(module.parameters()) for name, module in modules.items()}
    memory = held(student, parameters, batch, shares, recipe.sequence_parallel)
    rows = batch * recipe.accumulate / recipe.sequence_parallel
    flops = {work.name: rows * work.flops for work in student.work()}
    return Plan(parameters, memory, flops, recipe.steps, shares, recipe.max_minutes)


def count(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """Parameters that are trained, and all of them."""
    sizes = [(p.numel() * p.requires_grad, p.numel()) for p in parameters]
    return sum(trained for trained, _ in sizes), sum(size for _, size in sizes)


def held(
    student: Student, parameters: dict[str, tuple[int, int]], batch: int, shares: int = 1, degree: int = 1
) -> dict[str, float]:
    """Bytes in one process by what holds them; shares: processes over which transformers are sharded, degree: those
    that share the tokens of a row."""
    layout, dtype, work = student.engine.layout, student.context.dtype, student.work()
    networks = {name: parameters[name] for name in ("transformer", "critic", "teacher") if name in parameters}
    others = [sizes for name, sizes in parameters.items() if name not in networks]
    of_network = SHARDED / shares if shares > 1 else TRAINED
    trained = of_network * sum(t for t, _ in networks.values()) + TRAINED * sum(t for t, _ in others)
    fixed = sum(size - t for name, (t, size) in networks.items() if name != "teacher") / shares
    fixed += sum(size - t for t, size in others)
    cast = sum(size for name, (_, size) in networks.items() if name != "teacher")
    # a block in use and the next one, and the gradients of one in fp32
    layers = {"teacher": student.teacher.config.num_layers}
    block = max(size / layers.get(name, student.transformer.config.num_layers) for name, (_, size) in networks.items())
    read = (student.memory.budget or 0) * layout.bytes_per_token(dtype.itemsize) * batch
    found = {
        "trained weights": trained,
        "fixed weights": 4 * fixed + dtype.itemsize * networks["teacher"][1] / shares,
        "weights cast for a step": 0 if dtype == torch.float32 or shares > 1 else dtype.itemsize * cast,
        "weights gathered for a block": 0 if shares == 1 else (2 * dtype.itemsize + 4) * block,
        "what the memory holds and reads": 2 * read,
        # generator and critic are differentiated together
        "kept for the backward pass": batch * dtype.itemsize * sum(w.kept for w in work) / degree,
    }
    if isinstance(student.words, Told):
        found["text encoder and codec"] = dtype.itemsize * TEXT_PARAMETERS + 4 * CODEC_PARAMETERS
    return found


# models as shapes


class Told:
    """Stands in for a published text encoder."""

    def check(self, prompt: str) -> None:
        pass


class Strides:
    """Stands in for the Wan VAE."""

    space_stride, time_stride, latent_channels, dtype = 8, 4, 16, torch.float32


def imagine(name: str) -> Engine:
    """A published model by its preset's name, as shapes."""
    preset = presets.find(name)
    size = preset.size or "1.3B"
    with torch.device("meta"):
        backbone = CausalWan(SIZES[size])
    return assemble(backbone.eval().requires_grad_(False), Strides(), Told(), preset.settings())


def told(plan: Plan, tflops: float, what: str = "sustained") -> list[str]:
    """Write a plan in three lines; what: whose TFLOP/s of a process they are."""

    def amount(value: float) -> str:
        return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"

    parts = [f"{name} {amount(t)} of {amount(all_)}" for name, (t, all_) in plan.parameters.items() if t]
    fixed = [f"{name} {amount(all_)}" for name, (t, all_) in plan.parameters.items() if not t and all_]
    memory = sorted(plan.memory.items(), key=lambda item: -item[1])
    parted = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory if size >= 5e7)
    sharing = f"transformers sharded over {plan.shares}" if plan.shares > 1 else "not sharded"
    lines = [
        f"trained     {', '.join(parts)}; fixed: {', '.join(fixed)}",
        f"memory      about {sum(plan.memory.values()) / 1e9:.1f} GB per process, {sharing} ({parted})",
    ]
    if plan.flops:
        pace = plan.steps_per_hour(tflops)
        shares = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in plan.flops.items())
        takes = f"{plan.steps / pace:.1f} h for {plan.steps} steps"
        if plan.minutes is not None and pace * plan.minutes / 60 < plan.steps:
            takes = f"{pace * plan.minutes / 60:.0f} of {plan.steps} steps in its {plan.minutes:g} minutes"
        lines.append(
            f"arithmetic  {sum(plan.flops.values()) / 1e12:.3g} TFLOP per step and process ({shares}): at {tflops:.3g} TFLOP/s "
            f"{what} {pace:.0f} steps per hour, {takes}"
        )
    return lines
