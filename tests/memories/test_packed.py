"""FramePack's schedule: the last frames in falling resolution, with the published token counts, starts and positions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.rope import averaging, grid_positions, rotate, rotation
from slotmemory.contract import toy
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories.packed import Level, parse_schedule
from slotmemory.memory import Now, Written, build
from slotmemory.session import Session

WAN = Layout(480, 832, layers=1, heads=2, head_dim=12, text_tokens=4)
SMALL = replace(WAN, height=96, width=128)  # 12 x 16 latents, 6 x 8 tokens


def written(frames: int, layout: Layout = SMALL, first: int = 0) -> Written:
    shape = (1, frames, layout.latent_channels, layout.latent_height, layout.latent_width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(frames))
    return Written(Now(0, first, frames, 0, False, (), torch.zeros(1)), (), torch.zeros(0), latents)


def prefix_of(frames: int, layout: Layout = SMALL, first: int = 0, adopt=None, **options):
    policy = build("packed", layout, **options)
    if adopt:
        policy.adopt(*adopt)
    with torch.no_grad():
        return policy.prefix(policy.start(1), written(frames, layout, first))[1]


def test_token_counts_are_the_published_ones():
    policy = build("packed", WAN)
    assert policy.nominal == 2340 and policy.budget == 2366
    counts = {level.name: level.cells * policy.per_cell(level) for level in policy.levels}
    assert counts == {"k4": 416, "k2": 390, "k1": 1560}
    assert prefix_of(19, WAN).tokens.shape == (1, 2366, WAN.model_width)


def test_untrained_tokens_are_the_patch_embedding_of_averaged_latents():
    weight, bias = torch.randn(SMALL.model_width, 16, 1, 2, 2), torch.randn(SMALL.model_width)
    tokens = prefix_of(19, schedule="f16k4f2k2f1k1", adopt=(weight, bias)).tokens
    latents = F.pad(written(19).latents.transpose(1, 2), (0, 0, 0, 4, 0, 0), "replicate")  # 6 token rows -> 8
    parts = ((latents[:, :, :16], 4), (latents[:, :, 16:18, :12], 2), (latents[:, :, 18:, :12], 1))
    expected = [F.conv3d(F.avg_pool3d(x, k), weight, bias, stride=(1, 2, 2)).flatten(2).mT for x, k in parts]
    torch.testing.assert_close(tokens, torch.cat(expected, 1), atol=1e-5, rtol=1e-5)


def test_a_packed_tokens_phases_are_the_mean_over_its_cell():
    grid = grid_positions(torch.arange(5, 9), 4, 2)  # a cell of 4 frames, 4 rows, 2 columns
    cos, sin = rotation(grid, 12)
    middle, extent = grid.float().mean(0), torch.tensor([4.0, 4, 2])
    packed = rotation(middle[None], 12), averaging(extent[None], 12)
    torch.testing.assert_close(packed[0][0] * packed[1], cos.mean(0, keepdim=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(packed[0][1] * packed[1], sin.mean(0, keepdim=True), atol=1e-6, rtol=0)


def test_tokens_stand_where_their_frames_stood_and_cells_at_the_edge_for_what_exists():
    prefix = prefix_of(19, first=100)
    places, extents = prefix.positions[0], prefix.extents[0]
    far = 4 * 2 * 2  # 4 cells in time, 2 rows (one and a half), 2 columns
    assert places[0].tolist() == [101.5, 1.5, 1.5] and extents[0].tolist() == [4, 4, 4]
    assert places[far - 1].tolist() == [113.5, 4.5, 5.5] and extents[far - 1].tolist() == [4, 2, 4]
    assert places[far].tolist() == [116.5, 0.5, 0.5] and extents[far].tolist() == [2, 2, 2]
    assert places[-1].tolist() == [118, 5, 7] and extents[-1].tolist() == [1, 1, 1]


def test_a_young_video_fills_the_fine_levels_first_and_its_oldest_cell_stands_for_what_exists():
    assert torch.equal(prefix_of(1).positions[0, :, 0], torch.zeros(48))
    assert prefix_of(2).positions[0, 0].tolist() == [0, 0.5, 0.5]
    prefix = prefix_of(9)  # 6 frames are left for cells of 4: 2 and 4
    times = prefix.positions[0, :8, 0].tolist(), prefix.extents[0, :8, 0].tolist()
    assert times == ([0.5] * 4 + [3.5] * 4, [2] * 4 + [4] * 4)


def test_a_stream_reads_its_last_frames_packed_and_no_older_ones():
    engine = toy().with_memory("packed")
    session = Session(engine, {0: "a red cat"}, seeds=(3,))
    shape = (1, 30, engine.layout.latent_channels, engine.layout.latent_height, engine.layout.latent_width)
    session.prefill(torch.randn(shape))
    born = {name: session.state[name][0].born[0].tolist() for name in ("k4", "k2", "k1")}
    assert born == {"k4": [11, 15, 19, 23], "k2": [27], "k1": [29]}
    assert session.state["latents"].shape[1] == 19
    assert session.step().trace["read"] == {"k4": 4, "k2": 4, "k1": 16}


def test_keys_are_kept_so_that_reading_them_at_their_middle_gives_the_mean_of_their_phases():
    engine = toy().with_memory("packed", schedule="f2k2")
    session, latents = Session(engine, {0: "a red cat"}), torch.randn(1, 3, 4, 8, 8)
    session.prefill(latents)
    bank = session.state["k2"][0]
    # keys of the first layer do not depend on what was attended to
    tokens = engine.memory.prefix(engine.memory.start(1), replace(written(3, engine.layout), latents=latents))[1].tokens
    turn = rotation(bank.positions[:, 0], engine.layout.head_dim)
    text = session.told.keys
    _, _, seen = engine.backbone.run(
        tokens[:, None], torch.zeros(1, 1), text, turn, Buffered([(tokens[:, :0],) * 2] * 2)
    )
    cell = grid_positions(torch.arange(1, 3), 2, 2).float()  # frames 1 and 2, the first two rows and columns
    expected = rotate(seen[0].keys[:, :1].expand(-1, 8, -1, -1), *rotation(cell[None], engine.layout.head_dim)).mean(1)
    found = rotate(bank.keys[:, 0], *turn)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "budget, levels",
    [
        (10000, [(16, 4), (2, 2), (1, 1)]),
        (2366, [(16, 4), (2, 2), (1, 1)]),
        (2365, [(16, 4), (2, 2)]),
        (805, [(16, 4)]),
        (300, [(8, 4)]),
        (103, []),
    ],
)
def test_a_smaller_budget_leaves_out_the_finest_levels_then_the_oldest_cells(budget, levels):
    policy = build("packed", WAN, budget)
    assert policy.levels == [Level(*x) for x in levels]
    assert set(policy.state_dict()) == set(build("packed", WAN).state_dict())


@pytest.mark.parametrize("schedule", ["", "f16k4 f1k1", "f1k1f2k2", "f0k4", "f16k4g9"])
def test_a_schedule_that_cannot_be_read_is_named(schedule):
    with pytest.raises(InputError, match="expected frames and factors"):
        parse_schedule(schedule)
