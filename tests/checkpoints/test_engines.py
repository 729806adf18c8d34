"""A checkpoint of every layout, loaded by its path alone, streams the same video; other shapes and lengths do too."""

from dataclasses import replace

import pytest
import torch

from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.backbones.guided import Guided
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.checkpoints import presets
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.sampler import FewStep, FlowSchedule
from tests import checkpoints_for_tests as tiny

pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")
pytest.importorskip("transformers", reason="the text encoder needs transformers: pip install 'slotmemory[wan]'")

WEIGHTS = tiny.transformer()
PROMPT = "a red cat walks in the snow ."
SMALL = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One model in every layout: the path that is given to `--model`, by layout."""
    root = tmp_path_factory.mktemp("layouts")
    companions = tiny.write_wan_companions(root / "companions")

    def beside(folder):
        for file in companions.rglob("*"):
            if file.is_file():
                target = folder / file.relative_to(companions)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(file)
        return folder

    found = {
        "wan": beside(tiny.write_wan(root / "wan", WEIGHTS)),
        "wan sharded": beside(tiny.write_wan(root / "sharded", WEIGHTS, shards=3)),
        "diffusers": beside(tiny.write_diffusers(root / "diffusers", WEIGHTS)),
    }
    beside(root / "trainer")
    found["self-forcing"] = tiny.write_training(
        root / "trainer" / "self_forcing_dmd.pt", tiny.transformer(seed=5), WEIGHTS
    )
    ode = {"generator": tiny.prefixed(WEIGHTS, "model.")}
    torch.save(ode, root / "trainer" / "ode_init.pt")
    found["ode-init"] = root / "trainer" / "ode_init.pt"
    for name in ("longlive", "memflow"):
        folder = beside(root / name)
        models = folder / "models" if name == "longlive" else folder
        tiny.write_training(models / ("longlive_base.pt" if name == "longlive" else "base.pt"), WEIGHTS)
        torch.save({"generator_lora": tiny.lora(WEIGHTS), "step": 3000}, models / "lora.pt")
        found[name] = folder
    return found


def plain(engine):
    """The engine without what tells a release from a trainer's checkpoint: guidance and another schedule."""
    sampler = FewStep((1000, 500), FlowSchedule(5.0))
    return replace(engine, backbone=getattr(engine.backbone, "backbone", engine.backbone), sampler=sampler)


def first_latents(engine, memory="none", chunks=2, guided=False, **options):
    """Latents [B, chunks F, C, h, w] of the first chunks of a small, two-step stream."""
    engine = engine.with_steps([1000, 500]) if guided else plain(engine)
    engine = engine.with_layout(**SMALL).with_memory(memory, **options)
    session = engine.session({0: PROMPT}, 0)
    return torch.cat([session.step().latents for _ in range(chunks)], 1)


@pytest.fixture(scope="module")
def expected(places):
    return first_latents(Engine.from_pretrained(str(places["wan"]), "none", dtype=torch.float32))


@pytest.mark.parametrize("layout", ["wan sharded", "diffusers", "self-forcing", "ode-init"])
def test_every_layout_streams_the_same_latents(no_hub, places, expected, layout):
    engine = Engine.from_pretrained(str(places[layout]), "none", dtype=torch.float32)
    assert torch.equal(first_latents(engine), expected)


def test_a_base_with_its_adapter_streams_the_adapted_model(no_hub, places, expected):
    latents = {
        name: first_latents(Engine.from_pretrained(str(places[name]), "none", dtype=torch.float32))
        for name in ("longlive", "memflow")
    }
    assert torch.equal(latents["longlive"], latents["memflow"])
    assert not torch.allclose(latents["longlive"], expected, atol=1e-2)


def test_a_switchable_adapter_is_the_base_at_zero_and_the_merged_model_at_one(no_hub, places, expected, tmp_path):
    models = places["longlive"] / "models"
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"{{transformer: {models / 'longlive_base.pt'}, codec: {places['wan'] / 'Wan2.1_VAE.pth'}, "
        f"text: {places['wan'] / 'models_t5_umt5-xxl-enc-bf16.pth'}, "
        f"tokenizer: {places['wan'] / 'google/umt5-xxl/tokenizer.json'}, "
        f"lora: [{{file: {models / 'lora.pt'}, merge: false, scale: 0.0}}]}}"
    )
    engine = Engine.from_pretrained(str(path), "none", dtype=torch.float32)
    assert torch.equal(first_latents(engine), expected)
    engine.adapters["lora1"].scale = 1.0
    merged = first_latents(Engine.from_pretrained(str(places["longlive"]), "none", dtype=torch.float32))
    torch.testing.assert_close(first_latents(engine), merged, atol=1e-3, rtol=1e-3)


def test_settings_come_with_the_checkpoint(no_hub, places):
    engine = Engine.from_pretrained(str(places["longlive"]), "sink", dtype=torch.float32)
    assert (engine.layout.width, engine.layout.height, engine.layout.fps) == (832, 480, 16)
    assert (engine.memory.sink, engine.memory.window, engine.memory.recache) == (3, 12, True)
    assert engine.sampler.timesteps == pytest.approx([1000, 937.5, 833.3333, 625.0], rel=1e-5)
    assert engine.any_size and engine.text.width == tiny.CONFIG.text_dim


