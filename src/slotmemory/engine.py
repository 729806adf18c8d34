"""The stateless bundle a session runs on: backbone, codec, text encoder, sampler and memory.

One engine serves any number of sessions. It knows how to be assembled, not how a chunk is made (`session.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slotmemory import memory as memories
from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.codecs.base import Codec
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memory import Memory
from slotmemory.sampler import Euler, FewStep
from slotmemory.script import Script
from slotmemory.session import Chunk, Session


class Text(Protocol):
    """What a text encoder offers: `encode(prompts) -> embeddings [B, L, C], words [B]`, and `check(prompt)`."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def check(self, prompt: str) -> None:
        """Raise ValueError for a prompt the encoder cannot take."""
        ...


@dataclass(frozen=True)
class Engine:
    """Everything a stream needs that does not change. `context_noise` is the noise level (sigma) of clean passes."""

    backbone: CausalWan
    codec: Codec
    text: Text
    sampler: FewStep | Euler
    memory: Memory
    layout: Layout
    context_noise: float = 0.0
    # memory arguments the model was trained for; under "for", by policy, what holds for one policy alone
    memory_defaults: Mapping[str, Any] = field(default_factory=dict)
    memory_weights: Mapping[str, Path] = field(default_factory=dict)  # files that came with the model, by policy
    adapters: Mapping[str, Any] = field(default_factory=dict)  # LoRAs that stay switchable, by name: set their `scale`
    any_size: bool = False  # whether the model makes other sizes than the layout's

    @classmethod
    def from_pretrained(
        cls,
        model: str = "tiny",
        memory: str = "slots",
        budget: int | None = None,
        steps: Sequence[int] | int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quant: str | None = None,
        offload: str | None = None,
        compile: bool = False,
        kernel: str | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model by name or folder and give it a memory.

        memory: a name (`slotmemory memories`) or the path of a policy file; options are that memory's arguments.
        budget: tokens per layer it may read. steps: a few-step list such as [1000, 750, 500, 250], or a number of Euler
        steps. dtype: default bf16 where the processor multiplies it natively, else fp32. quant: int8 or fp8 weights.
        offload: "text", "codec" or "all" rest on the processor; compile: the blocks; kernel: of attention, such as cudnn,
        flash, flash_attn, flex (docs/performance.md).
        """
        from slotmemory.models import load

        engine = load(model, torch.device(device), dtype, quant, offload, compile, kernel)
        if steps is not None:
            engine = engine.with_steps(steps)
        return engine.with_memory(memory, budget, **options)

    def with_memory(self, name: str, budget: int | None = None, **options: Any) -> Engine:
        """Return the same engine with another memory; weights are shared.

        A policy with weights of its own gets those that came with the model (`memory.<name>.safetensors` in its folder),
        or those of a file given as `weights=PATH`; `weights=none` leaves it untrained.
        """
        from slotmemory.models import fill_memory

        arguments = self.defaults_for(name, options)
        policy = memories.build(name, self.layout, budget, **arguments)
        if self.device.type != "meta":  # else there are no numbers to take
            policy.adopt(*self.patch)
        trained = self.weights_for(name, arguments)
        if trained is not None:
            fill_memory(policy, trained, arguments)
        return replace(self, memory=policy.to(self.device).eval().requires_grad_(False))

    def defaults_for(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """The memory arguments that the loaded model was trained for, where the policy has them and none were given."""
        found = self.trained_for(memories.find(name))
        trained = self.weights_for(name, options)
        if trained is not None:
            from slotmemory.models import memory_arguments

            found |= memory_arguments(trained)
        if trained is not None and options.get("weights"):
            options = {**options, "weights": str(trained)}  # a recipe is read from any working directory
        return found | options

    def trained_for(self, policy: type[Memory]) -> dict[str, Any]:
        """The arguments of a policy that the model's settings name, in general or for this policy alone."""
        known = memories.arguments(policy)
        own = self.memory_defaults.get("for", {}).get(policy.called(), {})  # no argument can be called `for`
        return {k: v for k, v in {**self.memory_defaults, **own}.items() if k in known}

    def weights_for(self, name: str, options: Mapping[str, Any]) -> Path | None:
        """Find a policy's trained weights: what the argument `weights` says, else what came with the model."""
        given = options.get("weights")
        if given == "none":
            return None
        return Path(given).resolve() if given else self.memory_weights.get(memories.find(name).called())

    def with_layout(self, **sizes: int) -> Engine:
        """Return the same engine for other sizes (height, width, frames_per_chunk, ...), its memory rebuilt as `none`."""
        layout = replace(self.layout, **sizes)
        return replace(self, layout=layout, memory=memories.build("none", layout))

    def with_steps(self, steps: Sequence[int] | int) -> Engine:
        schedule = self.sampler.schedule
        sampler = Euler(steps, schedule) if isinstance(steps, int) else FewStep(tuple(steps), schedule)
        sampler.timesteps  # noqa: B018 - an impossible list fails here, not in the middle of a stream
        return replace(self, sampler=sampler)

    @property
    def modules(self) -> list[nn.Module]:
        """The networks: transformer (also under guidance), codec, and the text encoder where it is one of ours."""
        parts = (getattr(self.backbone, "backbone", self.backbone), self.codec, self.text)
        return [part for part in parts if isinstance(part, nn.Module)]

    @property
    def device(self) -> torch.device:
        return self.backbone.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def patch(self) -> tuple[Tensor, Tensor]:
        """Weight [C, c, 1, ph, pw] and bias [C] of the backbone's patch embedding, as copies in fp32 on the CPU."""
        embedding = self.backbone.patch_embedding
        return tuple(x.detach().to("cpu", torch.float32, copy=True) for x in (embedding.weight, embedding.bias))

    def session(self, script: Script | dict[int, str] | str, seed: int | Sequence[int] | None = None) -> Session:
        """Open a stream. script: a Script, prompts by the chunk they start at, or one prompt for a live stream.

        seed: one stream; a sequence of seeds: a batch of streams of the same script.
        """
        if isinstance(script, Script):
            schedule = script.schedule(self.layout)
            prompts = {schedule.chunks_of(i).start: shot.prompt for i, shot in enumerate(script.shots)}
            places = [script.place_of(i) for i in range(len(script.shots))]
            chunks = schedule.chunks
            seed = script.seed if seed is None else seed
        else:
            prompts, chunks = ({0: script} if isinstance(script, str) else script), None
            places = [f"prompt at chunk {chunk}" for chunk in prompts]
        for place, prompt in zip(places, prompts.values()):
            try:
                self.text.check(prompt)
            except ValueError as error:
                raise InputError(f"{place}: {error}") from error
        seeds = [0 if seed is None else seed] if seed is None or isinstance(seed, int) else list(seed)
        return Session(self, prompts, chunks, seeds)

    def stream(self, script: Script | str | Path, seed: int | None = None) -> Iterator[Chunk]:
        """Make a script's video chunk by chunk; script: a Script, or the path of a script file."""
        if isinstance(script, Path) or (isinstance(script, str) and Path(script).suffix in (".yaml", ".yml", ".jsonl")):
            from slotmemory.script import load_script

            script = load_script(script)
        yield from self.session(script, seed)
