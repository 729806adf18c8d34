"""From files to the parts of an engine: transformer with its adapters, codec, text encoder, each in whichever layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.checkpoints.files import INDEX, fingerprint, flat, load_module, read_tree, shards, told_of
from slotmemory.checkpoints.layouts import build, read_transformer
from slotmemory.checkpoints.lora import Adapter, merge, read_lora
from slotmemory.checkpoints.sources import Sources
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.config import cache_folder


def load_transformer(
    sources: Sources, device: torch.device, dtype: torch.dtype
) -> tuple[CausalWan, dict[str, Adapter]]:
    """Read the transformer, merge the adapters that are to be merged, switch on the others -> model, adapters by name.

    On the device `meta` only its shapes are made, and nothing is merged, which changes none."""
    config, tensors = read_transformer(sources.transformer, sources.part, told_of(sources.transformer), sources.size)
    for each in sources.loras:
        if each.merge and device.type != "meta":
            tensors = merge(tensors, read_lora(each.path), each.scale, str(each.path))
    model, adapters = build(config, tensors, device, dtype), {}
    for each in sources.loras:
        if not each.merge:
            name = f"lora{len(adapters) + 1}"
            adapters[name] = Adapter(model, read_lora(each.path), each.scale, name)
    return model, adapters


def load_codec(path: Path) -> nn.Module:
    """Read a video codec: ours, TAEHV's preview decoder, or the Wan autoencoder in original or diffusers' names."""
    told = told_of(path) if path.suffix == ".safetensors" else {}
    if "decoder_channels" in told:
        return PreviewCodec.load(path)
    tensors = flat(read_tree(path), path)
    if "decoder.3.conv.0.weight" in tensors:
        return PreviewCodec.of_taehv(tensors, path)
    from slotmemory.codecs.wan_vae import WanVAE

    return WanVAE.load(path)


def load_text(path: Path, tokenizer: Path | None, width: int, device: torch.device, host: bool = False):
    """Read a text encoder: the embedded model's words, or UMT5, whose weights are opened when a prompt is new.

    host: UMT5 computes on the processor whatever the device; the embedded model's few words are left where they are."""
    if tokenizer is None:
        words = load_module(lambda values: WordEncoder(**values), path)
        # a few words per prompt cost nothing, and stay exact
        return words.to(device, torch.float32).eval().requires_grad_(False)
    from slotmemory.codecs.umt5 import UMT5, build_umt5

    files = [path, *(path.parent / shard for shard in shards(path))] if path.name.endswith(INDEX) else [path]
    return UMT5(
        lambda: build_umt5(path, width),
        tokenizer,
        identity=fingerprint([*files, tokenizer]),
        width=width,
        device=device,
        computes_on="cpu" if host else None,
        cache=cache_folder() / "text",
    )
