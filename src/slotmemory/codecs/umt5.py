"""Wan's text encoder: UMT5-XXL through transformers, brought to the device for new prompts only.

A prompt is cleaned as Wan cleans it, cut to 512 tokens and encoded once: its rows are kept in memory and on disk, by a
hash of prompt and weights, and padded with zeros whenever they are asked for. Prompts announced by `check` are encoded
together; an accelerator is left afterwards, and the weights, mapped from their file, take no memory until there is a
new prompt. Needs the extra `wan`.
Sources: Wan2.1 `wan/modules/{t5,tokenizers}.py`; Chung et al., UniMax (UMT5).

Legend: B prompts, L tokens (512), C channels (4096), n tokens of one prompt, its end mark included.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slotmemory.checkpoints import names
from slotmemory.checkpoints.files import flat, read_config, read_tree
from slotmemory.checkpoints.layouts import kind_of
from slotmemory.codecs.base import check_tensors
from slotmemory.errors import InputError, need_extra, shorten
from slotmemory.tree import tree_from_file, tree_to_file

logger = logging.getLogger(__name__)

KIND = "umt5"  # in a weights file's metadata
LENGTH = 512
PUBLISHED_BYTES = 2 * 5_680_910_336  # of models_t5_umt5-xxl-enc-bf16.pth


def clean(prompt: str) -> str:
    """Repair and normalise a prompt as Wan does: broken encodings, HTML entities (twice), white space."""
    fixed = need_extra("ftfy", "wan", "cleaning prompts for Wan's text encoder").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()


class UMT5:
    """Encode prompts; `Engine.text` for Wan models."""

    def __init__(
        self,
        load: Callable[[], nn.Module],
        tokenizer: Path,
        *,
        identity: str,
        width: int,
        device: torch.device | str = "cpu",
        computes_on: torch.device | str | None = None,
        length: int = LENGTH,
        cache: Path | None = None,
    ) -> None:
        """load: makes the UMT5EncoderModel, called when a prompt is new; identity: names its weights, so that embeddings
        on disk are told apart; width: C; device: where embeddings are wanted; computes_on: another place to make them;
        cache: folder for embeddings on disk, None for none."""
        self.computes_on = torch.device(device if computes_on is None else computes_on)
        self.device, self.length, self.width, self.identity, self.cache = (
            torch.device(device),
            length,
            width,
            identity,
            cache,
        )
        self._load, self._model = load, None
        self._tokenizer = _read_tokenizer(tokenizer, length)
        self._known: dict[str, Tensor] = {}  # cleaned prompt -> [n, C] on the CPU
        self._announced: dict[str, None] = {}

    def check(self, prompt: str) -> None:
        """Announce a prompt that will be needed; a warning says where it is cut."""
        text = clean(prompt)
        count = len(self._tokenizer.encode(text).ids)
        if count == self.length and len(self._whole(text)) > self.length:
            logger.warning("the prompt '%s' is longer than %d tokens; the rest is not read", shorten(text, 60), count)
        if text not in self._known:
            self._announced[text] = None
            if not self._on_disk(text):
                self._ready()  # a file that is missing or damaged is found before a stream begins

    def knows(self, prompt: str) -> bool:
        """Whether a prompt can be given without the weights."""
        text = clean(prompt)
        return text in self._known or self._on_disk(text)

    def _whole(self, text: str) -> list[int]:
        self._tokenizer.no_truncation()
        try:
            return self._tokenizer.encode(text).ids
        finally:
            self._tokenizer.enable_truncation(self.length)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts -> embeddings [B, L, C] with zeros for padding, and each one's number of tokens [B]."""
        texts = [clean(prompt) for prompt in prompts]
        self._learn([text for text in dict.fromkeys([*self._announced, *texts]) if text not in self._known])
        self._announced.clear()
        rows = [self._known[text] for text in texts]
        padded = torch.stack([nn.functional.pad(row, (0, 0, 0, self.length - len(row))) for row in rows])
        return padded.to(self.device), torch.tensor([len(row) for row in rows], device=self.device)

    def _learn(self, texts: list[str]) -> None:
        """Bring prompts to mind: from disk, else by running the model, which leaves the device afterwards."""
        for text in texts:
            if (kept := self._from_disk(text)) is not None:
                self._known[text] = kept
        new = [text for text in texts if text not in self._known]
        if not new:
            return
        model = self._ready().to(self.computes_on)
        try:
            for text in new:
                self._known[text] = self._run(model, text)
                self._to_disk(text)
        finally:
            if self.device.type != "cpu":
                self._model = model = None
            if self.computes_on.type == "cuda":
                torch.cuda.empty_cache()  # 11 GB that the transformer may want

    def _ready(self) -> nn.Module:
        if self._model is None:
            self._model = self._load()
        return self._model

    @torch.no_grad()
    def _run(self, model: nn.Module, text: str) -> Tensor:
        """One prompt -> [n, C]; padding would change nothing, attention is masked to the prompt's own tokens."""
        ids = torch.tensor([self._tokenizer.encode(text).ids], device=self.computes_on)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].cpu()

    # on disk

    def _file(self, text: str) -> Path:
        told = json.dumps([self.identity, self.length, text])
        return self.cache / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"

    def _on_disk(self, text: str) -> bool:
        return self.cache is not None and self._file(text).is_file()

    def _from_disk(self, text: str) -> Tensor | None:
        if not self._on_disk(text):
            return None
        try:
            row = tree_from_file(self._file(text))["rows"]
        except (InputError, KeyError, TypeError) as error:
            logger.warning("%s; the prompt is encoded again", error)
            return None
        return row if row.ndim == 2 and row.shape[1] == self.width and len(row) <= self.length else None

    def _to_disk(self, text: str) -> None:
        if self.cache is None:
            return
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            tree_to_file({"prompt": text, "encoder": self.identity, "rows": self._known[text]}, self._file(text))
        except (InputError, OSError) as error:
            logger.warning("embeddings are not kept on disk: %s", error)
            self.cache = None


