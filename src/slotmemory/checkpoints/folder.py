"""Our own folder of a model: model.json and safetensors files, each carrying its own sizes.

model.json                 height, width, fps, shift, steps, context_noise, memory; optional: any_size,
                           frames_per_chunk, adapters [{"file", "scale"}]
transformer.safetensors    under the names of the Wan release
codec.safetensors          ours, or the Wan autoencoder
words.safetensors          the embedded model's encoder; or text.safetensors (UMT5) with tokenizer.json
memory.<name>.safetensors  trained weights of a memory, with the arguments they were trained with
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from slotmemory.checkpoints.files import read_json
from slotmemory.codecs.base import read_tensors
from slotmemory.errors import InputError, shorten

SETTINGS = "model.json"
# what it tells, beside the sizes that the weights carry
REQUIRED = {
    "height": int,
    "width": int,
    "fps": int,
    "shift": int | float,
    "steps": list | int,  # a few-step list, or a number of Euler steps
    "context_noise": int | float,
    "memory": dict,
}


def settings_of(folder: Path) -> dict[str, Any]:
    """Read model.json, in a model's folder or given itself, and check that it is one."""
    path = folder if folder.is_file() else folder / SETTINGS
    settings = read_json(path)
    for name, kind in REQUIRED.items():
        value = settings.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: '{name}' is {shorten(value)}; the file is damaged or another model's")
    return settings


def pack(folder: Path, parts: dict[str, Path], settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model folder from exported weights: parts by name (transformer, words, codec, ...), stored in `dtype`.

    Statistics and other tensors of one axis stay fp32: they are small, and rounding them shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in parts.items():
        tensors, metadata = read_tensors(path)
        stored = {k: t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t for k, t in tensors.items()}
        write_part(folder / f"{name}.safetensors", stored, metadata)
    write_settings(folder, settings)


def write_part(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file of weights that takes its place only once it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)
    except OSError as error:
        raise InputError.from_os("write", path, error) from None
    except SafetensorError as error:  # a full disk, among others
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {shorten(str(error), 120)}") from None


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