def test_a_release_is_guided_away_from_its_negative_prompt(no_hub, places, expected):
    engine = Engine.from_pretrained(str(places["wan"]), "none", dtype=torch.float32)
    assert isinstance(engine.backbone, Guided) and engine.backbone.scale == 5  # published as guidance 6
    assert engine.sampler.schedule.shift == 8 and engine.sampler.count == 50
    model, away = engine.backbone.backbone, engine.text.encode([presets.find("wan2.1-1.3b").negative])[0]
    guided = replace(engine, backbone=Guided(model, away, 5.0))
    found = first_latents(engine, guided=True)
    assert torch.equal(found, first_latents(guided, guided=True)) and not torch.allclose(found, expected, atol=1e-2)


def test_another_size_of_model_than_the_preset_says_is_recognised(no_hub, places, tmp_path):
    path = tmp_path / "mine.yaml"
    told = "\n".join(
        f"{key}: {places['wan'] / file}" for key, file in zip(("codec", "text", "tokenizer"), tiny.COMPANIONS)
    )
    path.write_text(f"like: longlive\ntransformer: {places['ode-init']}\n{told}\nsize: null\nframes_per_chunk: 1\n")
    assert Engine.from_pretrained(str(path), "none").layout.frames_per_chunk == 1
    path.write_text(f"like: longlive\ntransformer: {places['ode-init']}\n{told}\n")
    with pytest.raises(InputError, match="this is a Wan 128-wide, 2-layer transformer; the recipe says 1.3B"):
        Engine.from_pretrained(str(path))


# any shape


@pytest.mark.parametrize("sizes", [{"height": 16, "width": 80}, {"height": 64, "width": 32, "frames_per_chunk": 1}])
@pytest.mark.parametrize("memory", ["sink", "everything"])
def test_resolution_chunk_length_and_batch_are_configuration(no_hub, places, sizes, memory):
    engine = Engine.from_pretrained(str(places["wan"]), "none", dtype=torch.float32, steps=[1000, 500])
    engine = engine.with_layout(**sizes).with_memory(memory)
    both, alone = engine.session({0: PROMPT}, [3, 4]), engine.session({0: PROMPT}, [4])
    for _ in range(3):
        chunk, one = both.step(), alone.step()
    layout = engine.layout
    assert chunk.latents.shape == (2, layout.frames_per_chunk, 16, layout.latent_height, layout.latent_width)
    assert chunk.frames.shape == (2, 4 * layout.frames_per_chunk, 3, sizes["height"], sizes["width"])
    torch.testing.assert_close(chunk.latents[1:], one.latents, atol=1e-3, rtol=1e-3)


def test_a_size_that_does_not_divide_into_tokens_is_refused(no_hub, places):
    engine = Engine.from_pretrained(str(places["wan"]), "none", dtype=torch.float32)
    with pytest.raises(InputError, match="height=40 is not a multiple of 16"):
        engine.with_layout(height=40)


# any length


@torch.no_grad()
def test_positions_beyond_the_published_table_equal_shifted_ones():
    """The published rotary table has 1024 rows; only differences of positions matter, here as far as one likes."""
    model = CausalWan(tiny.CONFIG)
    model.load_state_dict(WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 16, 4, 4, generator=generator)
    text = model.text_keys(torch.randn(1, 7, tiny.CONFIG.text_dim, generator=generator))
    empty = torch.zeros(1, 0, 1, 128)

    def flows(start):
        past, now = torch.arange(start, start + 3), torch.arange(start + 3, start + 6)
        _, seen = model(x[:, :3], torch.zeros(1, 3), text, past, Buffered([(empty, empty)] * 2))
        turn = rotation(grid_positions(past[None], 2, 2), 128)
        context = [(rotate(s.keys, *turn), s.values) for s in seen]
        return model(x[:, 3:], torch.full((1, 3), 500.0), text, now, Buffered(context))[0]

    first = flows(0)
    for start in (1020, 1022, 50_000):
        torch.testing.assert_close(flows(start), first, atol=1e-4, rtol=1e-4)


def test_a_stream_goes_on_past_the_published_table_and_does_not_grow(no_hub, places):
    engine = Engine.from_pretrained(str(places["wan"]), "none", dtype=torch.float32, steps=[1000, 500])
    engine = engine.with_layout(height=16, width=16).with_memory("sink", window=9, sink=3)
    session = engine.session({0: PROMPT}, 0)
    session.prefill(torch.randn(1, 9, 16, 2, 2))
    held = [session.step().trace for _ in range(2)][-1]
    session.frame, session.index = 3000, 1000  # 240 s are 960 latent frames
    chunk = session.step()
    assert bool(torch.isfinite(chunk.latents).all()) and chunk.trace["chunk"] == 1000
    assert chunk.trace["bytes"] == held["bytes"]
