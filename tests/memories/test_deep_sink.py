"""The `deep_sink` memory repeats Deep Forcing's recorded rollouts and keeps the tokens that recent queries ask for."""

import pytest
import torch

from slotmemory import memory as memories
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.contract import Trial, latents_of
from slotmemory.errors import InputError
from slotmemory.memory import build
from tests.memories import rollouts
from tests.memories.rollouts import CLOSE, TWO, stepped
from tests.memories.seen import LAYOUT, now, stream
from tests.recorded import tensors

PER_FRAME = LAYOUT.tokens_per_frame
PUBLISHED = dict(compat="deepforcing", reuse=1)  # the recording lowered the limit from 7, so that it is met


def shown(policy, state, frame):
    """Per layer the rotated keys and the values that a chunk from `frame` on would read."""
    moment, found = now(frame // 3), []
    for layer in range(2):
        banks = policy.read(state, layer, moment)
        keys, values, places = (
            torch.cat([getattr(bank, part).flatten(1, 2) for bank in banks], 1)
            for part in ("keys", "values", "positions")
        )
        found.append((rotate(keys, *rotation(places, keys.shape[-1])), values))
    return found


def test_the_deep_sink_alone_equals_the_published_one():
    g, options = tensors("deepforcing_rollout"), dict(compat="deepforcing", compressed=0)
    latents, states, _ = stepped("deep_sink", TWO, 30, {0: "p0"}, **options)
    torch.testing.assert_close(latents, g["deep_sink.latents"], **CLOSE)
    sink = g["deep_sink.cache_k"]  # the last chunk's rotated sink
    for layer, (keys, _) in enumerate(shown(build("deep_sink", rollouts.LAYOUT, **options), states[-2], 27)):
        torch.testing.assert_close(keys[:, : sink.shape[2]], sink[layer], **CLOSE)


def test_participative_compression_keeps_the_published_tokens_where_the_program_places_them():
    g = tensors("deepforcing_rollout")
    latents, states, _ = stepped("deep_sink", TWO, 36, {0: "p1"}, **PUBLISHED)
    torch.testing.assert_close(latents, g["deep_sink_pc.latents"], **CLOSE)
    policy, last = build("deep_sink", rollouts.LAYOUT, **PUBLISHED), states[-1]
    for layer, found in enumerate(shown(policy, last, 36)):
        torch.testing.assert_close(found[0], g["deep_sink_pc.cache_k"][layer], **CLOSE)
        torch.testing.assert_close(found[1], g["deep_sink_pc.cache_v"][layer], **CLOSE)
        banks = policy.read(last, layer, now(12))
        frames = torch.cat([bank.positions[..., 0].flatten() for bank in banks])
        assert frames.tolist() == g["deep_sink_pc.abs_frame_idx"][layer, 0, : len(frames)].int().tolist()
        counts = g["deep_sink_pc.topc_select_counts"][layer, 0, 120:144].int()
        assert last["compressed"][layer].notes["reuse"].flatten().tolist() == counts.tolist()


# a small one on the toy: sink 2, compressed 1, recent 4 of a window of 9


def small(**options):
    return build("deep_sink", LAYOUT, window=9, sink=2, compressed=1, recent=4, **options)


def compression(memory, state, queries, chunk=3):
    """Show a full window the queries [B, N, H, D] of a chunk's first pass; the tokens each layer keeps."""
    moment = now(chunk)
    pattern = memory.attend(state, moment, [], shown(memory, state, moment.frame))
    for layer in range(LAYOUT.layers):
        pattern(layer, queries, queries, queries)
    return pattern


def full(memory, rows=(0, 1)):
    return list(stream(memory, 3, seeds=rows))[-1]


def some_queries(seed, rows=2):
    shape = (rows, LAYOUT.tokens_per_chunk, LAYOUT.heads, LAYOUT.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_leaves_before_the_window_is_full():
    memory = small()
    for chunk, state in enumerate(stream(memory, 2), 1):
        assert sum(bank.items for bank in memory.read(state, 0, now(chunk))) == 3 * chunk
        assert memory.attend(state, now(chunk), [], shown(memory, state, 3 * chunk)) is None


def test_each_row_keeps_the_tokens_with_the_largest_product_with_the_queries_of_the_recent_frames():
    memory = small()
    state, queries = full(memory), some_queries(3)
    pattern = compression(memory, state, queries)
    for layer in range(LAYOUT.layers):
        keys = shown(memory, state, 9)[layer][0]
        candidates = keys[:, 2 * PER_FRAME : 8 * PER_FRAME]  # frames 2 to 7; frame 8 and the chunk are the recent four
        for row in range(2):
            asked = queries[row].sum(0) + state["asked"][layer][row].sum(0)
            scores = [float((asked * key).sum()) for key in candidates[row]]
            best = sorted(sorted(range(len(scores)), key=scores.__getitem__)[-PER_FRAME:])
            kept = pattern.kept[layer]
            assert torch.equal(kept.values[row, 0], state["recent"][layer].values[row].flatten(0, 1)[best])
            assert torch.equal(kept.positions[row, 0, :, 0], 2 + torch.tensor(best) // PER_FRAME)


def test_the_queries_of_the_clean_frames_before_the_chunk_vote_too():
    memory = small()
    state, silent = full(memory), torch.zeros_like(some_queries(0))
    kept = compression(memory, state, silent).kept[0]
    deaf = {**state, "asked": [-x for x in state["asked"]]}
    assert not torch.equal(kept.positions, compression(memory, deaf, silent).kept[0].positions)


def test_after_a_compression_all_that_is_read_stands_before_the_chunk_without_gaps():
    memory = small()
    state = full(memory)
    pattern = compression(memory, state, some_queries(3))
    banks = [state["sink"][0], pattern.kept[0], state["recent"][0].last(1)]
    placed = memory.placed(banks, state, now(3))
    assert torch.cat([bank.positions[0, ..., 0].flatten() for bank in placed]).tolist() == sorted(
        [5, 6, 7, 8] * PER_FRAME
    )
    # the pattern's keys are rotated to exactly these places
    keys = torch.cat([bank.keys.flatten(1, 2) for bank in placed], 1)
    places = torch.cat([bank.positions.flatten(1, 2) for bank in placed], 1)
    torch.testing.assert_close(pattern.context[0][0], rotate(keys, *rotation(places, LAYOUT.head_dim)))


def test_a_token_that_was_kept_as_often_as_it_may_leaves_at_the_next_compression():
    tokens = {}
    for reuse in (1, 7):
        session = Trial(memories.find("deep_sink"), options=dict(sink=2, compressed=1, recent=4, reuse=reuse)).session()
        tokens[reuse] = []
        for _ in session:
            if session.state["compressed"]:
                kept = session.state["compressed"][0]
                assert int(kept.notes["reuse"].max()) <= reuse
                tokens[reuse].append({tuple(place) for place in kept.positions[0, 0].tolist()})
    once, often = ([a & b for a, b in zip(seen, seen[1:]) if a != b] for seen in (tokens[1], tokens[7]))
    assert once and not any(once) and any(often)


def test_a_deep_sink_alone_is_a_sink_with_relative_places():
    deep = Trial(memories.find("deep_sink"), options=dict(sink=4, compressed=0))
    plain = Trial(memories.find("sink"), options=dict(sink=4, placing="relative"))
    torch.testing.assert_close(latents_of(deep.session()), latents_of(plain.session()))


def test_the_window_is_shared_as_published_and_shrinks_with_the_budget():
    def shares(*given, **options):
        memory = build("deep_sink", LAYOUT, *given, **options)
        return memory.window, memory.sink, memory.compressed, memory.recent

    assert shares() == (21, 10, 2, 4)
    assert shares(12 * PER_FRAME) == (12, 4, 1, 4)
    # too small for a compression to have anything to choose from: the chunk comes on top of what is held
    assert shares(5 * PER_FRAME) == (8, 3, 0, 5)
    assert shares(0) == (3, 0, 0, 3)
    assert shares(compressed=0) == (21, 10, 0, 11)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recent=2), "recent=2 is too small; use 3 or more"),
        (dict(reuse=0), "reuse=0 is too small; use 1 or more"),
        (dict(sink=18), "window=21 cannot hold sink=18, compressed=2 and recent=4 latent frames; use window >= 24"),
        (dict(compat="deepforcin"), "unknown compat 'deepforcin'; did you mean 'deepforcing'?"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("deep_sink", LAYOUT, **options)
    assert message in str(refusal.value)