def _read_tokenizer(path: Path, length: int) -> Any:
    module = need_extra("tokenizers", "wan", "Wan's text encoder")
    try:
        tokenizer = module.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
        raise InputError(f"{path} is no tokenizer.json ({shorten(str(error), 100)})") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


# weights


def read_umt5(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an encoder's weights -> sizes for UMT5Config, tensors in transformers' names.

    Takes Wan's `models_t5_umt5-xxl-enc-bf16.pth` and transformers' folders. Sizes come from the tensors; only the
    reach of relative positions does not show in them (128 in every UMT5). Raises InputError for another model's file.
    """
    tensors = flat(read_tree(path), path)
    if not {"token_embedding.weight", "shared.weight", "encoder.embed_tokens.weight"} & set(tensors):
        raise InputError(f"{path} is {kind_of(tensors)}, expected Wan's text encoder UMT5")
    tensors = {names.text_encoder(name): tensor for name, tensor in tensors.items()}
    tensors.pop("spiece_model", None)  # ComfyUI's files carry the tokenizer as a tensor
    shared = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    tensors |= {"shared.weight": shared, "encoder.embed_tokens.weight": shared}
    told = read_config(path.parent / "config.json")
    return _sizes(tensors, path, told if told.get("model_type") == "umt5" else {}), tensors


def _sizes(tensors: Mapping[str, Tensor], path: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    first = "encoder.block.0.layer"
    needed = (
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    for name in needed:
        if name not in tensors:
            raise InputError(f"{path} lacks the tensor '{name}'; the file is incomplete or not UMT5's")
    buckets, heads = tensors[needed[0]].shape
    vocabulary, width = tensors["shared.weight"].shape
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": tensors[needed[1]].shape[0] // heads,
        "d_ff": tensors[needed[2]].shape[0],
        "num_heads": heads,
        "num_layers": 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block.")),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": told.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": told.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def build_umt5(path: Path, width: int) -> nn.Module:
    """Make the encoder of a file, on the CPU, in the numbers it is stored in (bf16 for fp16, which overflows in T5).

    width: C, as the transformer expects it."""
    transformers = need_extra("transformers", "wan", "Wan's text encoder")
    sizes, tensors = read_umt5(path)
    if sizes["d_model"] != width:
        raise InputError(f"{path} makes embeddings of {sizes['d_model']} numbers; the transformer takes {width}")
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    check_tensors(tensors, model.state_dict(), path)
    dtype = tensors["shared.weight"].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{path} holds {dtype} numbers; use the bf16, fp16 or fp32 file")
    dtype = torch.bfloat16 if dtype is torch.float16 else dtype
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
