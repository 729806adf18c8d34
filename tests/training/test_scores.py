"""Distribution matching against the published program's recorded numbers, and who sees whom when a clip is scored."""

from dataclasses import replace

import pytest
import torch

from slotmemory.sampler import FlowSchedule, add_noise, x0_to_flow
from slotmemory.training import scores
from slotmemory.training.rollout import Clip
from tests.recorded import tensors

SHIFT = FlowSchedule(5.0)


def recorded(name: str) -> torch.Tensor:
    return tensors("scheduler")[f"dmd.{name}"]


def real() -> torch.Tensor:
    return scores.guide(recorded("pred_real_cond"), (3.0, recorded("pred_real_uncond")))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.reshape(found.shape), atol=1e-5, rtol=1e-4)


def test_score_timesteps_are_warped_and_kept_off_both_ends_as_recorded():
    close(scores.score_timesteps(recorded("raw_timestep")[:, 0], SHIFT), recorded("timestep_shifted")[:, 0])
    assert scores.score_timesteps(torch.tensor([0, 999]), SHIFT).tolist() == [20, 980]


def test_noised_clips_are_as_recorded():
    sigma = SHIFT.sigma(recorded("timestep_shifted")[:, 0])
    close(add_noise(recorded("generated"), recorded("noise"), sigma), recorded("noisy_latent"))


def test_the_gradient_of_the_divergence_and_its_normaliser_are_as_recorded():
    x, fake = recorded("generated"), recorded("pred_fake_cond")
    close(scores.kl_gradient(x, fake, real()), recorded("kl_grad"))
    close(fake - real(), recorded("kl_grad_unnormalized"))


@pytest.mark.parametrize("case", ["nomask", "mask_last3", "fakecfg"])
def test_matching_losses_and_what_they_tell_the_generator_are_as_recorded(case):
    x = recorded("generated").clone().requires_grad_()
    fake, mask = recorded("pred_fake_cond"), None
    if case == "fakecfg":
        fake = scores.guide(fake, (1.5, recorded("pred_fake_uncond")))
    if case == "mask_last3":
        mask = torch.tensor([[False, True, True, True]]).expand(2, -1)
    gradient = scores.kl_gradient(x.detach(), fake, real())
    loss = scores.matching_loss(x, gradient, mask)
    loss.backward()
    close(loss.detach()[None], recorded(f"{case}.loss"))
    close(x.grad, recorded(f"{case}.grad_wrt_generated"))
    close(gradient.abs().mean()[None], recorded(f"{case}.gradient_norm"))


def test_the_critics_loss_and_gradient_are_as_recorded():
    predicted = recorded("pred_fake_cond").clone().requires_grad_()
    sigma = SHIFT.sigma(recorded("critic_timestep"))
    flow = x0_to_flow(predicted, recorded("noisy_latent"), sigma)
    loss = scores.flow_loss(flow, recorded("generated"), recorded("noise"))
    loss.backward()
    close(loss.detach()[None], recorded("critic_loss"))
    close(predicted.grad, recorded("critic_grad_wrt_pred_x0"))


def test_matching_by_hand():
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2).requires_grad_()
    real, fake = torch.tensor([0.0, 1.0]).view_as(x), torch.tensor([3.0, 1.0]).view_as(x)
    gradient = scores.kl_gradient(x.detach(), fake, real)
    assert gradient.flatten().tolist() == [2.0, 0.0]  # (3, 0) over the mean of |1|, |2|
    loss = scores.matching_loss(x, gradient)
    loss.backward()
    assert loss.item() == 1.0 and x.grad.flatten().tolist() == [1.0, 0.0]  # 0.5 (4 + 0) / 2; gradient / 2


def test_guidance_leads_away_from_all_that_it_is_given():
    x, negative, alone = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])
    assert scores.guide(x).tolist() == [1.0, 2.0]
    assert scores.guide(x, (3.0, negative), (0.5, alone)).tolist() == [4.0, 1.0]


def test_nothing_is_left_to_follow_where_a_clip_is_what_the_teacher_predicts():
    x = torch.ones(2, 1, 1, 1, 2)
    gradient = scores.kl_gradient(x, x, x)
    assert torch.equal(gradient, torch.zeros_like(x))


def clip(start: int, past: int, new: int, batch: int = 1) -> Clip:
    chunks = past + new
    latents = torch.zeros(batch, 3 * chunks, 1, 2, 2)
    prompts = [[f"chunk {start + k}, row {row}" for row in range(batch)] for k in range(chunks)]
    return Clip(latents, 3 * past, 3 * start, latents[:, :3], ["the first"] * batch, prompts)


def test_in_a_clip_from_the_start_every_chunk_sees_the_two_before_it_and_the_first_once():
    table = scores.Causal(3, 2).table(clip(0, 0, 5))
    clean, noised = table[:4].tolist(), table[4:].tolist()
    # columns: the stream's first chunk, two chunks before, one before; row numbers are clean chunks 0..3
    assert clean == [[-1, -1, -1], [-1, -1, 0], [-1, 0, 1], [0, 1, 2]]
    assert noised == [*clean, [0, 2, 3]]


