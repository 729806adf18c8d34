"""From names to files: what published folders hold, presets, a person's own preset files, lone files, the Hub."""

import json
from pathlib import Path

import pytest
import torch

from slotmemory.checkpoints import hub, presets
from slotmemory.checkpoints.hub import Address, Repository
from slotmemory.checkpoints.sources import Parts, classify, resolve
from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny

WAN = [
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "config.json",
    "LICENSE.txt",
    "google/umt5-xxl/tokenizer.json",
]
WAN += ["google/umt5-xxl/spiece.model", "assets/logo.png", "examples/i2v_input.JPG"]
COMPANIONS = dict(codec=WAN[0], text=WAN[1], tokenizer=WAN[4])
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
PUBLISHED = {
    "Wan2.1-T2V-1.3B": (
        [*WAN, "diffusion_pytorch_model.safetensors"],
        Parts("diffusion_pytorch_model.safetensors", **COMPANIONS),
    ),
    "Wan2.1-T2V-14B": (
        [*WAN, *SHARDS, "diffusion_pytorch_model.safetensors.index.json"],
        Parts("diffusion_pytorch_model.safetensors.index.json", **COMPANIONS),
    ),
    "Wan2.1-T2V-1.3B-Diffusers": (
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model-00001-of-00002.safetensors",
            "text_encoder/model-00002-of-00002.safetensors",
            "text_encoder/model.safetensors.index.json",
            "tokenizer/tokenizer.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ],
        Parts(
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            codec="vae/diffusion_pytorch_model.safetensors",
            text="text_encoder/model.safetensors.index.json",
            tokenizer="tokenizer/tokenizer.json",
        ),
    ),
    "LongLive-1.3B": (
        ["README.md", "models/longlive_base.pt", "models/lora.pt", "prompts/interactive_example.jsonl"],
        Parts("models/longlive_base.pt", loras=("models/lora.pt",)),
    ),
    "MemFlow": (["README.md", "base.pt", "lora.pt"], Parts("base.pt", loras=("lora.pt",))),
    "a training run": (["checkpoint_model_000600/model.pt", "model.pt"], Parts("model.pt")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parts_of_published_releases_are_told_apart(name):
    files, expected = PUBLISHED[name]
    assert classify(files, name) == expected


def test_several_transformers_are_not_guessed_between():
    files = ["checkpoints/self_forcing_dmd.pt", "checkpoints/ode_init.pt", "checkpoints/self_forcing_sid.pt"]
    with pytest.raises(InputError, match="Self-Forcing holds several transformers .*ode_init.pt.*give the path of one"):
        classify(files, "gdhe17/Self-Forcing")


def test_every_preset_is_complete_and_of_a_published_size():
    for name in presets.names():
        preset = presets.find(name)
        assert preset.about and preset.licence and preset.size in ("1.3B", "14B")
        assert (preset.width % 16, preset.height % 16) == (0, 0)
    assert {"wan2.1-1.3b", "self-forcing", "longlive", "memflow"} <= set(presets.names())


def kept_on_the_hub(monkeypatch, tmp_path):
    """A Hub whose files are all on this machine -> the addresses that were asked for."""
    asked = []

    def fetch(addresses):
        found = {}
        for address in addresses:
            asked.append(str(address))
            path = tmp_path / "hub" / address.repo / (address.revision or "main") / address.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            found[address] = path
        return found

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked


def test_a_preset_needs_exactly_its_files(monkeypatch, tmp_path):
    asked = kept_on_the_hub(monkeypatch, tmp_path)
    sources = resolve("longlive")
    assert sorted(asked) == [
        "Efficient-Large-Model/LongLive-1.3B/models/longlive_base.pt",
        "Efficient-Large-Model/LongLive-1.3B/models/lora.pt",
        "Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth",
        "Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json",
        "Wan-AI/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
    ]
    assert (sources.part, sources.size, sources.loras[0].merge) == ("generator", "1.3B", True)
    assert sources.settings["memory"] == {"window": 12, "sink": 3, "recache": True}
    assert sources.settings["steps"] == [1000, 750, 500, 250] and sources.settings["shift"] == 5


@pytest.mark.parametrize(
    "name, transformer",
    [
        ("org/name", "org/name/base.pt"),
        ("org/name@v2", "org/name/base.pt@v2"),
        ("org/name/weights/x.safetensors@v2", "org/name/weights/x.safetensors@v2"),
    ],
)
def test_an_address_of_the_hub_brings_its_own_files_and_wans_companions(monkeypatch, tmp_path, name, transformer):
    asked = kept_on_the_hub(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "listing", lambda address: Repository({"base.pt": 1, "README.md": 1}, "mit"))
    sources = resolve(name)
    assert sources.name == name and asked[0] == transformer and len(asked) == 4
    assert all(place.startswith("Wan-AI/Wan2.1-T2V-1.3B/") for place in asked[1:])


def test_a_repository_without_a_transformer_is_refused(monkeypatch):
    monkeypatch.setattr(hub, "listing", lambda address: Repository({"README.md": 1, "clip_vision.pt": 9}, "mit"))
    with pytest.raises(InputError, match="org/name holds no transformer in a layout that is known here"):
        resolve("org/name")


def test_a_folder_of_base_and_adapter_streams_as_longlive_does(monkeypatch, tmp_path):
    kept_on_the_hub(monkeypatch, tmp_path)
    for name in ("longlive_base.pt", "lora.pt"):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).write_text("")
    sources = resolve(str(tmp_path))
    assert sources.transformer == tmp_path / "models" / "longlive_base.pt"
    assert [adapter.path.name for adapter in sources.loras] == ["lora.pt"]
    assert sources.settings["memory"]["sink"] == 3 and sources.codec.name == "Wan2.1_VAE.pth"


@pytest.mark.parametrize("content", [b"", b"no header " * 20])
def test_a_damaged_lone_file_is_named_before_anything_is_fetched_for_it(no_hub, tmp_path, content):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"mine.safetensors is truncated or no safetensors file.*{len(content)} bytes"):
        resolve(str(file))


