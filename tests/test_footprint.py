"""What a job will take is what it takes: forecasts from shapes against tensors counted in real streams."""

from dataclasses import replace

import pytest
import torch

from slotmemory import memory as memories
from slotmemory import models
from slotmemory.engine import Engine
from slotmemory.footprint import Footprint, Watch, predict
from tests.models_for_tests import write_model

CHUNKS = 8
SCRIPT = {0: "A red cat walks in the meadow.", 5: "A blue ghost jumps in the snow."}


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "micro"))


@pytest.fixture(scope="module")
def shapes(name):
    return models.load(name, torch.device("meta"), torch.float32)


def policy(engine, memory, budget=None, **options):
    return memories.build(memory, engine.layout, budget, **engine.defaults_for(memory, options))


def measured(engine, batch=1, chunks=CHUNKS):
    """The most bytes that tensors hold while a stream is made, its weights left out."""
    session = engine.session(SCRIPT, list(range(batch)))
    with torch.no_grad(), Watch() as watch:
        for _ in range(chunks):
            session.step()
    return watch.peak


@pytest.mark.parametrize("memory", ["none", "sink", "slots", "merged", "everything"])
def test_a_forecast_is_within_a_tenth_of_what_a_stream_takes(name, shapes, memory):
    engine = Engine.from_pretrained(name, memory, dtype=torch.float32)
    found = predict(shapes, policy(shapes, memory), CHUNKS)
    streaming = found.streaming - found.parts["weights"]
    assert streaming == pytest.approx(measured(engine), rel=0.1)
    assert found.parts["weights"] == sum(t.nbytes for m in engine.modules for t in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("memory", ["sink", "slots", "narrative", "rolling_sink"])
def test_a_budget_that_a_short_video_cannot_fill_is_not_counted_whole(name, shapes, memory):
    engine = Engine.from_pretrained(name, memory, budget=10_000, dtype=torch.float32)
    found = predict(shapes, policy(shapes, memory, 10_000), 3)
    assert found.tokens == 3 * engine.layout.tokens_per_chunk
    assert 1 <= (found.streaming - found.parts["weights"]) / measured(engine, chunks=3) < 1.15


@pytest.mark.parametrize("sizes, batch", [({"height": 64, "width": 96}, 1), ({"frames_per_chunk": 1}, 1), ({}, 3)])
def test_it_follows_resolution_chunk_length_and_batch(name, shapes, sizes, batch):
    engine = (
        Engine.from_pretrained(name, "none", dtype=torch.float32).with_layout(**sizes).with_memory("sink", window=6)
    )
    asked = shapes.with_layout(**sizes)
    found = predict(asked, policy(asked, "sink", window=6), CHUNKS, batch)
    assert found.streaming - found.parts["weights"] == pytest.approx(measured(engine, batch), rel=0.1)


def test_a_saved_state_takes_what_is_forecast(name, shapes, tmp_path):
    engine = Engine.from_pretrained(name, "everything", dtype=torch.float32)
    session = engine.session(SCRIPT, 0)
    for _ in range(CHUNKS):
        session.step()
    session.save(tmp_path / "state")
    found = predict(shapes, policy(shapes, "everything"), CHUNKS + 1)
    assert found.state == pytest.approx((tmp_path / "state").stat().st_size, rel=0.25)  # small tensors and their header


def test_shapes_hold_no_numbers_and_are_never_computed(shapes):
    assert {t.device.type for module in shapes.modules for t in module.parameters()} == {"meta"}


def test_counting_sees_new_tensors_and_leaves_out_views_and_what_was_there():
    old = torch.zeros(1000)
    with Watch() as watch:
        view = old[10:].view(-1)
        assert watch.now == 0
        a = view + 1
        b = a.reshape(10, 99).t()
        assert watch.now == 990 * 4
        del a
        assert watch.now == 990 * 4  # b still shares it
        del b
        assert watch.now == 0
        old + 1
    assert watch.peak == 1000 * 4


def test_the_largest_budget_that_fits_is_found(shapes):
    found = predict(shapes, policy(shapes, "sink", window=12), CHUNKS)
    for free in (found.streaming - 1, found.streaming - found.parts["memory"] // 2):
        tokens = found.tokens_within(free)
        fits = predict(shapes, replace_budget(policy(shapes, "sink", window=12), tokens), CHUNKS)
        more = predict(shapes, replace_budget(policy(shapes, "sink", window=12), tokens + 24), CHUNKS)
        assert fits.streaming <= free < more.streaming


def replace_budget(memory, tokens):
    memory.budget = tokens
    return memory


def test_the_text_encoder_counts_while_it_is_there():
    parts = {"weights": 100, "memory": 50}
    assert Footprint(parts, 0, 0, 1, 0).total == 150
    assert Footprint(parts, 30, 0, 1, 0).total == 150
    assert Footprint(parts, 400, 0, 1, 0).total == 500


def test_published_sizes_are_forecast_without_their_files():
    """LongLive as published, 1.3B in bf16 at 832x480: the weights, and the bytes of a latent frame that are known."""
    pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")
    from slotmemory.checkpoints import presets

    engine = models.published_shapes(presets.find("longlive"), torch.bfloat16)
    assert engine.layout.bytes_per_token(2) * engine.layout.tokens_per_frame == 287_539_200
    found = predict(engine, policy(engine, "sink"), 80)
    assert found.parts["weights"] == 2 * (1_418_996_800 + 126_892_531)
    assert found.tokens == 9 * engine.layout.tokens_per_frame
    assert found.parts["memory"] == 2 * 9 * 287_539_200
    assert replace(engine.layout, width=1280, height=720).tokens_per_frame == 3600
