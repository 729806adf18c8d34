"""From a model's name to its files: presets, folders, files and addresses of the Hub, in any published layout.

It looks at names and places only, and fetches what is missing; `layouts.py` looks into the files. A model needs a
transformer, a codec and a text encoder; where a checkpoint brings the transformer alone, as most do, the other two are
those of the Wan2.1 release.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from slotmemory.checkpoints import folder, hub, presets
from slotmemory.checkpoints.files import INDEX, SUFFIXES, fingerprint, shards
from slotmemory.checkpoints.hub import Address
from slotmemory.checkpoints.presets import Preset
from slotmemory.codecs.base import opened
from slotmemory.errors import InputError, shorten, unknown

WEIGHTS = (INDEX, *SUFFIXES)
FOLDERS = ("", "models/", "checkpoints/", "transformer/")  # where releases keep a transformer
CODECS = (
    "Wan2.1_VAE.pth",
    "Wan2.1_VAE.safetensors",
    "wan_2.1_vae.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
TEXTS = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    f"text_encoder/model{INDEX}",
    "text_encoder/model.safetensors",
)
TOKENIZERS = ("google/umt5-xxl/tokenizer.json", "tokenizer/tokenizer.json", "tokenizer.json")
PLACES = ("models", "checkpoints", "transformer", "vae", "text_encoder", "tokenizer", "google/umt5-xxl")
OTHERS = re.compile(r"clip|vae|t5|taew|taehv|critic|optimizer", re.IGNORECASE)  # no transformer by its name
ADAPTER = re.compile(r"lora|adapter_model", re.IGNORECASE)
BASE = "wan2.1-1.3b"  # whose codec and text encoder complete a lone transformer: they are those of 14B too


@dataclass(frozen=True)
class Parts:
    """Names of a model's files within one folder or repository; None for what it lacks."""

    transformer: str | None = None
    loras: tuple[str, ...] = ()
    codec: str | None = None
    text: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on this machine."""

    path: Path
    scale: float = 1.0
    merge: bool = True


@dataclass(frozen=True)
class Sources:
    """The files that make a model, all on this machine, and the settings it was trained for."""

    name: str  # what finds the same model again, from any working directory
    transformer: Path
    codec: Path
    text: Path
    tokenizer: Path | None = None
    part: str | None = None
    loras: tuple[AdapterFile, ...] = ()
    size: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    memories: Mapping[str, Path] = field(default_factory=dict)  # trained weights of memories, by their names

    def files(self) -> list[Path]:
        """Every file of weights, shards included."""
        adapters = [adapter.path for adapter in self.loras]
        named = [self.transformer, self.codec, self.text, *adapters, *self.memories.values()]
        more = [path.parent / shard for path in named if path.name.endswith(INDEX) for shard in shards(path)]
        return [*named, *more, *([self.tokenizer] if self.tokenizer else [])]

    def text_bytes(self) -> int:
        """Bytes of the text encoder's weights."""
        return _bytes_of(self.text)

    def transformer_bytes(self) -> int:
        """Bytes of the file or shards that hold the transformer."""
        return _bytes_of(self.transformer)

    def fingerprint(self) -> str:
        """Name what decides the model's video: 16 digits for its weights and settings."""
        told = {"settings": self.settings, "part": self.part, "adapters": [[a.scale, a.merge] for a in self.loras]}
        return fingerprint(self.files(), json.dumps(told, sort_keys=True))


def _bytes_of(path: Path) -> int:
    parts = [path.parent / shard for shard in shards(path)] if path.name.endswith(INDEX) else [path]
    return sum(part.stat().st_size for part in parts)


