"""A model small enough to be made and run in milliseconds: the layout of `models.py`, weights drawn from a seed."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.codecs.preview import PreviewCodec, PreviewConfig
from slotmemory.codecs.words import WordEncoder

SETTINGS = {
    "height": 32,
    "width": 48,
    "fps": 16,
    "shift": 5.0,
    "steps": [1000, 500],
    "context_noise": 0.1,
    # 24 tokens per latent frame are too few for the published slots
    "memory": {"slots": 2, "tokens_per_slot": 6, "slot_dim": 8, "record_every": 1, "bank": 2, "window": 9},
}
WORDS = {"dim": 8, "length": 12, "heads": 2}


def write_model(folder: Path, seed: int = 0, **settings) -> Path:
    """Write a random model: model.json and transformer, words and codec with their sizes; settings change model.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(SETTINGS | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = WanConfig(
            dim=16, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=12, patch=(1, 1, 1)
        )
        transformer = CausalWan(config)
        torch.nn.init.normal_(transformer.head.head.weight, std=0.3)  # a fresh head predicts nothing at all
        _write(transformer, folder / "transformer.safetensors", config.to_json())
        _write(WordEncoder(**WORDS), folder / "words.safetensors", json.dumps(WORDS))
        codec = PreviewCodec(
            PreviewConfig(
                patch=8,
                encoder_channels=(8, 8, 8),
                decoder_channels=(8, 8, 8, 8),
                blocks=(1, 1, 1),
                space=(False, False, False),
            )
        )
        torch.nn.init.normal_(codec.decoder[-1].weight, std=0.1)
        codec.save(folder / "codec.safetensors")
    return folder


def _write(module: torch.nn.Module, path: Path, config: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={"config": config})
