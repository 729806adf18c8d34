"""Low-rank adapters (LoRA, arXiv 2106.09685): read in the layouts people publish, merged or switched on with a scale.

A layer W with an adapter computes W x + scale * alpha / rank * B A x. Adapters are matched to the transformer's linear
layers by name; LongLive's and MemFlow's `lora.pt` hold one for every linear layer inside the blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.checkpoints import names
from slotmemory.checkpoints.files import flat, read_config, read_tree
from slotmemory.checkpoints.layouts import kind_of, wan_names
from slotmemory.errors import InputError, shorten

ENDS = {  # how a tensor's name ends -> which half of the pair it is
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
PREFIXES = ("base_model.model.", *names.PREFIXES)
KOHYA = "lora_unet_"  # names in which every dot is an underscore


class Pair(NamedTuple):
    """One layer's adapter: down [rank, in], up [out, rank], strength = alpha / rank."""

    down: Tensor
    up: Tensor
    strength: float


@dataclass(frozen=True)
class Lora:
    """An adapter for a whole model: a pair per linear layer, by the layer's name in the Wan release."""

    pairs: dict[str, Pair]

    @property
    def rank(self) -> int:
        return max(pair.down.shape[0] for pair in self.pairs.values())

    def parameters(self) -> int:
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs.values())


def read_lora(path: Path) -> Lora:
    """Read an adapter: peft's layout (also inside {"generator_lora": ...}), ComfyUI's, diffusers' or kohya's names.

    alpha: from tensors named `.alpha`, else from the adapter_config.json beside the file, else equal to the rank.
    Raises InputError for a file that is no adapter or holds half a pair.
    """
    tensors = flat(read_tree(path), path)
    halves: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in tensors.items():
        end = next((end for end in ENDS if stored.endswith(end)), None)
        if end is None:
            if not any(".lora_" in name for name in tensors):
                raise InputError(f"{path} is {kind_of(wan_names(tensors))}, expected a LoRA adapter")
            raise InputError(
                f"{path}: '{shorten(stored, 120)}' of shape {tuple(tensor.shape)} is no part of a low-rank adapter; "
                "adapters that change whole tensors are not supported"
            )
        halves.setdefault(stored.removesuffix(end), {})[ENDS[end]] = tensor
    config = read_config(path.parent / "adapter_config.json")
    pairs = {}
    for layer, half in halves.items():
        for need in ("down", "up"):
            if need not in half:
                raise InputError(f"{path}: the adapter of '{layer}' lacks its '{need}' matrix")
        rank = half["down"].shape[0]
        if half["down"].ndim != 2 or half["up"].ndim != 2 or half["up"].shape[1] != rank:
            shapes = f"{tuple(half['down'].shape)} and {tuple(half['up'].shape)}"
            raise InputError(f"{path}: '{layer}' has matrices of {shapes}, expected [rank, in] and [out, rank]")
        alpha = float(half["alpha"]) if "alpha" in half else float(config.get("lora_alpha", rank))
        pairs[_layer(layer)] = Pair(half["down"], half["up"], alpha / rank)
    return Lora(pairs)


def _layer(name: str) -> str:
    name = names.unwrapped(name)
    if name.startswith(KOHYA):
        return name.removeprefix(KOHYA)  # told apart from its layer's name by `_match`
    while True:
        shared = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if shared is None:
            return names.transformer(name + ".")[:-1]  # rules expect what follows a layer's name
        name = name.removeprefix(shared)


def _match(lora: Lora, weights: Mapping[str, Tensor], where: str) -> dict[str, Pair]:
    """Find each pair's weight `<layer>.weight` and check the shapes."""
    flattened = {name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight") for name in weights}
    found = {}
    for layer, pair in lora.pairs.items():
        layer = layer if f"{layer}.weight" in weights else flattened.get(layer, layer)
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise InputError(f"{where}: the adapter changes '{layer}', which the transformer does not have")
        shape = (pair.up.shape[0], pair.down.shape[1])
        if tuple(weight.shape) != shape:
            raise InputError(
                f"{where}: the adapter of '{layer}' is for a weight of {shape}, the transformer's is "
                f"{tuple(weight.shape)}; it was made for another size of model"
            )
        found[layer] = pair
    return found


def merge(weights: Mapping[str, Tensor], lora: Lora, scale: float = 1.0, where: str = "LoRA") -> dict[str, Tensor]:
    """Add an adapter to the weights once and for all: W + scale * alpha / rank * B A, in fp32, kept in W's dtype."""
    merged = dict(weights)
    for layer, pair in _match(lora, weights, where).items():
        name = f"{layer}.weight"
        delta = pair.up.float() @ pair.down.float()
        merged[name] = (weights[name].float() + scale * pair.strength * delta).to(weights[name].dtype)
    return merged


class LowRank(nn.Module):
    """One layer's adapter, added to the layer's output."""

    def __init__(self, pair: Pair, like: Tensor):
        super().__init__()
        self.down = nn.Parameter(pair.down.to(like.device, like.dtype), requires_grad=False)
        self.up = nn.Parameter(pair.up.to(like.device, like.dtype), requires_grad=False)
        self.strength = pair.strength
        self.scale = 1.0

    def forward(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook of the layer."""
        if self.scale == 0:
            return output
        return output + F.linear(F.linear(inputs[0], self.down), self.up) * (self.scale * self.strength)


class Adapter:
    """A switchable adapter on a model: set `scale` at any time (0 switches it off), `remove` it for good.

    The pairs live inside the layers they change (`<layer>.<name>`), and move and save with them.
    """

    def __init__(self, model: nn.Module, lora: Lora, scale: float = 1.0, name: str = "lora"):
        self.name, self._scale = name, scale
        self._layers: list[tuple[nn.Module, torch.utils.hooks.RemovableHandle]] = []
        for layer, pair in _match(lora, dict(model.named_parameters()), f"adapter '{name}'").items():
            module = model.get_submodule(layer)
            if hasattr(module, name):
                raise InputError(f"the model has an adapter '{name}' already; give this one another name")
            part = LowRank(pair, module.weight)
            module.add_module(name, part)
            self._layers.append((module, module.register_forward_hook(part)))
        self.scale = scale

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = float(value)
        for module, _ in self._layers:
            getattr(module, self.name).scale = self._scale

    def remove(self) -> None:
        for module, hook in self._layers:
            hook.remove()
            delattr(module, self.name)
        self._layers = []


def to_tensors(lora: Lora) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter in peft's layout -> tensors, metadata, for a safetensors file."""
    tensors = {}
    for layer, pair in lora.pairs.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = pair.up.contiguous()
        if pair.strength != 1.0:
            tensors[f"base_model.model.{layer}.alpha"] = torch.tensor(pair.strength * pair.down.shape[0])
    return tensors, {"kind": "lora", "rank": json.dumps(lora.rank)}
