"""The history encoder writes a video's frames as few tokens, in parts as at once, and keeps the whole past in sight."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slotmemory.contract import toy
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._encoder import Encoder, parse_rate
from slotmemory.memory import build
from slotmemory.session import Session

WAN = Layout(480, 832, layers=2, heads=12, head_dim=8, text_tokens=4)
SMALL = replace(WAN, height=64, width=128)  # 8 x 16 latents, 4 x 8 tokens
RATES = ("4x4x2", "2x2x2", "2x2x1", "2x2x8", "4x2x4")


def encoder(rate: str = "4x4x2", layout: Layout = SMALL, **options) -> Encoder:
    """An encoder that was trained, in so far as none of its weights is zero."""
    torch.manual_seed(0)
    found = Encoder(layout, parse_rate(rate), **{"width": 16, "heads": 2, "blocks": 2, "span": 3, **options})
    found.requires_grad_(False)
    if hasattr(found, "project"):
        torch.nn.init.normal_(found.project.weight, std=0.3)
    return found


def video(frames: int, layout: Layout = SMALL, batch: int = 1) -> torch.Tensor:
    shape = (batch, frames, layout.latent_channels, layout.latent_height, layout.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def in_parts(encoder: Encoder, latents: torch.Tensor, sizes) -> torch.Tensor:
    made, state = [], None
    for part in latents.split(sizes, 1):
        tokens, state = encoder(part, state)
        made.append(tokens)
    return torch.cat(made, 1)


@pytest.mark.parametrize("rate", RATES)
def test_a_video_encoded_in_parts_is_the_video_encoded_at_once(rate):
    one, latents = encoder(rate), video(18, batch=2)
    whole, _ = one(latents)
    assert whole.shape == (2, 18 // one.rate[2], one.tokens, SMALL.model_width)
    for sizes in ([3] * 6, [1] * 18, [1, 7, 2, 8]):
        torch.testing.assert_close(in_parts(one, latents, sizes), whole, atol=1e-5, rtol=0)


def test_an_encoded_frame_depends_on_the_past_within_reach_and_never_on_the_future():
    one, latents = encoder("2x2x2", blocks=1, span=3), video(16)
    whole, _ = one(latents)
    changed = latents.clone()
    changed[:, 8] += 1
    apart = (one(changed)[0] - whole).abs().amax((0, 2, 3))
    assert apart[:4].max() == 0 and apart[4] > 1e-3  # frames 8 and 9 are encoded frame 4
    assert apart[5] > 1e-5


@pytest.mark.parametrize("rate, per_second", [("4x4x2", 195), ("2x2x2", 780), ("2x2x1", 1560), ("2x2x8", 195)])
def test_rates_count_tokens_as_the_paper_does(rate, per_second):
    down, across, time = parse_rate(rate)
    by_law = WAN.tokens_per_frame * WAN.latents_per_second / (down * across * time)
    assert by_law == per_second
    assert encoder(rate, WAN, blocks=0).grid == (30 // down, 52 // across)


def test_the_papers_twenty_seconds_are_5460_tokens():
    one = encoder("4x4x2", WAN, blocks=0)
    assert one.grid == (7, 13) and one.tokens * 120 // one.rate[2] == 5460


def test_an_untrained_encoder_says_what_the_backbone_would_of_averaged_latents():
    policy = build("history", SMALL, rate="2x4x2", width=16, heads=2)
    weight, bias = torch.randn(SMALL.model_width, 16, 1, 2, 2), torch.randn(SMALL.model_width)
    policy.adopt(weight, bias)
    latents = video(6)
    averaged = F.avg_pool3d(latents.transpose(1, 2), (2, 2, 4))
    expected = F.conv3d(averaged, weight, bias, stride=(1, 2, 2)).flatten(3).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(policy.encoder(latents)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("branches, weights", [("low", False), ("high", True), ("both", True)])
def test_branches_can_be_left_out(branches, weights):
    one, latents = encoder(branches=branches), video(4)
    assert bool(list(one.parameters())) is weights
    low = encoder(branches="low")(latents)[0]
    assert torch.equal(one(latents)[0], low) is (branches == "low")


def test_tokens_stand_in_the_middle_of_what_they_stand_for():
    places = build("history", SMALL, rate="4x2x2", width=16, heads=2).places(9, 2)
    assert places.shape == (1, 2 * 1 * 4, 3)
    assert places[0, 0].tolist() == [9.5, 1.5, 0.5] and places[0, -1].tolist() == [11.5, 1.5, 6.5]


def stream(frames: int, budget: int | None = None, **options) -> Session:
    engine = toy()
    arguments = {"rate": "2x2x2", "width": 16, "heads": 2, "encoded": 60, "window": 6, **options}
    session = Session(engine.with_memory("history", budget, **arguments), {0: "a red cat"})
    layout = engine.layout
    session.prefill(video(frames, layout))
    return session


def test_frames_are_kept_in_tokens_as_soon_as_they_fill_a_cell():
    for frames, born in ((3, [0]), (6, [0, 2, 4]), (9, [0, 2, 4, 6])):
        bank = stream(frames).state["history"][0]
        assert bank.born[0].tolist() == born
        assert bank.tokens == 4 * len(born) and bank.positions[0, -1, 0].tolist() == [born[-1] + 0.5, 0.5, 0.5]


def test_over_capacity_the_kept_frames_go_on_covering_the_whole_video():
    born = stream(36, encoded=5).state["history"][0].born[0].tolist()
    gaps = [b - a for a, b in zip(born, born[1:])]
    assert len(born) == 5 and born[0] == 0 and born[-1] == 34
    assert max(gaps) <= min(a + b for a, b in zip(gaps, gaps[1:]))
    assert stream(18, encoded=5, keep="recent").state["history"][0].born[0].tolist() == list(range(8, 18, 2))


def test_however_long_the_video_no_gap_is_longer_than_two_neighbouring_ones_together():
    policy = build("history", SMALL, rate="4x4x2", width=16, heads=2, encoded=8)
    born: list[int] = []
    for frame in range(400):
        born = [*born, frame]
        born = [born[i] for i in policy._spread(born)]
        if frame > 20:
            gaps = [b - a for a, b in zip(born, born[1:])]
            assert born[0] == 0 and born[-1] == frame
            assert max(gaps) <= min(a + b for a, b in zip(gaps, gaps[1:])) and max(gaps) < 2 * frame / 7


def test_a_budget_gives_the_window_half_and_the_encoded_frames_the_rest():
    frame = toy().layout.tokens_per_frame
    for budget, past, items in ((2 * frame, 1, 4), (8 * frame, 3, 20), (frame, 0, 4), (3, 0, 0)):
        policy = stream(6, budget).engine.memory
        assert (policy.past, policy.capacity, policy.budget) == (past, items, budget)


def test_rates_and_sizes_that_cannot_be_are_named():
    with pytest.raises(InputError, match="rate='3x4x2': expected powers of 2"):
        parse_rate("3x4x2")
    with pytest.raises(InputError, match="rate=16x16x1 leaves nothing of a grid of 4x8 tokens"):
        encoder("16x16x1")
    with pytest.raises(InputError, match="nearest|did you mean|branches"):
        encoder(branches="bot")
    with pytest.raises(InputError, match="width=20, heads=2, span=3: width must be"):
        encoder(width=20)


def test_in_a_differentiable_stream_the_next_chunks_gradient_reaches_the_encoder():
    engine = toy().with_memory("history", rate="2x2x2", width=16, heads=2)
    engine.memory.requires_grad_(True)
    session = Session(engine, {0: "a red cat"})
    session.differentiable = True
    session.step()
    session.step().latents.square().sum().backward()
    assert engine.memory.encoder.project.weight.grad.abs().sum() > 0