def test_a_lone_file_takes_what_lies_beside_it(no_hub, tmp_path):
    tiny.write_training(tmp_path / "self_forcing_dmd.pt", tiny.transformer())
    tiny.write_training(tmp_path / "other.pt", tiny.transformer())
    for name in (*COMPANIONS.values(),):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    sources = resolve(str(tmp_path / "self_forcing_dmd.pt"))
    assert {key: getattr(sources, key) for key in COMPANIONS} == {k: tmp_path / v for k, v in COMPANIONS.items()}
    assert sources.settings["steps"] == [1000, 750, 500, 250]  # a trainer's file is few-step; a Wan release is not
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(InputError, match="the Hub was asked for Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"):
        resolve(str(tmp_path / "self_forcing_dmd.pt"))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("longlve", "unknown model 'longlve'; did you mean 'longlive'"),
        ("./nowhere", "unknown model './nowhere'; known: tiny, .*longlive"),
        ("checkpoints/nowhere.pt", "unknown model"),
        ("empty", "empty holds no transformer: expected model.json"),
        ("notes.txt", "notes.txt: a model is a folder, a preset .* or a file of weights"),
        ("half", "half holds a text encoder and no tokenizer.json"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_would(no_hub, tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "half").mkdir()
    for file in ("diffusion_pytorch_model.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / "half" / file).write_text("")
    with pytest.raises(InputError, match=expected):
        resolve(name, ["tiny"])


# a person's own preset


def preset(folder, **values) -> Path:
    path = folder / "mine.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_a_preset_file_takes_over_what_it_does_not_say(monkeypatch, tmp_path):
    asked = kept_on_the_hub(monkeypatch, tmp_path)
    torch.save({}, tmp_path / "style.safetensors")
    path = preset(
        tmp_path,
        like="longlive",
        lora=[
            {"file": "Efficient-Large-Model/LongLive-1.3B/models/lora.pt"},
            {"file": "style.safetensors", "scale": 0.5, "merge": False},
        ],
        codec="madebyollin/taehv/taew2_1.pth",
        width=640,
    )
    sources = resolve(str(path))
    assert sources.name == str(path) and sources.part == "generator" and sources.settings["width"] == 640
    assert [(a.path.name, a.scale, a.merge) for a in sources.loras] == [
        ("lora.pt", 1.0, True),
        ("style.safetensors", 0.5, False),
    ]
    assert "madebyollin/taehv/taew2_1.pth" in asked and sources.loras[1].path == tmp_path / "style.safetensors"


def test_another_transformer_does_not_inherit_adapters_and_parts(monkeypatch, tmp_path):
    kept_on_the_hub(monkeypatch, tmp_path)
    torch.save({}, tmp_path / "tuned.pt")
    sources = resolve(str(preset(tmp_path, like="longlive", transformer="tuned.pt")))
    assert sources.transformer == tmp_path / "tuned.pt" and not sources.loras and sources.part is None
    assert sources.settings["memory"]["window"] == 12


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"like": "longlve"}, "like: unknown preset 'longlve'; did you mean 'longlive'"),
        ({"like": "longlive", "wdth": 3}, "unknown entry 'wdth'; did you mean 'width'"),
        ({"like": "longlive", "width": "wide"}, "width: .*got wide"),
        ({"like": "longlive", "size": "2B"}, "size: .*'1.3B' or '14B'.*got 2B"),
        ({"like": "longlive", "lora": [{"fil": "x"}]}, "lora.0.file: Field required"),
        ({"like": "mine.yaml"}, "like: mine.yaml leads back to itself"),
        ({"about": "nothing"}, "mine.yaml names no transformer; add `transformer:`"),
        ({"transformer": "./nowhere.pt"}, "no file .*/nowhere.pt"),
    ],
)
def test_a_mistake_in_a_preset_file_is_one_line(no_hub, tmp_path, values, expected):
    with pytest.raises(InputError, match=expected):
        resolve(str(preset(tmp_path, **values)))


@pytest.mark.parametrize("text, expected", [("[1]", "describes no model"), ("{", "is no YAML")])
def test_a_file_that_is_no_preset_is_refused(tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        resolve(str(tmp_path / "mine.yaml"))


def test_a_fingerprint_changes_with_weights_settings_and_strengths(monkeypatch, tmp_path):
    kept_on_the_hub(monkeypatch, tmp_path)
    torch.save({}, tmp_path / "a.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.pt")
    variants = [
        {"transformer": "a.pt"},
        {"transformer": "b.pt"},
        {"transformer": "a.pt", "shift": 8.0},
        {"transformer": "a.pt", "lora": [{"file": "b.pt"}]},
        {"transformer": "a.pt", "lora": [{"file": "b.pt", "scale": 0.5}]},
    ]
    prints = [resolve(str(preset(tmp_path, like="self-forcing", **values))).fingerprint() for values in variants]
    assert len(set(prints)) == len(variants)
    assert resolve(str(preset(tmp_path, like="self-forcing", **variants[0]))).fingerprint() == prints[0]


def test_an_address_names_one_file():
    assert Address.parse("org/name/a/b.pt") == Address("org/name", "a/b.pt")
