"""Networks in training as sessions and scores take them: cast, recomputed; and where their weights come from.

Nothing here knows an objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slotmemory.backbones.causal_wan import CausalWan, Seen, TextKeys, WanConfig
from slotmemory.backbones.guided import Guided
from slotmemory.checkpoints.files import load_module
from slotmemory.checkpoints.lora import Adapter, Lora, Pair
from slotmemory.checkpoints.presets import names as preset_names
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.engine import Engine
from slotmemory.models import assemble, load
from slotmemory.training import loop
from slotmemory.training.pack import exported, settings_of
from slotmemory.training.parallel import fixed, sharded
from slotmemory.training.plan import imagine

PRESETS = frozenset(preset_names())
LORA = "lora"  # what an adapter is called inside the layer it changes


class Cast:
    """A transformer with fp32 weights, run in `dtype`; a session takes it for a backbone.

    `refresh` casts the weights within the autograd graph; call it once before each backward pass. With `recompute`,
    blocks keep their inputs only where gradients are recorded, and are computed again in the backward pass.
    With `keep_seen`, what the last such pass saw stays in `seen`, with its gradients.
    """

    def __init__(self, module: CausalWan, dtype: torch.dtype, recompute: bool = False):
        self.module, self.dtype, self.recompute = module, dtype, recompute
        self.config = module.config
        self.keep_seen, self.seen, self.fixed = False, None, False
        self.refresh()

    def refresh(self) -> None:
        # sharded weights are gathered and cast block by block, whenever they are needed
        self.weights = {} if sharded(self.module) else loop.cast_weights(self.module, self.dtype)
        self.seen = None

    @contextmanager
    def constant(self) -> Iterator[None]:
        """Run with weights that take no gradient, for rollouts from which only a memory learns."""
        kept, self.weights = self.weights, {name: weight.detach() for name, weight in self.weights.items()}
        self.fixed = True
        try:
            with fixed(self.module) if sharded(self.module) else nullcontext():
                yield
        finally:
            self.weights, self.fixed = kept, False

    @property
    def patch_embedding(self) -> nn.Module:
        return self.module.patch_embedding

    def text_keys(self, embeddings: Tensor) -> TextKeys:
        return self._call(embeddings.to(self.dtype), method="text_keys")

    def __call__(self, *given: Any) -> tuple[Tensor, list[Seen]]:
        """As `CausalWan.forward`."""
        if not torch.is_grad_enabled():
            return self._call(*given)
        with self._recomputing() if self.recompute else nullcontext():
            flow, seen = self._call(*given)
        self.seen = seen if self.keep_seen else None
        return flow, seen

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Let every block keep its inputs only."""
        blocks = self.module.blocks
        for number, block in enumerate(blocks):
            block.forward = partial(self._again, number)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _again(self, number: int, *given: Any) -> tuple[Tensor, Seen]:
        if sharded(self.module):
            return self._again_gathered(self.module.blocks[number], *given)
        prefix = f"blocks.{number}."
        weights = {f"block.{k.removeprefix(prefix)}": w for k, w in self.weights.items() if k.startswith(prefix)}
        block = _Block(self.module.blocks[number])

        # the backward pass runs it when the weights that stood in for the module's are gone, so it brings its own;
        # a pattern holds what the pass may read, unchanged for as long as it lasts: both computations see the same
        def run(*given: Any) -> tuple[Tensor, Seen]:
            return torch.func.functional_call(block, weights, given)

        return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)

    def _again_gathered(self, block: nn.Module, *given: Any) -> tuple[Tensor, Seen]:
        was_fixed = self.fixed

        # runs while the block's weights are gathered, both times
        def run(*given: Any) -> tuple[Tensor, Seen]:
            with fixed(block) if was_fixed else nullcontext():
                return type(block).forward(block, *given)

        return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)

    def run(self, *given: Any) -> tuple[Tensor, Tensor, list[Seen]]:
        return self._call(*given, method="run")

    def _call(self, *given: Any, method: str = "forward") -> Any:
        if sharded(self.module):
            self.weights = {}  # those from before it was, whole
            return loop.cast_call(self.module, self.dtype, *given, method=method)
        return loop.call_with(self.module, self.weights, *given, method=method)


