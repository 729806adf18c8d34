"""The transformer computes the published numbers, and its attention patterns agree with each other."""

import pytest
import torch

from slotmemory.backbones.attention import Buffered, Dense, Rows, attend
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.backbones.rope import axis_dims, grid_positions, rotate, rotation
from tests.recorded import frame_major, tensors, wan

CLOSE = dict(atol=1e-4, rtol=1e-4)  # golden README: rollouts and original-model outputs in fp32


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_bidirectional_forward_equals_the_published_wan_model():
    g = tensors("wan_bidirectional")
    x = frame_major(g["x"])
    model = wan()
    t = g["timestep"][:, None].expand(x.shape[:2])
    flow, _ = model(x, t, model.text_keys(g["context"]), torch.arange(x.shape[1]))
    close(flow, frame_major(g["out_original"]))
    torch.testing.assert_close(flow, frame_major(g["out_diffusers"]), atol=2e-4, rtol=1e-4)


def block_causal(frames: int, block: int, window: int | None = None, lead: int = 0) -> torch.Tensor:
    """Which latent frame sees which; a lead frame of its own may come before the blocks."""
    index = torch.arange(frames)
    end = ((index - lead) // block + 1) * block + lead if lead else (index // block + 1) * block
    end = torch.where(index < lead, lead, end)
    sees = index[None] < end[:, None]
    return sees if window is None else sees & (index[None] >= end[:, None] - window)


@pytest.mark.parametrize(
    "name, sees, steps",
    [
        ("blockcausal", block_causal(9, 3), "timestep"),
        ("blockcausal_local6", block_causal(9, 3, window=6), "timestep"),
        ("framecausal", block_causal(9, 1), "timestep"),
        ("indep_first_frame", block_causal(9, 4, lead=1), "timestep_indep"),
    ],
)
def test_masked_training_forward_equals_the_published_one(name, sees, steps):
    g = tensors("causal_train_forward")
    model = wan()
    flow, _ = model(frame_major(g["x"]), g[steps], model.text_keys(g["context"]), torch.arange(9), Dense(sees))
    close(flow, frame_major(g[name]))


@pytest.mark.parametrize("name", ["teacher_forcing", "teacher_forcing_aug"])
def test_teacher_forcing_as_rows_of_chunks_equals_the_published_one(name):
    """Clean and noisy chunks are batch rows; noisy chunk b sees the clean chunks before it and itself."""
    g = tensors("causal_train_forward")
    model = wan()
    clean, noisy = (frame_major(g[k]).unflatten(1, (3, 3)).squeeze(0) for k in ("clean_x", "x"))
    clean_t = g["aug_t"] if name.endswith("aug") else torch.zeros(1, 9)
    steps = torch.cat((clean_t.view(3, 3), g["timestep"].view(3, 3)))
    table = torch.tensor([[-1, -1], [0, -1], [0, 1]] * 2)
    text = [(k.expand(6, -1, -1, -1), v.expand(6, -1, -1, -1)) for k, v in model.text_keys(g["context"])]
    tokens = 3 * 12
    flow, _ = model(
        torch.cat((clean, noisy)), steps, text, torch.arange(9).view(3, 3).repeat(2, 1), Rows(table, tokens)
    )
    close(flow[3:].flatten(0, 1)[None], frame_major(g[name]))


def test_streaming_through_a_buffer_equals_one_causal_pass():
    g = tensors("causal_train_forward")
    model = wan()
    x, text, steps = frame_major(g["x"]), model.text_keys(g["context"]), torch.full((1, 9), 300.0)
    whole, _ = model(x, steps, text, torch.arange(9), Dense(block_causal(9, 3)))
    empty = torch.zeros(1, 0, 4, 20)
    context, parts = [(empty, empty)] * 2, []
    for start in range(0, 9, 3):
        frames = torch.arange(start, start + 3)
        pattern = Buffered(context)
        for _ in range(2):  # the second call rewrites the tail of the same buffer
            flow, seen = model(x[:, start : start + 3], steps[:, :3], text, frames, pattern)
        turn = rotation(grid_positions(frames[None], 4, 3), 20)
        context = [
            (torch.cat((k, rotate(s.keys, *turn)), 1), torch.cat((v, s.values), 1)) for (k, v), s in zip(context, seen)
        ]
        parts.append(flow)
    close(torch.cat(parts, 1), whole)


def test_rows_hide_the_tokens_they_are_told_to_hide():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 2, 8) for _ in range(3))
    hidden = torch.tensor([[True, False, True, False], [False] * 4])
    out = Rows(torch.tensor([[-1], [0]]), 4, hidden)(0, q, k, v)
    expected = attend(q[1:], torch.cat((k[:1, 1::2], k[1:]), 1), torch.cat((v[:1, 1::2], v[1:]), 1))
    torch.testing.assert_close(out[1:], expected)
    torch.testing.assert_close(out[:1], attend(q[:1], k[:1], v[:1]))


def test_positions_split_as_published_and_shifting_time_changes_no_attention():
    assert axis_dims(128) == (44, 42, 42)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12, 2, 20) for _ in range(3))
    here, far = (rotation(grid_positions(torch.arange(s, s + 3)[None], 2, 2), 20) for s in (0, 5000))
    a, b = (attend(rotate(q, *r), rotate(k, *r), v) for r in (here, far))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_full_size_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        model = CausalWan(WanConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert len(model.state_dict()) == 825


def test_a_prompt_longer_than_the_model_takes_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="17 tokens; the model takes 16"):
        wan().text_keys(torch.zeros(1, 17, 64))
