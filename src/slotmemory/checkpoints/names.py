"""What the published files call their tensors, and what we call them. Pure text: no tensors, no files.

The transformer and its adapters are kept under the names of the original Wan2.1 release, the video autoencoder under
diffusers' names, the text encoder under transformers' names: each under those of the class that holds it here.
Sources: Wan2.1 `wan/modules/{model,vae,t5}.py`; diffusers `scripts/convert_wan_to_diffusers.py`; transformers UMT5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

WRAPPERS = (
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)  # left by FSDP, checkpointing, compile
PREFIXES = ("module.", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net.")

_TRANSFORMER = [  # diffusers -> Wan, in this order: the affine norm is the second in diffusers and the third in Wan
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.add_k_proj\.", ".k_img."),
    (r"\.add_v_proj\.", ".v_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
]

_AUTOENCODER = [  # Wan -> diffusers, without the stages of the decoder
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
]
_UPSAMPLE = re.compile(r"^decoder\.upsamples\.(\d+)\.")

_TEXT_ENCODER = [  # Wan -> transformers
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
]


def _apply(rules: list[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unwrapped(name: str) -> str:
    """Take out what wrappers left in a name, wherever it stands."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Names as stored -> names without wrappers and without a prefix that all of them share, such as `model.`."""
    plain = {name: unwrapped(name) for name in names}
    while plain:
        shared = next((p for p in PREFIXES if all(name.startswith(p) for name in plain.values())), None)
        if shared is None:
            break
        plain = {stored: name.removeprefix(shared) for stored, name in plain.items()}
    return plain


def transformer(name: str) -> str:
    """A transformer tensor's name as Wan has it; names that are Wan's already stay."""
    return _apply(_TRANSFORMER, name)


def autoencoder(names: Iterable[str]) -> dict[str, str]:
    """Names of the original autoencoder -> diffusers' names; its flat decoder becomes stages (4 of them)."""
    names = list(names)
    stages = [int(found[1]) for name in names if (found := _UPSAMPLE.match(name))]
    # 4 stages of blocks, and a resampling layer between one stage and the next
    blocks = max(1, (max(stages, default=0) + 1 - 3) // 4)

    def renamed(name: str) -> str:
        found = _UPSAMPLE.match(name)
        if found:
            stage, place = divmod(int(found[1]), blocks + 1)
            part = "upsamplers.0" if place == blocks else f"resnets.{place}"
            name = f"decoder.up_blocks.{stage}.{part}.{name[found.end() :]}"
        return _apply(_AUTOENCODER, name)

    return {name: renamed(name) for name in names}


def text_encoder(name: str) -> str:
    """A text encoder tensor's name as transformers has it; names that are transformers' already stay."""
    return name if name.startswith(("encoder.", "shared.")) else _apply(_TEXT_ENCODER, name)
