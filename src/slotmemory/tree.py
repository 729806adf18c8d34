"""Trees of plain values and tensors in one safetensors file, and files that appear whole or not at all.

A tree is nested dict, list and tuple over None, bool, int, float, str and tensors. It knows nothing of what the
tree means. The format is written here, tensor by tensor, so that a state on an accelerator is never held twice in
memory and a full disk is an OSError like any other; reading is the safetensors library's.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError, shorten

_FORMAT = "slotmemory.tree.1"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tree_to_file(tree: Any, path: str | Path) -> None:
    """Write a tree; an older file at `path` stays intact until the new one is whole.

    Tensors come back detached, contiguous and on the CPU, with the same bits. Raises TypeError for other values,
    InputError where the disk refuses."""
    tensors: list[torch.Tensor] = []
    metadata = {"format": _FORMAT, "tree": json.dumps(_describe(tree, tensors, "tree"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for number, tensor in enumerate(tensors):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[str(number)] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            if tensor.numel():
                dense = tensor.detach().cpu().contiguous()
                # a dense tensor of one element may carry any stride, and a view of its bytes needs 1
                data = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
                file.write(memoryview(data.numpy()))


def tree_from_file(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read a tree written by `tree_to_file`. Raises InputError if the file is missing, truncated or another's."""
    name = shorten(Path(path), 200)
    try:
        with open(path, "rb"):
            pass
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{name} is not a saved state of this version of slotmemory")
            return _rebuild(json.loads(metadata["tree"]), file.get_tensor)
    except OSError as error:
        raise InputError.from_os("read", path, error) from error
    except InputError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise InputError(f"{name} is truncated or damaged ({shorten(str(error), 80)})") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes `path`'s place only once it is whole and on the disk."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with open(scratch, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
            _sync_folder(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise InputError.from_os("write", path, error) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# In the description, None, bool, float, str and list stand for themselves; everything else is {kind: content}.


def _describe(value: Any, tensors: list[torch.Tensor], where: str) -> Any:
    if value is None or type(value) in (bool, float, str):
        return value  # Python's json gives back every float exactly, inf and nan included
    if type(value) is int:
        return {"int": hex(value)}  # decimal text of a long number is slow, and refused beyond 4300 digits
    if type(value) is list:
        return [_describe(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_describe(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    if type(value) is dict:
        pairs = []
        for key, item in value.items():
            pairs.append([_describe(key, tensors, f"{where} key"), _describe(item, tensors, f"{where}[{key!r}]")])
        return {"dict": pairs}
    if isinstance(value, torch.Tensor):
        if value.dtype not in _DTYPES or value.layout is not torch.strided:
            raise TypeError(f"{where} is a tensor of {value.dtype}, {value.layout}; expected a dense real tensor")
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    raise TypeError(f"{where} is a {type(value).__name__}; expected dict, list, tuple, plain values and tensors")


def _rebuild(node: Any, tensor: Any) -> Any:
    if not isinstance(node, dict):
        return [_rebuild(v, tensor) for v in node] if isinstance(node, list) else node
    ((kind, content),) = node.items()
    if kind == "int":
        return int(content, 16)
    if kind == "tuple":
        return tuple(_rebuild(v, tensor) for v in content)
    if kind == "dict":
        return {_rebuild(k, tensor): _rebuild(v, tensor) for k, v in content}
    if kind == "tensor":
        return tensor(content)
    raise ValueError(f"unknown kind {kind}")
