"""Recognising a transformer's weights: whose layout, which sizes, complete or not, and what else a file may be.

Every published layout of the family ends up under the names of the original Wan2.1 release. Sizes come from the
tensors; only the number of heads does not show in them (128 channels each in every published model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.checkpoints import names
from slotmemory.checkpoints.files import flat, read_tree
from slotmemory.codecs.base import check_tensors
from slotmemory.errors import InputError, shorten

HEAD_DIM = 128  # of every published Wan model
PUBLISHED = {"1.3B": WanConfig(), "14B": WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)}
# (width, layers) -> name; Wan 2.2's 5B is told apart, not run
SIZES = {(c.dim, c.num_layers): name for name, c in PUBLISHED.items()} | {(3072, 30): "5B"}

# what a file is if it has a tensor of this name (as a part of one), for telling people what they gave
KINDS = {
    "lora_A.": "a LoRA adapter",
    "lora_down.": "a LoRA adapter",
    "decoder.upsamples.": "the Wan video autoencoder",
    "post_quant_conv.": "a video autoencoder",
    "decoder.3.conv.": "a TAEHV preview decoder",
    "pos_embedding.embedding.": "the UMT5 text encoder",
    "SelfAttention.": "a T5 text encoder",
    "visual.transformer.": "a CLIP image encoder",
    "double_blocks.": "a Hunyuan or Flux transformer",
    "single_transformer_blocks.": "a Flux transformer",
    "transformer_blocks.": "a transformer of another family (CogVideoX, LTX or Mochi)",
    "input_blocks.": "a Stable Diffusion network",
    "down_blocks.": "a Stable Diffusion network",
}
# tensors of Wan transformers that condition on more than text, and how such a model is called
EXTRAS = {
    "vace_": "a Wan VACE transformer (video editing)",
    "img_emb.": "a Wan image-to-video transformer",
    ".k_img.": "a Wan image-to-video transformer",
    "control_adapter.": "a Wan Fun-Control transformer",
    "ref_conv.": "a Wan Fun-Control transformer",
    "audio": "a Wan transformer driven by sound",
    "motion_encoder.": "a Wan Animate transformer",
}


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """Say in a few words what a file of tensors is."""
    if "patch_embedding.weight" in tensors and any(".self_attn.q." in name for name in tensors):
        return f"a Wan {size_name(tensors)} transformer"
    for part, kind in KINDS.items():
        if any(part in name for name in tensors):
            return kind
    some = ", ".join(list(tensors)[:3]) or "no tensors"
    return f"another model ({shorten(some, 120)})"


def size_name(tensors: Mapping[str, Tensor]) -> str:
    """1.3B, 14B, or width and layers of a size that was not published."""
    dim, layers = tensors["patch_embedding.weight"].shape[0], count_layers(tensors)
    return SIZES.get((dim, layers), f"{dim}-wide, {layers}-layer")


def count_layers(tensors: Mapping[str, Any]) -> int:
    numbers = [
        int(name.split(".")[1]) for name in tensors if name.startswith("blocks.") and name.split(".")[1].isdigit()
    ]
    return max(numbers, default=-1) + 1


def read_transformer(
    path: Path, part: str | None = None, hints: Mapping[str, Any] | None = None, size: str | None = None
) -> tuple[WanConfig, dict[str, Tensor]]:
    """Read a causal Wan transformer from a file in any published layout -> sizes, tensors under Wan's names.

    part: which network of a training checkpoint (`generator`, `generator_ema`); hints: a config.json that came with it;
    size: "1.3B" or "14B" where the recipe says so. Raises InputError for what is another model, incomplete or damaged.
    """
    return check_transformer(wan_names(flat(read_tree(path), path, part)), path, hints or {}, size)


def wan_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a transformer's tensors, of whichever layout, to those of the Wan release."""
    return {names.transformer(plain): tensors[stored] for stored, plain in names.without_prefix(tensors).items()}


