"""Sizes of a stream, against the numbers of Wan 2.1 at 832x480 and of the embedded model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.errors import InputError
from slotmemory.layout import Layout

SIZES = dict(layers=2, heads=2, head_dim=8, text_tokens=16)


def small(**changes) -> Layout:
    return Layout(**{"height": 48, "width": 80, **SIZES, **changes})


def test_wan_at_its_published_size_has_the_published_token_counts():
    wan = Layout(480, 832, layers=30, heads=12, head_dim=128, text_tokens=512)
    assert (wan.latent_height, wan.latent_width, wan.grid) == (60, 104, (30, 52))
    assert wan.tokens_per_frame == 30 * 52
    assert wan.tokens_per_chunk == 3 * 30 * 52
    assert wan.tokens(12) == 12 * 30 * 52
    assert (wan.model_width, wan.token_channels) == (1536, 64)
    assert wan.bytes_per_token() == 30 * wan.bytes_per_token_and_layer() == 30 * 2 * 1536 * 2


def test_the_first_latent_holds_one_frame_and_the_others_four():
    layout = small()
    assert [layout.frames(n) for n in (0, 1, 2, 3, 240)] == [0, 1, 5, 9, 957]
    assert [layout.latents(n) for n in (0, 1, 2, 5, 6, 957)] == [0, 1, 2, 2, 3, 240]


def test_the_first_chunk_has_nine_frames_and_the_others_twelve():
    layout = small()
    assert layout.chunk_frames(0) == range(0, 9)
    assert layout.chunk_frames(1) == range(9, 21)
    assert layout.chunk_latents(2) == range(6, 9)


def test_a_minute_is_80_chunks_and_957_frames():
    layout = small()
    assert layout.chunks(60) == 80
    assert layout.seconds(80) == 957 / 16


def test_a_duration_below_a_chunk_still_gets_one():
    assert small().chunks(0.01) == 1


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 60), st.integers(0, 200))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_chunks_tile_the_frames_without_gaps(frames_per_chunk, temporal_stride, fps, chunks):
    layout = small(frames_per_chunk=frames_per_chunk, temporal_stride=temporal_stride, fps=fps)
    edge = 0
    for chunk in range(chunks):
        frames = layout.chunk_frames(chunk)
        assert frames.start == edge and len(frames) > 0
        edge = frames.stop
    assert edge == layout.frames(chunks * frames_per_chunk)
    assert layout.seconds(chunks) == edge / fps
    assert layout.latents(layout.frames(chunks)) == chunks


@given(st.integers(1, 400), st.sampled_from([8, 12, 16, 24, 25]))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_whole_number_of_chunks_is_not_rounded_up(chunks, fps):
    layout = small(fps=fps)
    assert layout.chunks(chunks * layout.frames_per_chunk / layout.latents_per_second) == chunks


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 50}, "height=50 is not a multiple of 16 (pixels per token row); use 48 or 64"),
        ({"width": 8}, "width=8 is not a multiple of 16 (pixels per token column); use 16"),
        ({"frames_per_chunk": 0}, "frames_per_chunk=0 is not a whole number of at least 1"),
        ({"fps": 16.0}, "fps=16.0 is not a whole number of at least 1"),
        ({"heads": True}, "heads=True is not a whole number of at least 1"),
        ({"head_dim": 7}, "use 6 or 8"),
        ({"patch": (1, 2)}, "patch=(1, 2) is not three whole numbers"),
        ({"patch": (2, 2, 2)}, "frames_per_chunk=3 is not a multiple of 2"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_what_to_use(changes, message):
    with pytest.raises(InputError) as caught:
        small(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
