"""Writing a model as a folder of ours, or its transformer alone as one file: any layout in, safetensors out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmemory.backbones.causal_wan import WanConfig
from slotmemory.checkpoints.files import told_of
from slotmemory.checkpoints.folder import write_part, write_settings
from slotmemory.checkpoints.layouts import read_transformer
from slotmemory.checkpoints.lora import Lora, merge, read_lora, to_tensors
from slotmemory.checkpoints.parts import load_codec
from slotmemory.checkpoints.sources import Sources
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.errors import InputError

Say = Callable[[str], None]


def convert(sources: Sources, out: Path, dtype: torch.dtype | None = torch.bfloat16, say: Say = lambda _: None) -> None:
    """Write a model to `out`: a folder, or one file of its transformer where `out` ends in .safetensors.

    Adapters that are to be merged are merged, in fp32 before rounding; the others lie beside the weights in a folder,
    and have no place in a single file. dtype: of the transformer, None for as it is stored; codec and text encoder stay
    as they are. Raises InputError for what cannot be read, an adapter without a place, or a folder that is in use.
    """
    alone = out.suffix == ".safetensors"
    if alone and any(not adapter.merge for adapter in sources.loras):
        raise InputError(
            f"{out} is a single file, an adapter that stays switchable needs a folder; give one, or merge it"
        )
    if not alone and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists; choose a folder that does not, or an empty one")
    config, tensors, kept = _transformer(sources, say)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    target = out if alone else out / "transformer.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"writing {target}")
    write_part(target, tensors, {"config": config.to_json()})
    if alone:
        return
    say(f"writing {out / 'codec.safetensors'}")
    write_part(out / "codec.safetensors", *_codec(sources.codec))
    _text(sources, out, say)
    adapters = []
    for number, (lora, scale) in enumerate(kept, 1):
        write_part(out / f"adapter-{number}.safetensors", *to_tensors(lora))
        adapters.append({"file": f"adapter-{number}.safetensors", "scale": scale})
    for path in sources.memories.values():
        shutil.copyfile(path, out / path.name)
    # last, so that a folder without it is known to be incomplete
    write_settings(out, {**sources.settings, **({"adapters": adapters} if adapters else {})})


def _transformer(sources: Sources, say: Say) -> tuple[WanConfig, dict[str, Tensor], list[tuple[Lora, float]]]:
    """Sizes, tensors with the adapters merged that are to be, and the adapters that are not."""
    say(f"reading {sources.transformer}")
    config, tensors = read_transformer(sources.transformer, sources.part, told_of(sources.transformer), sources.size)
    kept = []
    for adapter in sources.loras:
        say(f"{'merging' if adapter.merge else 'reading'} {adapter.path}, scale {adapter.scale:g}")
        lora = read_lora(adapter.path)
        merged = merge(tensors, lora, adapter.scale, str(adapter.path))  # also of the others, to see that they fit
        if adapter.merge:
            tensors = merged
        else:
            kept.append((lora, adapter.scale))
    return config, tensors, kept


def _codec(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    codec = load_codec(path)
    network: Any = codec if isinstance(codec, PreviewCodec) else codec.model
    return network.state_dict(), codec.metadata()


def _text(sources: Sources, out: Path, say: Say) -> None:
    if sources.tokenizer is None:
        shutil.copyfile(sources.text, out / "words.safetensors")
        return
    from slotmemory.codecs.umt5 import KIND, read_umt5

    say(f"writing {out / 'text.safetensors'}")
    _, tensors = read_umt5(sources.text)
    tensors.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    write_part(out / "text.safetensors", tensors, {"kind": KIND})
    shutil.copyfile(sources.tokenizer, out / "tokenizer.json")
