"""Published checkpoints on the command line: a video from each, and `convert` into a folder that gives the same one."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slotmemory.engine import Engine
from tests import checkpoints_for_tests as tiny

pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")
pytest.importorskip("transformers", reason="the text encoder needs transformers: pip install 'slotmemory[wan]'")

STORY = """\
seed: 3
options: {width: 48, height: 32}
shots:
  - {prompt: a red cat walks in the meadow ., seconds: 0.75}
  - {prompt: a blue ghost jumps in the snow ., seconds: 0.75}
"""
SHORT = "--memory sink --steps 1000,500 --threads 1 --dtype fp32 --device cpu --scale 1".split()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A Wan release with its companions, and beside it a trainer's checkpoint and an adapter of the same weights."""
    folder = tmp_path_factory.mktemp("release")
    weights = tiny.transformer()
    tiny.write_wan_companions(tiny.write_wan(folder / "wan", weights))
    tiny.write_wan_companions(folder / "longlive")
    tiny.write_training(folder / "longlive" / "models" / "longlive_base.pt", weights)
    torch.save({"generator_lora": tiny.lora(weights)}, folder / "longlive" / "models" / "lora.pt")
    return folder


@pytest.fixture
def story(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOTMEMORY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "story.yaml").write_text(STORY)
    return tmp_path / "story.yaml"


def recipe(run):
    return yaml.safe_load((run / "recipe.yaml").read_text())


def test_a_release_makes_a_video_by_its_path(slotmemory, story, release, tmp_path):
    done = slotmemory("generate", "story.yaml", "--model", release / "wan", "--out", "run", *SHORT)
    assert done.status == 0, done.err
    assert "21 frames" in done.out and (tmp_path / "run" / "video.mp4").stat().st_size > 1000
    kept = recipe(tmp_path / "run")
    assert kept["model"] == str(release / "wan") and len(kept["weights"]) == 16
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 3  # both prompts and the negative one, encoded once


def test_a_converted_model_makes_the_very_same_video(slotmemory, story, release, tmp_path):
    done = slotmemory("convert", release / "longlive", "--out", "mine", "--dtype", "fp32")
    assert done.status == 0 and "generate story.yaml --model mine" in done.out, done.err
    files = {path.name for path in (tmp_path / "mine").iterdir()}
    assert files == {"model.json", "transformer.safetensors", "codec.safetensors", "text.safetensors", "tokenizer.json"}
    done = slotmemory("generate", "story.yaml", "--model", release / "longlive", "--out", "a", *SHORT)
    assert done.status == 0, done.err
    done = slotmemory("generate", "--like", "a", "--model", "mine", "--out", "b")
    assert done.status == 0 and "was made with other weights" in done.err, done.err
    assert (tmp_path / "a" / "video.mp4").read_bytes() == (tmp_path / "b" / "video.mp4").read_bytes()


def test_an_adapter_is_merged_or_kept_with_its_scale(slotmemory, release, tmp_path):
    lora = release / "longlive" / "models" / "lora.pt"
    base = load_file(release / "wan" / "diffusion_pytorch_model.safetensors")
    name = "blocks.0.ffn.0.weight"
    words = ["convert", release / "wan", "--lora", f"{lora}=0.5", "--dtype", "fp32"]
    assert slotmemory(*words, "--out", "merged.safetensors").status == 0
    pairs = tiny.lora(tiny.transformer())  # as `release` drew them
    up, down = (pairs[f"base_model.model.blocks.0.ffn.0.lora_{half}.weight"] for half in "BA")
    torch.testing.assert_close(load_file(tmp_path / "merged.safetensors")[name], base[name] + 0.5 * up @ down)
    assert slotmemory(*words, "--keep-lora", "--out", "kept").status == 0
    assert torch.equal(load_file(tmp_path / "kept" / "transformer.safetensors")[name], base[name])
    assert json.loads((tmp_path / "kept" / "model.json").read_text())["adapters"] == [
        {"file": "adapter-1.safetensors", "scale": 0.5}
    ]
    assert Engine.from_pretrained("kept", "none").adapters["lora1"].scale == 0.5


def test_a_converted_transformer_alone_is_a_checkpoint_again(slotmemory, release, tmp_path):
    base = load_file(release / "wan" / "diffusion_pytorch_model.safetensors")
    done = slotmemory("convert", release / "wan", "--out", "t.safetensors", "--dtype", "same")
    assert done.status == 0, done.err
    found = load_file(tmp_path / "t.safetensors")
    assert set(found) == set(base) and all(torch.equal(found[name], base[name]) for name in base)
    assert slotmemory("convert", release / "wan", "--out", "half.safetensors").status == 0
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.bfloat16}


def test_the_embedded_model_converts_too(slotmemory, tmp_path):
    assert slotmemory("convert", "tiny", "--out", "copy", "--dtype", "same").status == 0
    done = slotmemory("doctor", "--model", "copy")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "copy" / "model.json").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere", "--out", "mine"], "unknown model 'nowhere'"),
        (["tiny", "--out", "taken"], "taken exists; choose a folder that does not"),
        (["tiny", "--out", "mine", "--dtype", "bf61"], "unknown dtype 'bf61'; did you mean 'bf16'"),
        (["tiny", "--out", "mine", "--lora", "x.pt=much"], "--lora x.pt=much: the scale is no number"),
        (["tiny", "--out", "mine", "--lora", "./x.pt"], "adapter: no file ./x.pt"),
        (["tiny", "--out", "mine", "--part", "generator_ema"], "has no part 'generator_ema'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(slotmemory, tmp_path, words, expected):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    done = slotmemory("convert", *words)
    assert done.status == 2 and expected in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_an_adapter_that_stays_switchable_needs_a_folder(slotmemory, release, tmp_path):
    lora = release / "longlive" / "models" / "lora.pt"
    done = slotmemory("convert", release / "wan", "--lora", lora, "--keep-lora", "--out", "t.safetensors")
    assert done.status == 2 and "needs a folder" in done.err and not (tmp_path / "t.safetensors").exists()


def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(slotmemory, story, release, tmp_path):
    story.write_text(STORY.replace("width: 48", "width: 50"))
    done = slotmemory("generate", "story.yaml", "--model", release / "wan", "--out", "run", *SHORT)
    assert done.status == 2 and "width=50 is not a multiple of 16" in done.err and not (tmp_path / "run").exists()
