"""Each score is its formula, the best tiles of everything older stay, and budgets buy whole frames first."""

import math

import pytest
import torch
import torch.nn.functional as F

from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.errors import InputError
from slotmemory.memories import evicted
from slotmemory.memory import Bank, build
from tests.memories.seen import LAYOUT, now, stream, tell, written

PER_FRAME = LAYOUT.tokens_per_frame
HEADS, WIDTH = LAYOUT.heads, LAYOUT.head_dim


def last(states):
    return list(states)[-1]


def stored(*keys):
    """A bank of one-token items on one head, standing at (0, 0, 0): keys as lists of numbers."""
    x = torch.tensor(keys, dtype=torch.float32)[None, :, None, None]
    shape = x.shape[:2]
    none = torch.zeros(shape, dtype=torch.long)
    return Bank(x, x, torch.zeros(*shape, 1, 3), none, none, torch.zeros(shape))


def test_short_keys_score_above_long_ones():
    assert evicted.key_norm(stored([3, 4], [0, 1]), None, 0).flatten().tolist() == [-5, -1]


def test_keys_unlike_the_mean_direction_score_highest():
    # directions (1, 0) twice and (0, 1): the mean is (2, 1) / 3
    found = evicted.key_diff(stored([1, 0], [9, 0], [0, 2]), None, 0).flatten()
    torch.testing.assert_close(found, -torch.tensor([2, 2, 1]) / math.sqrt(5))


def seen_stream(chunks=2):
    """The chunk last written, and an older chunk's frames as a bank: with batch, heads and tokens of the toy layout."""
    chunk = written(now(chunks), seeds=(1, 2))
    return chunk, written(now(0), seeds=(1, 2)).bank(0)


def test_observed_is_the_attention_that_the_chunks_queries_pay():
    chunk, bank = seen_stream()
    found = evicted.observed(bank, chunk, 0, count=1000)  # more than there are: all of them
    seen = chunk.layers[0]

    def turn(x, positions):
        return rotate(x, *rotation(positions, WIDTH))

    old = turn(bank.keys.flatten(1, 2), bank.positions.flatten(1, 2))
    keys = torch.cat((old, turn(seen.keys, chunk.positions)), 1)
    share = torch.zeros(2, HEADS, old.shape[1])
    for row in range(2):
        for head in range(HEADS):
            logits = turn(seen.query, chunk.positions)[row, :, head] @ keys[row, :, head].T / math.sqrt(WIDTH)
            share[row, head] = logits.softmax(-1).mean(0)[: old.shape[1]]
    torch.testing.assert_close(found, share.transpose(1, 2).unflatten(1, bank.keys.shape[1:3]))


def test_expected_is_the_mean_attention_of_gaussian_queries_to_come():
    chunk, bank = seen_stream()
    found = evicted.expected(bank, chunk, 0, grid=LAYOUT.grid, future=4)
    places = grid_positions(torch.arange(9, 13), *LAYOUT.grid)
    keys = rotate(bank.keys.flatten(1, 2), *rotation(bank.positions.flatten(1, 2), WIDTH))
    identity = torch.eye(WIDTH)[None, :, None].expand(1, WIDTH, len(places), WIDTH)  # a batch of axes, a head per place
    turns = torch.stack(
        [rotate(identity[:, :, i, None], *rotation(places[i, None], WIDTH))[0, :, 0].T for i in range(len(places))]
    )
    turn = turns.mean(0)  # [D, D], acts on column vectors
    for row in range(2):
        for head in range(HEADS):
            q = chunk.layers[0].query[row, :, head]
            mean, covariance = turn @ q.mean(0), turn @ torch.cov(q.T, correction=0) @ turn.T
            k, v = keys[row, :, head], bank.values[row].flatten(0, 1)[:, head]
            logits = k @ mean / math.sqrt(WIDTH) + ((k @ covariance) * k).sum(-1) / (2 * WIDTH)
            expected = logits.softmax(0) * v.norm(dim=-1)
            torch.testing.assert_close(found[row, ..., head].flatten(), expected, atol=1e-5, rtol=1e-4)


