"""The `decoupled` memory: two softmaxes and a gate, blocks chosen by their means, an archive that keeps what is new."""

import math
from dataclasses import replace

import pytest
import torch

from slotmemory import memory as memories
from slotmemory.backbones.attention import attend
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.contract import Trial, latents_of
from slotmemory.errors import InputError
from slotmemory.memories.decoupled import Blocks
from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, stream, tell, written

PER_FRAME = LAYOUT.tokens_per_frame
CLOSE = dict(atol=1e-5, rtol=1e-5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# blocks


@pytest.mark.parametrize("grid", [(4, 6), (4, 4), (5, 7), (2, 3)])
def test_blocks_part_a_frame_into_neighbours_of_almost_one_size(grid):
    blocks = Blocks(grid, 2, 3)
    parts = [row[~padding].tolist() for row, padding in zip(blocks.table, blocks.padding)]
    assert sorted(sum(parts, [])) == list(range(grid[0] * grid[1]))
    for part in parts:
        rows, columns = {t // grid[1] for t in part}, {t % grid[1] for t in part}
        assert len(part) == len(rows) * len(columns)  # a rectangle
        assert max(rows) - min(rows) < len(rows) and max(columns) - min(columns) < len(columns)
        assert grid[0] // 2 <= len(rows) <= -(-grid[0] // 2) and grid[1] // 3 <= len(columns) <= -(-grid[1] // 3)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_attending_to_all_blocks_is_dense_attention(grid):
    blocks = Blocks(grid, 2, 3)
    query, key, value = (random(2, frames * blocks.tokens, 3, 8, seed=s) for s, frames in enumerate((2, 4, 4)))
    every = torch.stack([torch.randperm(24) for _ in range(2 * 3 * 12)]).view(2, 3, 12, 24)
    torch.testing.assert_close(blocks.attend(query, key, value, every), attend(query, key, value), **CLOSE)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_block_of_queries_attends_to_the_tokens_of_its_own_blocks_alone_and_gradients_follow(grid):
    blocks = Blocks(grid, 2, 3)
    query, key, value = (random(1, frames * blocks.tokens, 2, 8, seed=s) for s, frames in enumerate((1, 2, 2)))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    chosen = torch.tensor([[[[0, 7], [11, 3], [5, 4], [1, 2], [6, 8], [9, 10]], [[3, 3 + 6]] * 6]])
    found = blocks.attend(*inputs, chosen)
    tokens = [row[~padding] for row, padding in zip(blocks.table, blocks.padding)]
    for head in range(2):
        for block in range(6):
            mine = torch.cat([c // 6 * blocks.tokens + tokens[c % 6] for c in chosen[0, head, block].tolist()])
            alone = [x[:, i, head : head + 1] for x, i in zip(inputs, (tokens[block], mine, mine))]
            torch.testing.assert_close(found[:, tokens[block], head : head + 1], attend(*alone), **CLOSE)
    asked = torch.autograd.grad(found[:, tokens[0], 0].square().sum(), inputs)[2][0, :, 0].abs().sum(-1)
    touched = torch.zeros_like(asked, dtype=torch.bool)
    touched[torch.cat((tokens[0], blocks.tokens + tokens[1]))] = True
    assert torch.equal(asked > 0, touched)


def test_a_mean_leaves_padding_out():
    blocks = Blocks((5, 7), 2, 3)
    x = random(1, 70, 2, 4)
    for frame in range(2):
        for block in range(6):
            own = blocks.table[block][~blocks.padding[block]]
            expected = x[:, frame * 35 + own].mean(1)
            torch.testing.assert_close(blocks.pool(x)[:, frame * 6 + block], expected, **CLOSE)


# attention


def late(memory, chunks=6, seeds=(0, 1)):
    return list(stream(memory, chunks, seeds=seeds))[-1]


def pattern_of(memory, state, chunk):
    """The pattern of a chunk, and per layer what it reads, rotated."""
    moment, reads, context = now(chunk), [], []
    for layer in range(LAYOUT.layers):
        banks = memory.read(state, layer, moment)
        keys, values, places = (
            torch.cat([getattr(bank, part).flatten(1, 2) for bank in banks], 1)
            for part in ("keys", "values", "positions")
        )
        reads.append(banks)
        context.append((rotate(keys, *rotation(places, LAYOUT.head_dim)), values))
    return memory.attend(state, moment, reads, context), context


def chunk_of_tokens(seed, rows=2):
    shape = (rows, LAYOUT.tokens_per_chunk, LAYOUT.heads, LAYOUT.head_dim)
    return [random(*shape, seed=seed + i) for i in range(3)] + [
        random(rows, shape[1], LAYOUT.model_width, seed=seed + 3)
    ]


def test_what_comes_out_is_the_windows_softmax_plus_the_gated_softmax_of_everything():
    memory = build("decoupled", LAYOUT, top_blocks=10**6)
    torch.nn.init.normal_(memory.weight)
    pattern, context = pattern_of(memory, late(memory), 6)
    for seed in (10, 20):  # two passes through the same buffer
        query, key, value, hidden = chunk_of_tokens(seed)
        for layer in range(LAYOUT.layers):
            keys, values = (torch.cat((x, own), 1) for x, own in zip(context[layer], (key, value)))
            window = slice(12 * PER_FRAME, None)  # 18 frames are past, 6 of them in the window
            normed = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
            gate = torch.sigmoid(normed @ memory.weight[layer] + memory.bias[layer])[..., None]
            expected = attend(query, keys[:, window], values[:, window]) + gate * attend(query, keys, values)
            torch.testing.assert_close(pattern(layer, query, key, value, hidden), expected, **CLOSE)


def test_every_gate_starts_at_the_value_given():
    for gate in (0.0, 0.1, 0.5, 1.0):
        memory = build("decoupled", LAYOUT, gate=gate)
        found = memory.gate(0, random(1, 5, LAYOUT.model_width))
        torch.testing.assert_close(found, torch.full((1, 5, LAYOUT.heads, 1), gate))


def test_choosing_all_blocks_changes_nothing_and_choosing_few_does():
    def chosen(count):
        memory = build("decoupled", LAYOUT, top_blocks=count)
        pattern, _ = pattern_of(memory, late(memory), 6)
        return pattern(1, *chunk_of_tokens(10))

    every = 6 * (18 + 3)
    torch.testing.assert_close(chosen(every - 1), chosen(every), atol=1e-2, rtol=0)  # all but the least fitting
    assert float((chosen(3) - chosen(every)).detach().abs().max()) > 1e-2


def test_a_block_is_found_by_its_content_however_far_back_and_wherever_in_time_it_is_placed():
    """One block of an archived frame is made of the chunk's own queries: it alone is asked for and returned."""
    memory = build("decoupled", LAYOUT, top_blocks=1, gate=1.0, placing="native")
    for chunk in (3, 300):
        state = late(memory, 5, seeds=(0,))
        state = {name: [bank.at(bank.born + 3 * (chunk - 5)) for bank in banks] for name, banks in state.items()}
        tokens = memory.blocks.table[4][~memory.blocks.padding[4]]
        archive = state["archive"][0]
        keys = archive.keys.clone()
        wanted = 5 * random(LAYOUT.heads, LAYOUT.head_dim)
        keys[:, 2, tokens] = wanted
        state["archive"][0] = replace(archive, keys=keys)
        pattern, context = pattern_of(memory, state, chunk)
        _, key, value, hidden = chunk_of_tokens(10, rows=1)
        places = torch.tensor([[[3 * chunk + f, r, c] for f in range(3) for r in range(4) for c in range(4)]])
        query = rotate(wanted.expand_as(key).contiguous(), *rotation(places, LAYOUT.head_dim))
        found = pattern(0, query, key, value, hidden)
        keys, values = (torch.cat((x, own), 1) for x, own in zip(context[0], (key, value)))
        near = attend(query, keys[:, 9 * PER_FRAME :], values[:, 9 * PER_FRAME :])
        there = 2 * PER_FRAME + tokens
        far = attend(query, keys[:, there], values[:, there])
        same = tokens + PER_FRAME  # the queries of the same block: others ask from other rows and columns
        torch.testing.assert_close((found - near)[:, same], far[:, same], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [6, 60])
def test_means_know_rows_and_columns_but_no_time(chunk):
    memory = build("decoupled", LAYOUT, top_blocks=1)
    state = late(memory)
    pattern, _ = pattern_of(memory, state, chunk)
    pattern(0, *chunk_of_tokens(10))
    for frame, bank in enumerate(state["archive"][0].take(torch.tensor([[i]] * 2)) for i in range(3)):
        keys, places = bank.keys[:, 0], bank.positions[:, 0].clone()
        places[..., 0] = 0
        expected = memory.blocks.pool(rotate(keys, *rotation(places, LAYOUT.head_dim)))
        torch.testing.assert_close(pattern.means[0][:, 6 * frame : 6 * frame + 6], expected, **CLOSE)


def test_far_tokens_take_no_weight_from_the_window():
    """Keys of the archive that match every query perfectly leave the window's own part as it was."""
    memory = build("decoupled", LAYOUT, gate=0.0)
    state = late(memory)
    loud = {**state, "archive": [replace(bank, keys=100 * bank.keys) for bank in state["archive"]]}
    given = chunk_of_tokens(10)
    assert torch.equal(pattern_of(memory, state, 6)[0](0, *given), pattern_of(memory, loud, 6)[0](0, *given))


@pytest.mark.parametrize("few", [False, True])
def test_a_closed_gate_equals_the_window(few):
    options = dict(gate=0.0, placing="native", **(dict(top_blocks=4) if few else {}))
    closed = Trial(memories.find("decoupled"), options=options)
    window = Trial(memories.find("window"))
    torch.testing.assert_close(latents_of(closed.session()), latents_of(window.session()), atol=2e-5, rtol=0)
    opened = Trial(memories.find("decoupled"), options={**options, "gate": 0.5})
    assert float((latents_of(opened.session()) - latents_of(window.session())).abs().max()) > 1e-2


def test_gradients_reach_the_gate_and_the_chunks_own_tokens_through_both_softmaxes():
    memory = build("decoupled", LAYOUT, top_blocks=4)
    pattern, _ = pattern_of(memory, late(memory), 6)
    given = [x.requires_grad_() for x in chunk_of_tokens(10)]
    found = pattern(0, *given)
    wanted = [memory.weight, memory.bias, *given]
    *_, hidden = gradients = torch.autograd.grad(found.square().sum(), wanted)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert all(float(g.abs().max()) > 0 for g in gradients[:-1])
    assert float(hidden.abs().max()) == 0  # the gate's weight starts at zero


# archive


def born(bank):
    return bank.born.tolist()


def test_frames_leave_the_window_for_the_archive_and_none_is_lost():
    memory = build("decoupled", LAYOUT)
    for chunk, state in enumerate(stream(memory, 6), 1):
        past = list(range(3 * chunk))
        assert born(state["archive"][0].join(state["window"][0])) == [past]
        assert state["window"][0].items == min(6, len(past))
    assert memory.budget is None


def test_a_full_archive_loses_the_frame_that_a_newer_one_resembles_most():
    memory = build("decoupled", LAYOUT, window=3, archive=4)

    def showing(seen, layer, frames):
        """Frames 0, 2 and 5 show one thing, all others something of their own."""
        keys = torch.cat([random(1, PER_FRAME, LAYOUT.heads, LAYOUT.head_dim, seed=f) for f in frames], 1)
        return seen._replace(keys=keys + 0.01 * seen.keys)

    state, kept = memory.start(1), []
    for chunk, frames in enumerate(((0, 1, 0), (3, 4, 0), (6, 7, 8))):
        shown = written(now(chunk), change=lambda seen, layer, frames=frames: showing(seen, layer, frames))
        state = tell(memory, state, shown)
        kept.append(born(state["archive"][0])[0])
    assert kept[0] == [0, 1, 2]
    assert kept[1] == [1, 3, 4, 5]
    assert len(kept[2]) == 4


def test_a_budget_is_shared_in_halves_and_the_archive_takes_what_the_window_leaves():
    def shares(*given, **options):
        memory = build("decoupled", LAYOUT, *given, **options)
        return memory.past, memory.archive, memory.budget

    assert shares() == (6, None, None)
    assert shares(archive=4) == (6, 4, 10 * PER_FRAME)
    assert shares(5 * PER_FRAME + 3) == (3, 2, 5 * PER_FRAME + 3)
    assert shares(20 * PER_FRAME) == (6, 14, 20 * PER_FRAME)
    assert shares(6 * PER_FRAME, archive=1) == (5, 1, 6 * PER_FRAME)
    assert shares(0) == (0, 0, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(window=2), "window=2 is too small; use 3 or more"),
        (dict(top_blocks=0), "top_blocks=0 is too small; use 1 or more"),
        (dict(rows=5), "rows=5, columns=3 do not cut a frame of 4 x 4 tokens; use from 1 x 1 to 4 x 4"),
        (dict(gate=1.5), "gate=1.5 is not from 0 to 1"),
        (dict(placing="caped"), "did you mean 'capped'?"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("decoupled", LAYOUT, **options)
    assert message in str(refusal.value)


def test_a_closed_gate_is_closed_for_good():
    memory = build("decoupled", LAYOUT, gate=0.0)
    assert float(memory.bias.detach().max()) == -math.inf
    memory.gate(0, random(1, 5, LAYOUT.model_width)).sum().backward()
    assert float(memory.bias.grad.abs().max()) == 0
