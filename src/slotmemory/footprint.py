"""How much memory a job will take, before it starts: the real network is run on shapes alone, and its tensors counted.

An engine whose weights are on the `meta` device computes shapes and no numbers; every tensor that a pass, a clean pass
or a decode would hold is seen and counted. What a memory holds is counted from its budget, or from the video where that is
too short to fill it. It knows nothing of devices: what is free is asked of whoever refuses.

Not counted: the allocator's rounding, and the workspaces of convolutions and matrix products.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from slotmemory.backbones.attention import Buffered
from slotmemory.codecs.base import to_uint8
from slotmemory.codecs.offload import Offloaded
from slotmemory.memory import Memory

if TYPE_CHECKING:
    from slotmemory.engine import Engine

PASSES = 4  # chunks decoded on shapes, so that the codec's cache is full


class Watch(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: `now` of those alive, `peak` of the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):  # what was there before, of which the result may be a view
            self._see(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, count: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = count
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    return [leaf.untyped_storage() for leaf in leaves]


class _FusedAttention(TorchFunctionMode):
    """On shapes, attention takes what a fused kernel takes: its result, and no matrix of weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Footprint:
    """Bytes by part at the moment of the peak; `text`: of the text encoder, which is there before the first chunk only."""

    parts: dict[str, int]
    text: int
    tokens: int  # per layer that the memory is counted with
    per_token: int  # bytes that one token of the memory costs at the peak
    state: int  # bytes of a saved state on disk
    host: int = 0  # bytes that rest on the processor while the device computes
    others: tuple[tuple[int, int], ...] = ()  # the other moments of a step: bytes, and bytes that one token costs then

    @property
    def streaming(self) -> int:
        """Bytes while chunks are made."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """The most bytes at any time: prompts are encoded beside the weights, before a memory holds anything."""
        return max(self.streaming, self.text + self.parts["weights"] if self.text else 0)

    def tokens_within(self, free: int) -> int:
        """The largest budget with which the job fits into so many bytes; below 0 if not even an empty memory does."""
        moments = ((self.streaming, self.per_token), *self.others)
        return min((free - (count - self.tokens * each)) // each for count, each in moments)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors are stored in; one that two names share counts once, a quantised one as its parts."""
    stored = {}
    for tensor in tensors:
        quantised = is_traceable_wrapper_subclass(tensor)
        for part in [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if quantised else [tensor]:
            stored[part.untyped_storage()._cdata] = part.nbytes
    return sum(stored.values())


def watched(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """Run something on shapes -> its result, the bytes that its tensors hold, the most bytes on the way."""
    with torch.no_grad(), _FusedAttention(), Watch() as watch:
        result = run()
        return result, watch.now, watch.peak


def predict(engine: Engine, memory: Memory, chunks: int, batch: int = 1, text: int = 0) -> Footprint:
    """Predict what streaming `chunks` chunks takes. engine: with its weights on the `meta` device; text: bytes of a text
    encoder that has prompts to encode on the device.

    What a step holds at once (`Session.step`), at its three fullest moments: in a pass, the memory's state, what was read
    of it and rotated, the buffers that passes attend to, and what the clean pass saw in every layer; at the write, the
    memory as it was and as it will be beside them; in the decoder, both memories and the decoder alone.
    """
    layout, width = engine.layout, engine.dtype.itemsize
    backbone, codec = engine.modules[0], engine.codec
    weights = bytes_of(t for module in engine.modules for t in (*module.parameters(), *module.buffers()))
    if memory.budget is None:  # it may end up with all of the video but its last chunk
        tokens = layout.tokens((chunks - 1) * layout.frames_per_chunk)
    else:  # a short video does not fill a budget; its last chunk makes up for frames kept twice and tokens of a memory's own
        tokens = min(memory.budget, layout.tokens(chunks * layout.frames_per_chunk))

    with torch.device("meta"):
        frames = layout.frames_per_chunk
        latents = torch.empty(batch, frames, layout.latent_channels, layout.latent_height, layout.latent_width)
        embeddings = torch.empty(batch, layout.text_tokens, backbone.config.text_dim, dtype=engine.dtype)
        empty = torch.empty(batch, tokens, layout.heads, layout.head_dim, dtype=engine.dtype)
        (keys, prompt, _) = watched(lambda: backbone.text_keys(embeddings))
        steps = torch.zeros(batch, frames)
        places = torch.arange(frames)
        pattern = Buffered([(empty, empty)] * layout.layers)
        (made, held, most) = watched(lambda: backbone(latents, steps, keys, places, pattern))
        (state, pixels), decoded, decoding = watched(lambda: _decoded(engine, latents))

    per_token = batch * layout.bytes_per_token(width)
    chunk = batch * layout.tokens_per_chunk * layout.bytes_per_token(width)
    buffers = tokens * per_token + chunk if tokens else 0  # a pass on shapes made them, beside what it saw
    seen, reading, kept = held - buffers, tokens * per_token + buffers, tokens * per_token
    del made
    base, decoder, at_rest = {"weights": weights, "prompts": 2 * prompt}, decoded, 0  # two prompts meet at a switch
    if isinstance(codec, Offloaded):
        own = bytes_of(codec.tensors())
        base["weights"] -= own
        at_rest, decoder, decoding = own + bytes_of(tree_leaves(state)), pixels.nbytes, decoding + own
    memories = 2 * kept  # as it was and as it will be
    moments = [
        ({"memory": memories, "reading": reading, "pass": seen + chunk, "decoder": decoder}, 4),
        ({"memory": kept, "reading": reading, "pass": seen + most - held, "decoder": decoder}, 3),
        ({"memory": memories, "decoder": decoding}, 2),
    ]
    each = [(base | parts, (times if tokens else 2) * per_token) for parts, times in moments]
    each.sort(key=lambda moment: -sum(moment[0].values()))
    others = tuple((sum(parts.values()), cost) for parts, cost in each[1:])
    return Footprint(each[0][0], text, tokens, each[0][1], kept + decoded, at_rest, others)


def _decoded(engine: Engine, latents: Tensor) -> Any:
    """Decode a few chunks in a row: the cache they leave, with the frames of the last."""
    state = engine.codec.start()
    for _ in range(PASSES):
        video, state = engine.codec.push(latents.to(engine.codec.dtype), state)
        pixels = to_uint8(video)
        del video
    return state, pixels
