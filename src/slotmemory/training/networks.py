"""Networks in training as sessions and scores take them: cast, recomputed, guided; and where their weights come from.

Nothing here knows an objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slotmemory.backbones.attention import Pattern
from slotmemory.backbones.causal_wan import CausalWan, Seen, TextKeys, WanConfig
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.models import assemble, embedded, load, load_module
from slotmemory.training import loop
from slotmemory.training.look import SETTINGS
from slotmemory.training.pack import exported


class Cast:
    """A transformer with fp32 weights, run in `dtype`; a session takes it for a backbone.

    `refresh` casts the weights within the autograd graph; call it once before each backward pass. With `recompute`,
    passes that carry gradients keep their inputs only and are computed again, one at a time, in the backward pass.
    """

    def __init__(self, module: CausalWan, dtype: torch.dtype, recompute: bool = False):
        self.module, self.dtype, self.recompute = module, dtype, recompute
        self.config = module.config
        self.refresh()

    def refresh(self) -> None:
        self.weights = loop.cast_weights(self.module, self.dtype)

    @property
    def patch_embedding(self) -> nn.Module:
        return self.module.patch_embedding

    def text_keys(self, embeddings: Tensor) -> TextKeys:
        return self._call(embeddings.to(self.dtype), method="text_keys")

    def __call__(self, *given: Any) -> tuple[Tensor, list[Seen]]:
        """As `CausalWan.forward`."""
        if self.recompute and torch.is_grad_enabled():
            # patterns hold what the pass may read, unchanged for as long as it lasts: both computations see the same
            return checkpoint(self._call, *given, use_reentrant=False, preserve_rng_state=False)
        return self._call(*given)

    def run(self, *given: Any) -> tuple[Tensor, Tensor, list[Seen]]:
        return self._call(*given, method="run")

    def _call(self, *given: Any, method: str = "forward") -> Any:
        return loop.call_with(self.module, self.weights, *given, method=method)


class Guided:
    """A backbone whose flow is led away from a negative prompt: cond + scale (cond - negative)."""

    def __init__(self, backbone: CausalWan | Cast, negative: Tensor, scale: float):
        """negative: the embedded prompt [1, L, C]."""
        self.backbone, self.scale = backbone, scale
        self.against = backbone.text_keys(negative)
        self.dtype, self.config, self.patch_embedding = backbone.dtype, backbone.config, backbone.patch_embedding
        self.text_keys, self.run = backbone.text_keys, backbone.run

    def __call__(
        self, latents: Tensor, timesteps: Tensor, text: TextKeys, frames: Tensor, pattern: Pattern | None = None
    ) -> tuple[Tensor, list[Seen]]:
        negative = [tuple(x.expand(len(latents), -1, -1, -1) for x in layer) for layer in self.against]
        away, _ = self.backbone(latents, timesteps, negative, frames, pattern)
        flow, seen = self.backbone(latents, timesteps, text, frames, pattern)
        return flow + self.scale * (flow - away), seen


class Lines:
    """The text of several streams at once: a prompt of several lines tells each row its own.

    Embeddings are kept, as a text encoder is never trained here."""

    def __init__(self, text: Any, keep: int = 256):
        self.text, self.keep = text, keep
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, prompt: str) -> None:
        for line in prompt.split("\n"):
            self.text.check(line)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """One prompt per row -> embeddings [B, L, C], words [B]."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if len(self.known) + len(new) > self.keep:
            self.known, new = {}, list(dict.fromkeys(prompts))
        if new:
            embeddings, words = self.text.encode(new)
            self.known.update(zip(new, zip(embeddings, words)))
        embeddings, words = zip(*(self.known[prompt] for prompt in prompts))
        return nn.utils.rnn.pad_sequence(embeddings, batch_first=True), torch.stack(words)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What a session asks for: the same prompt for all rows, of one line or of one line per row."""
        lines = prompts[0].split("\n")
        return self.embed(lines if len(lines) > 1 else prompts)


class Undecoded:
    """A codec that leaves latents as they are: training looks at latents only."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def start(self) -> dict[str, Any]:
        return {}

    def push(self, latents: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        return latents.new_zeros(len(latents), 0, 3, 1, 1), state


def open_engine(source: str, codec: str, device: torch.device, dtype: torch.dtype) -> Engine:
    """Load what training starts from: a model by name or folder, or the run folder of a training, which needs `codec`."""
    folder = Path(source)
    if source in embedded() or (folder / "model.json").is_file():
        return load(source, device, dtype)
    transformer = load_transformer(source).to(device, dtype).eval().requires_grad_(False)
    words = load_module(lambda values: WordEncoder(**values), exported(folder, "words"))
    video = PreviewCodec.load(codec).to(device, dtype).eval().requires_grad_(False)
    return assemble(transformer, video, words.to(device).eval().requires_grad_(False), SETTINGS)


def load_transformer(source: str) -> CausalWan:
    """Load a transformer alone: from a model by name or folder, the run folder of a training, or a weights file."""
    if source in embedded():
        return load(source, torch.device("cpu"), torch.float32).backbone
    if not Path(source).exists():
        raise InputError(
            f"{source} does not exist; give a training run, a model folder or name, or a .safetensors file"
        )
    return load_module(lambda values: CausalWan(WanConfig(**values)), exported(Path(source), "transformer"))
