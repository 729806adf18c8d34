"""A codec that rests on the processor: its weights and a stream's cache visit the device for each decode.

What the weights and the cache of a full-size autoencoder take is then free for the transformer and the memory; each chunk
pays for the way there and back. It knows no codec, only the verbs of `codecs/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slotmemory.codecs.base import State


class Offloaded(nn.Module):
    """A codec whose weights rest where they are, and visit `device` while it computes; the numbers are the codec's."""

    def __init__(self, codec: nn.Module, device: torch.device | str):
        """codec: on the processor, in the dtype it is to compute in."""
        super().__init__()
        self.codec, self.visits = codec, torch.device(device)
        self.space_stride, self.time_stride = codec.space_stride, codec.time_stride
        self.latent_channels = codec.latent_channels
        # where every weight stands in its module, and the tensor that rests
        self._resting = [
            (store, name, self._at_rest(tensor))
            for module in codec.modules()
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self._come_home()

    def _at_rest(self, tensor: Tensor) -> Tensor:
        if self.visits.type != "cuda":
            return tensor
        pinned = tensor.data.pin_memory()  # page-locked memory crosses at full speed
        return nn.Parameter(pinned, requires_grad=False) if isinstance(tensor, nn.Parameter) else pinned

    def _come_home(self) -> None:
        for store, name, tensor in self._resting:
            store[name] = tensor

    def tensors(self) -> Iterator[Tensor]:
        """What rests."""
        return (tensor for _, _, tensor in self._resting)

    @property
    def dtype(self) -> torch.dtype:
        return self.codec.dtype

    def start(self) -> State:
        return self.codec.start()

    def encode(self, video: Tensor) -> Tensor:
        return self._visiting(self.codec.encode, video)

    def decode(self, latents: Tensor) -> Tensor:
        return self._visiting(self.codec.decode, latents)

    def push(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        return self._streamed(self.codec.push, latents, state)

    def feed(self, video: Tensor, state: State) -> tuple[Tensor, State]:
        return self._streamed(self.codec.feed, video, state)

    def _streamed(self, verb: Callable, given: Tensor, state: State) -> tuple[Tensor, State]:
        home = next(self.tensors()).device
        made, state = self._visiting(verb, given, _placed(state, self.visits))
        return made, _placed(state, home)

    def _visiting(self, verb: Callable, given: Tensor, *rest: Any) -> Any:
        """Call a verb with the weights on the device; what rests is never written to, so nothing has to come back."""
        try:
            for store, name, tensor in self._resting:
                store[name] = tensor.to(self.visits, non_blocking=True)
            return verb(given.to(self.visits), *rest)
        finally:
            self._come_home()


def _placed(state: State, device: torch.device) -> State:
    return {name: [tensor.to(device) for tensor in tensors] for name, tensors in state.items()}