class _Block(nn.Module):
    """A block by the forward of its class, whatever stands in for it on the block itself."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *given: Any) -> tuple[Tensor, Seen]:
        return type(self.block).forward(self.block, *given)


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


def open_engine(source: str, base: str | None, codec: str, device: torch.device) -> Engine:
    """Load what training starts from, in fp32: a model by name or folder, or the weights of a training run.

    A run's weights go with the codec, text encoder and settings of the model `base`, or else with the run's own words and
    settings (`pack.settings_of`) and a codec's file. On the device `meta` a preset is shapes alone, and a run that does not
    exist yet has the shapes of its base."""
    folder = Path(source)
    if device.type == "meta" and (source in PRESETS or (base in PRESETS and not folder.exists())):
        return imagine(source if source in PRESETS else base)
    if not (folder / "weights").is_dir():
        engine = load(source, device, torch.float32)
        return replace(engine, backbone=unguided(engine.backbone))
    transformer = load_transformer(source, base, device).eval().requires_grad_(False)
    if base is not None:
        return replace(
            imagine(base) if device.type == "meta" else load(base, device, torch.float32), backbone=transformer
        )
    words = load_module(lambda values: WordEncoder(**values), exported(folder, "words"))
    video = PreviewCodec.load(codec).to(device).eval().requires_grad_(False)
    return assemble(transformer, video, words.to(device).eval().requires_grad_(False), settings_of(folder))


def load_transformer(source: str, base: str | None, device: torch.device, part: str = "transformer") -> CausalWan:
    """Load a transformer alone, in fp32: from a model by name or folder, or the run folder of a training.

    part: what it is called in a run; "critic" takes the transformer where there is no critic. base: as in `open_engine`."""
    folder = Path(source)
    if device.type == "meta" and (source in PRESETS or (base in PRESETS and not folder.exists())):
        return imagine(source if source in PRESETS else base).backbone.requires_grad_(True)
    if not (folder / "weights").is_dir():
        return unguided(load(source, device, torch.float32).backbone).requires_grad_(True)
    found = any((folder / "weights" / f"{part}{kind}.safetensors").is_file() for kind in ("", ".ema"))
    path = exported(folder, part if found else "transformer")
    return load_module(lambda values: CausalWan(WanConfig(**values)), path).to(device)


def unguided(backbone: Any) -> CausalWan:
    """A loaded model's transformer itself; whoever trains or scores with it guides it as told."""
    return backbone.backbone if isinstance(backbone, Guided) else backbone


def add_lora(model: CausalWan, rank: int) -> None:
    """Fix a transformer and give every linear layer inside its blocks a low-rank adapter to train (LongLive, MemFlow).

    The adapters change nothing before they are trained: alpha is the rank, and their second halves are zeros."""
    pairs = {}
    for name, layer in model.blocks.named_modules(prefix="blocks"):
        if isinstance(layer, nn.Linear):
            down = nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=5**0.5)
            pairs[name] = Pair(down, torch.zeros(layer.out_features, rank), 1.0)
    model.requires_grad_(False)
    Adapter(model, Lora(pairs), name=LORA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{LORA}." in name)


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformer with adapters as those of one without."""
    found = {name: tensor for name, tensor in tensors.items() if f".{LORA}." not in name}
    for name, down in tensors.items():
        layer, half, end = name.partition(f".{LORA}.down")
        if half and not end:
            weight = found[f"{layer}.weight"]
            found[f"{layer}.weight"] = weight + (tensors[f"{layer}.{LORA}.up"] @ down).to(weight.dtype)
    return found
