"""Tiny random checkpoints in every published layout, as their authors' programs would write them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.checkpoints import names

CONFIG = WanConfig(dim=128, ffn_dim=48, num_heads=1, num_layers=2, freq_dim=16, text_dim=24, text_len=512)
WORDS = ["a", "red", "blue", "cat", "ghost", "walks", "jumps", "in", "the", "meadow", "snow", "."]

# the inverse of what `names.transformer` does, written out as diffusers' own conversion script has it
TO_DIFFUSERS = [
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
]


def diffusers_name(name: str) -> str:
    for ours, theirs in TO_DIFFUSERS:
        name = name.replace(ours, theirs)
    return name


def transformer(config: WanConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict under Wan's names, every tensor random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalWan(config)
        torch.nn.init.normal_(model.head.head.weight, std=0.05)  # a fresh head predicts nothing at all
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def lora(weights: dict[str, torch.Tensor], rank: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """An adapter in peft's layout for every linear layer inside the blocks, as LongLive's lora.pt."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, weight in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{layer}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
            pairs[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
    return pairs


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def sharded(folder: Path, stem: str, weights: dict[str, torch.Tensor], parts: int = 2) -> Path:
    """Write safetensors shards with their index, as Wan 14B and diffusers do."""
    folder.mkdir(parents=True, exist_ok=True)
    table, listed = {}, list(weights)
    for part in range(parts):
        file = f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {name: weights[name] for name in listed[part::parts]}
        save_file(mine, folder / file)
        table |= dict.fromkeys(mine, file)
    index = folder / f"{stem}.safetensors.index.json"
    total = sum(t.nbytes for t in weights.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": table}))
    return index


def write_wan(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """The transformer of a Wan release: config.json and one file or shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v", "num_heads": 1, "text_len": 512}))
    if shards > 1:
        sharded(folder, "diffusion_pytorch_model", weights, shards)
    else:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_diffusers(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A diffusers pipeline's transformer folder, sharded."""
    sharded(folder / "transformer", "diffusion_pytorch_model", {diffusers_name(k): v for k, v in weights.items()})
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 1, "attention_head_dim": 128}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def write_training(path: Path, weights: dict[str, torch.Tensor], ema: dict[str, torch.Tensor] | None = None) -> Path:
    """What the trainers of Self-Forcing, LongLive and MemFlow save: generator, critic, averaged weights with FSDP's names."""
    tree = {"generator": prefixed(weights, "model."), "critic": prefixed({"head.head.bias": torch.ones(3)}, "model.")}
    if ema is not None:
        tree["generator_ema"] = prefixed(ema, "model._fsdp_wrapped_module.")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**tree, "step": 600}, path)
    return path


def write_vae(path: Path, seed: int = 2) -> Path:
    """A small Wan autoencoder in the original names."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKLWan(base_dim=4, num_res_blocks=1)
    renamed = names.autoencoder(original_autoencoder_names(1))
    weights = model.state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({ours: weights[theirs].clone() for ours, theirs in renamed.items()}, path)
    return path


def original_autoencoder_names(blocks: int) -> list[str]:
    """The names in Wan2.1_VAE.pth, for so many residual blocks per stage (2 in the release: 194 names)."""

    def residual(place: str, widens: bool) -> list[str]:
        parts = ["residual.0.gamma", "residual.3.gamma"]
        parts += [f"residual.{n}.{kind}" for n in (2, 6) for kind in ("weight", "bias")]
        return [f"{place}.{part}" for part in parts + ["shortcut.weight", "shortcut.bias"] * widens]

    def both(*places: str) -> list[str]:
        return [f"{place}.{kind}" for place in places for kind in ("weight", "bias")]

    found = both("conv1", "conv2", "encoder.conv1", "decoder.conv1", "encoder.head.2", "decoder.head.2")
    found += ["encoder.head.0.gamma", "decoder.head.0.gamma"]
    for part in ("encoder", "decoder"):
        found += residual(f"{part}.middle.0", False) + residual(f"{part}.middle.2", False)
        found += [f"{part}.middle.1.norm.gamma", *both(f"{part}.middle.1.to_qkv", f"{part}.middle.1.proj")]
    at = 0
    for stage in range(4):  # widths 1, 2, 4, 4: the second and third stage widen
        for block in range(blocks):
            found += residual(f"encoder.downsamples.{at}", block == 0 and stage in (1, 2))
            at += 1
        if stage < 3:
            found += both(f"encoder.downsamples.{at}.resample.1")
            found += both(f"encoder.downsamples.{at}.time_conv") if stage > 0 else []
            at += 1
    at = 0
    for stage in range(4):  # widths 4, 4, 2, 1, halved by each upsampling: the second stage widens back
        for block in range(blocks + 1):
            found += residual(f"decoder.upsamples.{at}", block == 0 and stage == 1)
            at += 1
        if stage < 3:
            found += both(f"decoder.upsamples.{at}.resample.1")
            found += both(f"decoder.upsamples.{at}.time_conv") if stage < 2 else []
            at += 1
    return found


def umt5_weights(
    width: int = CONFIG.text_dim, heads: int = 3, layers: int = 2, seed: int = 3
) -> dict[str, torch.Tensor]:
    """A small UMT5 encoder under Wan's names; inner width 30, so that width and heads are not confused."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    inner, hidden = heads * 10, 40
    weights = {"token_embedding.weight": draw(len(WORDS) + 3, width, scale=1.0), "norm.weight": 1 + draw(width)}
    for layer in range(layers):
        place = f"blocks.{layer}"
        weights |= {f"{place}.norm{n}.weight": 1 + draw(width) for n in (1, 2)}
        weights |= {f"{place}.attn.{n}.weight": draw(inner, width) for n in "qkv"}
        weights |= {
            f"{place}.attn.o.weight": draw(width, inner),
            f"{place}.ffn.gate.0.weight": draw(hidden, width),
            f"{place}.ffn.fc1.weight": draw(hidden, width),
            f"{place}.ffn.fc2.weight": draw(width, hidden),
            f"{place}.pos_embedding.embedding.weight": draw(32, heads, scale=1.0),
        }
    return weights


def write_tokenizer(path: Path) -> Path:
    """A tokenizer of a few words that ends every prompt with </s>, as UMT5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


COMPANIONS = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json")


def write_wan_companions(folder: Path) -> Path:
    """Codec, text encoder and tokenizer as a Wan release holds them."""
    write_vae(folder / "Wan2.1_VAE.pth")
    torch.save(umt5_weights(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl" / "tokenizer.json")
    return folder