def test_a_frame_is_cut_into_tiles_of_neighbours():
    chunk = written(now(0))
    bank = evicted.tiles(chunk.bank(0), LAYOUT.grid, 2)
    rows, columns = LAYOUT.grid
    assert bank.items == 3 * rows * columns // 4 and bank.keys.shape[2] == 4
    assert bank.born[0].tolist() == [frame for frame in range(3) for _ in range(rows * columns // 4)]
    assert bank.owner[0].tolist() == list(range(rows * columns // 4)) * 3
    number = columns // 2 + 1  # the second tile of the second row of tiles, in the first frame
    assert bank.positions[0, number].tolist() == [[0, 2, 2], [0, 2, 3], [0, 3, 2], [0, 3, 3]]
    whole = chunk.bank(0).keys[0, 0].unflatten(0, LAYOUT.grid)
    assert torch.equal(bank.keys[0, number], whole[2:4, 2:4].flatten(0, 1))


def marked(frames):
    """A change of `written` that makes the keys of some latent frames shorter, which key_norm keeps."""

    def change(chunk):
        def edit(seen, layer):
            keys = F.normalize(seen.keys, dim=-1).unflatten(1, (3, -1))
            scale = torch.tensor([0.5 if 3 * chunk + i in frames else 1.0 for i in range(3)])
            return seen._replace(keys=(keys * scale[None, :, None, None, None]).flatten(1, 2))

        return edit

    return change


def test_the_best_of_everything_older_than_the_last_frames_stay_however_old():
    memory = build("evicted", LAYOUT, score="key_norm", window=8, recent=3)  # 2 frames' worth of tiles
    state, change = memory.start(1), marked({1, 7})
    for chunk in range(6):
        state = tell(memory, state, written(now(chunk), change=change(chunk)))
    assert set(state["kept"][0].born[0].tolist()) == {1, 7}
    assert state["kept"][0].tokens == 2 * PER_FRAME
    torch.testing.assert_close(state["kept"][0].score, torch.full_like(state["kept"][0].score, -0.5))


def test_tiles_of_one_frame_compete_one_by_one():
    memory = build("evicted", LAYOUT, window=8, recent=3)
    tiles = last(stream(memory, 6))["kept"][0]
    assert len(set(tiles.born[0].tolist())) > 2 and tiles.tokens == 2 * PER_FRAME


@pytest.mark.parametrize("score", evicted.SCORES)
def test_every_score_reads_what_it_says_within_the_trained_range(score):
    memory = build("evicted", LAYOUT, score=score, window=9, sink=1, recent=2, placing="capped", reach=9)
    state = last(stream(memory, 8, seeds=(1, 2)))
    kept, sink, recent = memory.read(state, 0, now(8, batch=2))
    assert (sink.born[0].tolist(), recent.born[0].tolist()) == ([0], [22, 23])
    assert kept.tokens == 3 * PER_FRAME and int(kept.positions[..., 0].min()) >= 24 - 9


@pytest.mark.parametrize(
    "tokens, sizes", [(0, (0, 0, 0)), (17, (1, 0, 0)), (5 * PER_FRAME + 7, (2, 3, 4)), (999, (2, 3, 4 * PER_FRAME))]
)
def test_a_budget_buys_the_sink_then_the_last_frames_then_tiles(tokens, sizes):
    memory = build("evicted", LAYOUT, tokens, sink=2)
    state = last(stream(memory, 8))
    kept = state["kept"][0].tokens if state["kept"] else 0
    assert (state["sink"][0].items, state["window"][0].items, kept) == sizes


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(score="key_dif"), "unknown score 'key_dif'; did you mean 'key_diff'?"),
        (dict(tile=3), "tile=3 does not divide the picture's 4 rows and 4 columns of tokens"),
        (dict(tile=0), "tile=0 is too small; use 1 or more"),
        (dict(placing="relative"), "placing=relative moves whole latent frames"),
        (dict(window=5), "window=5 cannot hold sink=0, recent=3 and a chunk of 3 latent frames; use window >= 6"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("evicted", LAYOUT, **options)
    assert message in str(refusal.value)
