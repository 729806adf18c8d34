"""Reading weights from files that others wrote: safetensors, shards with an index, and PyTorch's own format.

It knows files and tensors, not what the tensors are (`layouts.py`). Tensors are mapped from the disk where the format
allows, so that only those in use take memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slotmemory.codecs.base import check_tensors, read_metadata_json, read_tensors
from slotmemory.errors import InputError, shorten

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
INDEX = ".safetensors.index.json"

WHOLE = 256 * 2**20  # files up to this size are hashed from end to end
SAMPLES, SAMPLE = 128, 2**17  # of larger ones, this many pieces of this many bytes


def read_tree(path: Path) -> Any:
    """Read a file of weights: tensors by name, or whatever tree of tensors and plain values a .pt file holds.

    A shard index reads all of its shards. Raises InputError for a missing, truncated, incomplete or unsafe file.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path}: expected a file ({', '.join(SUFFIXES)} or *{INDEX})")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix in PICKLED:
        return _read_pickled(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file of quantised weights; use the .safetensors file it was made from")
    raise InputError(f"{path}: weights end in {', '.join(SUFFIXES)} or {INDEX}, not in '{path.suffix}'")


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json says, or {} where there is none."""
    if not path.is_file():
        return {}
    return read_json(path)


def load_module(module_of: Callable[[Any], nn.Module], path: Path) -> nn.Module:
    """Build a module of ours from the sizes in its weights file and fill it; module_of takes the parsed sizes."""
    tensors, metadata = read_tensors(path)
    try:
        module = module_of(read_metadata_json(metadata, "config", path))
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise (
            error if isinstance(error, InputError) else InputError(f"{path}: sizes that make no model ({error})")
        ) from None
    check_tensors(tensors, module.state_dict(), path)
    module.load_state_dict(tensors)
    return module


def told_of(path: Path) -> dict[str, Any]:
    """The sizes that came with a file of weights: in its own header, else in a config.json beside it."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("config")
            if text is not None:
                return json.loads(text)
        except (SafetensorError, ValueError, OSError):
            pass  # whoever reads the tensors says what is wrong
    return read_config(path.parent / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; InputError in one line for whatever else is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({shorten(str(error), 80)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def shards(index: Path) -> dict[str, list[str]]:
    """The files that a shard index names, each with the tensors it should hold."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError(f"{index} has no 'weight_map'; it is no index of safetensors shards")
    found: dict[str, list[str]] = {}
    for name, file in table.items():
        found.setdefault(str(file), []).append(name)
    return found


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(shards(index).items()):
        path = index.parent / file
        if path.parent != index.parent or not path.is_file():
            raise InputError(f"{index} names the shard {shorten(file, 100)}, which is not beside it; fetch all shards")
        held = read_tensors(path)[0]
        missing = [name for name in names if name not in held]
        if missing:
            raise InputError(f"{path} lacks the tensor '{missing[0]}' that {index.name} says it holds")
        tensors |= held
    return tensors


def _read_pickled(path: Path) -> Any:
    def read(mapped: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        try:
            return read(mapped=True)
        except RuntimeError:  # written before PyTorch 1.6, not as an archive: cannot be mapped
            return read(mapped=False)
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, AttributeError, OSError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        other = re.search(r"GLOBAL (\S+)", said) if isinstance(error, UnpicklingError) else None
        if other:
            raise InputError(
                f"{path} holds more than tensors ({shorten(other[1], 100)}); opening such a file can run code hidden in "
                "it, so it is refused: ask its author for .safetensors"
            ) from None
        raise InputError(f"{path} is truncated or no file of weights ({shorten(said, 100)})") from None


def fingerprint(paths: Iterable[Path], told: str = "") -> str:
    """Name weights by their content: 16 digits of a SHA-256 over files and their names, in any order, and a text.

    Files above 256 MB are read in part: their size and 128 pieces spread evenly. Two trainings of a model differ
    everywhere; a file edited in a single small tensor may go unnoticed.
    """
    total = hashlib.sha256(told.encode())
    for path in sorted(set(paths), key=lambda path: (path.name, str(path))):
        try:
            total.update(path.name.encode() + _hash(path))
        except OSError as error:
            raise InputError.from_os("read", path, error) from None
    return total.hexdigest()[:16]


def _hash(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= WHOLE:
        return hashlib.sha256(path.read_bytes()).digest()
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(SAMPLES):
            file.seek((size - SAMPLE) * piece // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return found.digest()


# where trainers of the family keep a network; averaged weights first, as the published programs run them
PARTS = ("generator_ema", "generator", "generator_lora", "model", "state_dict", "module", "ema", "transformer")


def flat(tree: Any, where: Path, part: str | None = None) -> dict[str, Tensor]:
    """Take one network's tensors by name out of a training checkpoint, {"generator": {...}, "critic": {...}, ...}.

    part: which one; by default the first of PARTS that is there. A file that holds nothing but tensors is taken whole.
    """
    while isinstance(tree, Mapping) and not any(isinstance(value, Tensor) for value in tree.values()):
        held = shorten(", ".join(sorted(map(str, tree))) or "nothing", 120)
        if part is not None and part not in tree:
            raise InputError(f"{where} has no part '{part}'; it holds {held}")
        name = part or next((name for name in PARTS if isinstance(tree.get(name), Mapping)), None)
        if name is None:
            raise InputError(f"{where} holds {held}; expected tensors by name, or one of {', '.join(PARTS)}")
        tree, part = tree[name], None
    if part is not None:
        raise InputError(f"{where} has no part '{part}'; it holds one network's tensors and nothing else")
    if not isinstance(tree, Mapping):
        raise InputError(f"{where} holds a {type(tree).__name__}, expected tensors by name")
    return {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
