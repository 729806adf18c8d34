"""A memory may act inside attention: its pattern is asked by every layer in every pass, and comes back when it writes."""

import torch

from slotmemory.backbones.attention import Buffered, attend
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.contract import Trial, latents_of, toy
from slotmemory.memories.window import Window
from slotmemory.session import Session
from tests.memories.rollouts import LAYOUT as RECORDED
from tests.recorded import wan

LAYERS, PASSES = toy().layout.layers, len(toy().sampler.timesteps) + 1


class Listening(Buffered):
    def __init__(self, context):
        super().__init__(context)
        self.heard = []

    def __call__(self, layer, query, key, value, hidden):
        self.heard.append((layer, query, hidden))
        return super().__call__(layer, query, key, value)


class Listens(Window):
    """A window that remembers, outside of any state, what its patterns heard."""

    def attend(self, state, now, read, context):
        assert len(read) == len(context) == LAYERS
        assert all(keys.shape[1] == sum(bank.tokens for bank in banks) for banks, (keys, _) in zip(read, context))
        return Listening(context)

    def write(self, state, written):
        self.last = written
        return super().write(state, written)


def stream(policy) -> Session:
    return Trial(policy).session()


def test_every_layer_of_every_pass_asks_the_pattern_and_the_clean_pass_comes_last():
    session = stream(Listens)
    for _ in range(3):
        session.step()
        written = session.engine.memory.last
        assert [layer for layer, *_ in written.pattern.heard] == list(range(LAYERS)) * PASSES
        for seen, (_, query, hidden) in zip(written.layers, written.pattern.heard[-LAYERS:]):
            turn = rotation(written.positions, query.shape[-1])
            torch.testing.assert_close(rotate(seen.query, *turn), query)
            assert hidden is seen.hidden


def test_a_pattern_that_adds_nothing_changes_nothing():
    assert torch.equal(latents_of(stream(Listens)), latents_of(stream(Window)))


def test_a_memory_that_does_not_act_inside_attention_costs_one_buffer_per_layer_and_chunk():
    made = []

    class Watching(Window):
        def write(self, state, written):
            made.append(written.pattern)
            return super().write(state, written)

    session = stream(Watching)
    session.step(), session.step()
    assert all(type(pattern) is Buffered for pattern in made)
    buffers = [keys.data_ptr() for keys, _ in made[1].buffers]
    assert len(set(buffers)) == LAYERS


def test_all_passes_of_a_chunk_share_one_buffer_and_each_sees_its_own_tokens_in_it():
    generator = torch.Generator().manual_seed(0)
    past, *passes = (torch.randn(2, 2, 6, 2, 4, generator=generator) for _ in range(3))
    pattern, places = Buffered([tuple(past)]), set()
    for query in passes:
        key, value = query
        joined = pattern.joined(0, key, value)
        places.add(joined[0].data_ptr())
        torch.testing.assert_close(joined[0], torch.cat((past[0], key), 1))
        torch.testing.assert_close(
            pattern(0, key, key, value), attend(key, *(torch.cat(x, 1) for x in zip(past, query)))
        )
    assert len(places) == 1


def test_a_replayed_past_is_attended_to_by_the_pattern_of_its_own():
    moments = []

    class Replays(Listens):
        def attend(self, state, now, read, context):
            moments.append((now.frame, now.frames, now.replay))
            return super().attend(state, now, read, context)

    session = Trial(Replays, options=dict(recache=True)).session(prompts={0: "a red cat", 2: "a dog"})
    for _ in range(3):
        session.step()
    assert moments == [(0, 3, False), (3, 3, False), (0, 6, True), (6, 3, False)]


def test_queries_are_shown_un_rotated_so_that_time_can_be_chosen_later():
    model, frames = wan(), torch.arange(3)
    latents = torch.randn(1, 3, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    text = model.text_keys(torch.zeros(1, 16, 64))
    here, there = (model(latents, torch.zeros(1, 3), text, frames + shift)[1][0].query for shift in (0, 50))
    assert here.shape == (1, 36, RECORDED.heads, RECORDED.head_dim)
    assert torch.equal(here, there)