def classify(files: Iterable[str], where: str) -> Parts:
    """Tell a model's files apart by their names (relative, with slashes).

    Raises InputError where several could be the transformer.
    """
    files = sorted(files)
    have = set(files)

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in have), None)

    found = Parts(codec=first(CODECS), text=first(TEXTS), tokenizer=first(TOKENIZERS))
    near = [
        name
        for name in files
        if name.endswith(WEIGHTS) and f"{PurePosixPath(name).parent}/".removeprefix("./") in FOLDERS
    ]
    loras = tuple(name for name in near if ADAPTER.search(PurePosixPath(name).name))
    rest = [name for name in near if name not in loras and not OTHERS.search(PurePosixPath(name).name)]
    indexed = [name.removesuffix(INDEX) for name in rest if name.endswith(INDEX)]
    rest = [name for name in rest if name.endswith(INDEX) or not any(_is_shard(name, stem) for stem in indexed)]
    if len(rest) > 1:
        raise InputError(f"{where} holds several transformers ({shorten(', '.join(rest), 200)}); give the path of one")
    return replace(found, transformer=rest[0] if rest else None, loras=loras)


def _is_shard(name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors", name) is not None


def resolve(name: str, others: Iterable[str] = ()) -> Sources:
    """Find a model and bring its files to this machine.

    name: a preset, a preset file (.yaml), a folder, a file of weights, or an address on the Hub (org/name,
    org/name/path/file.pt, each with @revision); others: names to suggest beside the presets'. Raises InputError for
    what cannot be found or is incomplete.
    """
    if name in presets.names():
        return _fetched(presets.find(name), name)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path.resolve()
        return _own(path) if (path / folder.SETTINGS).is_file() else _of_folder(path)
    if path.is_file():
        path = path.resolve()
        return _fetched(presets.read(path), str(path)) if path.suffix in (".yaml", ".yml") else _of_file(path)
    address = Address.parse(name)
    if address is None:
        known = unknown("model", name, [*others, *presets.names()])
        raise InputError(f"{known}; or give a folder, a file of weights or an address of the Hugging Face Hub")
    return _of_address(address, name)


def adapter(place: str, scale: float = 1.0, merge: bool = True) -> AdapterFile:
    """An adapter by its path or its address on the Hub; a folder in peft's layout is taken for the file in it."""
    folder_of_peft = Path(place).expanduser()
    if folder_of_peft.is_dir():
        place = str(folder_of_peft / "adapter_model.safetensors")
    return AdapterFile(_places([place], "adapter")[place], scale, merge)


def _own(place: Path) -> Sources:
    """A folder of ours."""
    settings = folder.settings_of(place)
    words, text = place / "words.safetensors", place / "text.safetensors"
    # a folder with neither is reported as lacking the first
    text, tokenizer = (text, place / "tokenizer.json") if text.is_file() and not words.is_file() else (words, None)
    try:
        loras = tuple(
            AdapterFile(place / a["file"], float(a["scale"]), merge=False) for a in settings.get("adapters", [])
        )
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{place / folder.SETTINGS}: 'adapters' is no list of files with scales ({error})") from None
    return Sources(
        str(place),
        transformer=place / "transformer.safetensors",
        codec=place / "codec.safetensors",
        text=text,
        tokenizer=tokenizer,
        loras=loras,
        settings=settings,
        memories={path.name.split(".")[1]: path for path in sorted(place.glob("memory.*.safetensors"))},
    )


def _listed(place: Path) -> list[str]:
    """Names of files where releases keep them, relative to their folder."""
    found = []
    for sub in ("", *PLACES):
        if (place / sub).is_dir():
            found += [path.relative_to(place).as_posix() for path in (place / sub).iterdir() if path.is_file()]
    return found


def _of_folder(place: Path) -> Sources:
    parts = classify(_listed(place), str(place))
    if parts.transformer is None:
        raise InputError(
            f"{place} holds no transformer: expected {folder.SETTINGS}, or the weights of a Wan2.1 release, a diffusers "
            "folder or a trainer's checkpoint (.safetensors, .pt)"
        )
    return _completed(parts, lambda file: str(place / file), str(place))


def _of_file(path: Path) -> Sources:
    """A transformer's file; codec and text encoder may lie beside it."""
    if not path.name.endswith(WEIGHTS):
        raise InputError(f"{path}: a model is a folder, a preset (.yaml) or a file of weights ({', '.join(SUFFIXES)})")
    if path.suffix == ".safetensors":
        with opened(path):  # before gigabytes are fetched to go with a damaged file
            pass
    beside = [name for name in _listed(path.parent) if name in (*CODECS, *TEXTS, *TOKENIZERS)]
    parts = replace(classify(beside, str(path.parent)), transformer=path.name)
    return _completed(parts, lambda file: str(path.parent / file), str(path))


def _of_address(address: Address, name: str) -> Sources:
    if address.file is not None:
        parts = Parts(transformer=address.file)
    else:
        parts = classify(hub.listing(address).files, str(address))
        if parts.transformer is None:
            raise InputError(
                f"{address} holds no transformer in a layout that is known here; give a file: org/name/file.pt"
            )
    return _completed(parts, lambda file: str(replace(address, file=file)), name)


def _completed(parts: Parts, place, name: str) -> Sources:
    """Add what a place does not hold, and the settings that fit what it holds."""
    like = presets.find(_settings_like(parts))
    told = {
        key: place(value) for key in ("transformer", "codec", "text", "tokenizer") if (value := getattr(parts, key))
    }
    loras = [presets.AdapterAt(file=place(file)) for file in parts.loras]
    if parts.text and not parts.tokenizer:
        raise InputError(f"{name} holds a text encoder and no tokenizer.json for it; expected {TOKENIZERS[0]}")
    return _fetched(like.model_copy(update={**told, "lora": loras, "part": None, "size": None}), name)


def _settings_like(parts: Parts) -> str:
    """Which preset's settings a checkpoint without any of its own was most likely trained for."""
    if parts.loras:
        return "longlive"
    file = PurePosixPath(parts.transformer)
    if file.suffix in (".pt", ".pth", ".ckpt"):  # what trainers of causal models write
        return "self-forcing"
    return BASE


def _fetched(preset: Preset, name: str) -> Sources:
    """Bring a preset's files here."""
    if preset.transformer is None:
        raise InputError(
            f"{name} names no transformer; add `transformer:` with a path or an address, or `like:` a preset"
        )
    base = presets.find(BASE)
    text, tokenizer = (preset.text, preset.tokenizer) if preset.text else (base.text, base.tokenizer)
    wanted = [
        preset.transformer,
        preset.codec or base.codec,
        text,
        tokenizer,
        *(adapter.file for adapter in preset.lora),
    ]
    here = _places([place for place in wanted if place], name)
    return Sources(
        name,
        transformer=here[preset.transformer],
        codec=here[preset.codec or base.codec],
        text=here[text],
        tokenizer=here[tokenizer] if tokenizer else None,
        part=preset.part,
        loras=tuple(AdapterFile(here[a.file], a.scale, a.merge) for a in preset.lora),
        size=preset.size,
        settings=preset.settings(),
    )


def absent(name: str) -> tuple[Preset | None, list[Address]]:
    """The preset behind a name, and which of its files would have to be fetched; (None, []) for what is no preset."""
    path = Path(name).expanduser()
    if name in presets.names():
        preset = presets.find(name)
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        preset = presets.read(path)
    else:
        return None, []
    addresses = [Address.parse(place) for place in _wanted(preset) if not Path(place).expanduser().is_file()]
    return preset, [address for address in addresses if address and address.file and not hub.cached(address)]


def _wanted(preset: Preset) -> list[str]:
    """Every file of a preset, as paths and addresses."""
    base = presets.find(BASE)
    text, tokenizer = (preset.text, preset.tokenizer) if preset.text else (base.text, base.tokenizer)
    wanted = [preset.transformer, preset.codec or base.codec, text, tokenizer, *(each.file for each in preset.lora)]
    return [place for place in wanted if place]


def _places(wanted: list[str], name: str) -> dict[str, Path]:
    """Paths and addresses -> where the files are, after fetching what the Hub has and this machine has not."""
    here, addresses = {}, {}
    for text in dict.fromkeys(wanted):
        path = Path(text).expanduser()
        address = Address.parse(text)
        if path.is_file():
            here[text] = path
        elif address is None or address.file is None:
            raise InputError(f"{shorten(name, 120)}: no file {shorten(text, 200)}")
        else:
            addresses[text] = address
    fetched = hub.fetch(addresses.values()) if addresses else {}
    return here | {text: fetched[address] for text, address in addresses.items()}