def test_in_a_later_clip_every_chunk_sees_the_streams_first_and_its_past():
    table = scores.Causal(3, 2).table(clip(10, 2, 3, batch=2))
    # per stream: its first chunk, then four clean chunks of which two are past
    assert table[0].tolist() == [-1, -1, -1] and table[1].tolist() == [0, -1, -1]
    assert table[5].tolist() == [-1, -1, -1] and table[6].tolist() == [5, -1, -1]
    assert table[10:].tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4], [5, 6, 7], [5, 7, 8], [5, 8, 9]]


def test_chunks_in_which_somebody_returns_count_as_often_as_asked():
    shown = (torch.zeros(3, 1, 2, 2), "a cat")
    given = replace(clip(10, 2, 3, batch=2), reminders=[{}, {3: shown}])
    assert scores.Causal(3, 2).counts(given) is None
    counts = scores.Causal(3, 2, reminder_weight=4.0).counts(given)
    assert counts.tolist() == [[1.0] * 3] * 4 + [[4.0] * 3] + [[1.0] * 3]
    x, gradient = torch.zeros(6, 3, 1, 2, 2, requires_grad=True), torch.ones(6, 3, 1, 2, 2)
    scores.matching_loss(x, gradient, counts).backward()
    torch.testing.assert_close(x.grad[4] / x.grad[0], torch.full_like(x[0], 4.0))


class Recorder:
    """A network that says what it was given."""

    class config:
        patch = (1, 1, 1)

    def __init__(self):
        self.patch_embedding = torch.nn.Linear(1, 1)

    def text_keys(self, embeddings):
        return [(embeddings, embeddings)]

    def __call__(self, latents, timesteps, text, frames, pattern=None):
        self.given = latents, timesteps, text, frames, pattern
        return latents.clone(), []


class Numbered:
    """A text encoder that tells prompts apart by the order in which it met them."""

    def __init__(self):
        self.met = []

    def embed(self, prompts):
        self.met = list(dict.fromkeys([*self.met, *prompts]))
        return torch.tensor([[[float(self.met.index(p))]] for p in prompts]), torch.ones(len(prompts))


@pytest.mark.parametrize("negative", [None, [""] * 6])
def test_a_causal_score_is_shown_places_levels_and_prompts_row_by_row(negative):
    given, view = clip(10, 2, 3, batch=2), scores.Causal(3, 2, context_noise=0.1)
    network, text = Recorder(), Numbered()
    noisy, times = torch.full((6, 3, 1, 2, 2), 7.0), torch.arange(6) * 100.0
    flow = view.flow(network, text, given, noisy, times, negative, torch.ones(view.past_shape(given)))
    latents, levels, keys, frames, _ = network.given
    assert torch.equal(flow, noisy)  # the rows that count, in order
    assert latents[:10].unique().tolist() == pytest.approx([0.1])  # ten clean rows with a tenth of noise
    assert levels[:10].unique().tolist() == [100] and levels[10:, 0].tolist() == times.tolist()
    assert frames[:5, 0].tolist() == [27, 30, 33, 36, 39] == frames[5:10, 0].tolist()
    assert frames[10:, 0].tolist() == [36, 39, 42] * 2
    told = [text.met[int(i)] for i in keys[0][0].flatten()]
    assert told[:3] == ["the first", "chunk 10, row 0", "chunk 11, row 0"] and told[6] == "chunk 10, row 1"
    rows = [f"chunk {k}, row {row}" for row in range(2) for k in (12, 13, 14)]
    assert told[10:] == (rows if negative is None else [""] * 6)


def test_the_prompt_before_is_that_of_the_chunk_before_also_across_clips():
    view = scores.Causal(3, 2)
    assert view.prompts_before(clip(10, 2, 2)) == ["chunk 11, row 0", "chunk 12, row 0"]
    assert view.prompts_before(clip(0, 0, 2)) == ["chunk 0, row 0", "chunk 0, row 0"]


def test_a_joint_score_sees_whole_clips_and_counts_new_frames_only():
    given, view = clip(10, 1, 2, batch=2), scores.Joint()
    network, text = Recorder(), Numbered()
    assert view.counts(given).tolist() == [[False] * 3 + [True] * 6] * 2
    view.flow(network, text, given, view.rows(given), torch.tensor([10.0, 20.0]), None, torch.zeros(0))
    _, levels, keys, _, pattern = network.given
    assert pattern is None and levels.shape == (2, 9) and levels[:, 4].tolist() == [10, 20]
    assert [text.met[int(i)] for i in keys[0][0].flatten()] == ["chunk 12, row 0", "chunk 12, row 1"]
    assert view.counts(clip(0, 0, 2)) is None