def check_transformer(
    tensors: Mapping[str, Tensor], path: Path, hints: Mapping[str, Any], size: str | None = None
) -> tuple[WanConfig, dict[str, Tensor]]:
    """Check tensors under Wan's names against the sizes they imply -> sizes, tensors."""
    for need in ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.head.weight"):
        if need not in tensors:
            kind = kind_of(tensors)
            if kind.startswith("a Wan "):
                raise InputError(f"{path} lacks the tensor '{need}'; the file is incomplete")
            raise InputError(f"{path} is {kind}, expected a Wan transformer")
    config = sizes_of(tensors, path, hints)
    _refuse_other_conditions(tensors, config, path)
    found = size_name(tensors)
    if size is not None and found != size:
        raise InputError(f"{path}: this is a Wan {found} transformer; the recipe says {size}")
    _refuse_quantised(tensors, path)
    with torch.device("meta"):
        expected = CausalWan(config).state_dict()
    check_tensors(tensors, expected, path)
    return config, dict(tensors)


def sizes_of(tensors: Mapping[str, Tensor], path: Path, hints: Mapping[str, Any]) -> WanConfig:
    """Read sizes off the tensors; hints (config.json of Wan or diffusers) give heads, text length and eps."""
    patch = tensors["patch_embedding.weight"]
    if patch.ndim != 5:
        raise InputError(
            f"{path}: 'patch_embedding.weight' has shape {tuple(patch.shape)}, expected [width, channels, 1, 2, 2]"
        )
    dim, in_dim, *cell = patch.shape

    def shape(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].ndim <= axis:
            found = tuple(tensors[name].shape) if name in tensors else "none"
            raise InputError(f"{path} lacks the tensor '{name}' or it is misshapen: found {found}")
        return tensors[name].shape[axis]

    heads = hints.get("num_heads", hints.get("num_attention_heads"))
    if heads is None:
        if dim % HEAD_DIM:
            raise InputError(
                f"{path}: a width of {dim} does not tell the number of heads (published models have {HEAD_DIM} channels "
                "per head); put a config.json with 'num_heads' beside it"
            )
        heads = dim // HEAD_DIM
    try:
        config = WanConfig(
            dim=dim,
            ffn_dim=shape("blocks.0.ffn.0.weight", 0),
            num_heads=int(heads),
            num_layers=count_layers(tensors),
            freq_dim=shape("time_embedding.0.weight", 1),
            text_dim=shape("text_embedding.0.weight", 1),
            text_len=int(hints.get("text_len", WanConfig.text_len)),
            in_dim=in_dim,
            out_dim=shape("head.head.weight", 0) // math.prod(cell),
            patch=tuple(cell),
            eps=float(hints.get("eps", WanConfig.eps)),
        )
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from None
    for name, value in asdict(config).items():
        told = hints.get(name)
        if told is not None and name != "patch" and told != value and not isinstance(told, str):
            raise InputError(f"{path}: the tensors say {name}={value}, the config.json that came with them says {told}")
    return config


def _refuse_other_conditions(tensors: Mapping[str, Tensor], config: WanConfig, path: Path) -> None:
    """This backbone takes text alone; say which tensors of a model that takes more would have no use."""
    for part, kind in EXTRAS.items():
        found = [name for name in tensors if part in name]
        if found:
            raise InputError(
                f"{path}: this is {kind} (in_dim {config.in_dim}, {len(found)} tensors such as '{found[0]}'), whose "
                "condition cannot be given here; what is missing is an image or control input: use a text-to-video model"
            )
    if config.in_dim != config.out_dim:
        raise InputError(
            f"{path}: this is a Wan transformer of {config.in_dim} input channels, {config.out_dim} of them latents "
            f"(image-to-video has 36 of 16); the other {config.in_dim - config.out_dim} cannot be given here: use a "
            "text-to-video model"
        )


def _refuse_quantised(tensors: Mapping[str, Tensor], path: Path) -> None:
    scales = [name for name in tensors if name.endswith((".scale_weight", ".weight_scale", "scaled_fp8"))]
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point() or tensor.itemsize < 2]
    if scales or odd:
        raise InputError(
            f"{path}: '{(scales or odd)[0]}' shows that the weights are quantised; use the bf16, fp16 or fp32 file"
        )


def build(config: WanConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> CausalWan:
    """Make the transformer of its tensors, moved and rounded one by one so that no second copy is held."""
    with torch.device("meta"):
        model = CausalWan(config)
    moved = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(moved, assign=True)
    return model.eval().requires_grad_(False)
