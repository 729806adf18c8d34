"""Distribution matching: what a real and a fake score say of a clip, and the losses made of it.

Source: DMD as Self-Forcing trains with it (arXiv 2506.08009; DMD2, arXiv 2405.14867). A score is a flow network's
prediction of the clean clip from a noised one; the generator follows the difference of two of them.

Legend: R rows (samples scored apart), F latent frames, C channels, h, w latent size, N tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slotmemory.backbones.attention import Rows
from slotmemory.sampler import FlowSchedule, add_noise, flow_to_x0
from slotmemory.training.networks import Cast, Lines
from slotmemory.training.rollout import Clip

# losses


def guide(conditional: Tensor, *away: tuple[float, Tensor]) -> Tensor:
    """Lead a prediction away from others, each with its scale: that under a negative prompt, where scale 3 is what others
    call a guidance of 4; that without a reminder."""
    return conditional + sum(scale * (conditional - other) for scale, other in away)


def kl_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """Gradient of the KL divergence at clips x [R, F, C, h, w], per sample of the size 1 / mean |x - real|.

    fake, real: the clean clips that the two scores predict. Where a sample is what the real score predicts to the last
    digit, nothing is left to follow: 0."""
    size = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake - real) / size)


def matching_loss(x: Tensor, gradient: Tensor, counts: Tensor | None = None) -> Tensor:
    """A loss whose gradient at x is proportional to `gradient`: 0.5 mean (x - sg(x - gradient))^2, in float64.

    counts [R, F] says how much each latent frame counts, all alike if None."""
    target = (x.double() - gradient.double()).detach()
    return 0.5 * _mean((x.double() - target).square(), counts)


def flow_loss(flow: Tensor, x: Tensor, noise: Tensor, counts: Tensor | None = None) -> Tensor:
    """Squared error of a predicted flow against noise - x, the critic's loss; counts [R, F] as in `matching_loss`."""
    return _mean((flow.float() - (noise - x).float()).square(), counts)


def _mean(error: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of error [R, F, C, h, w] over everything, each latent frame as often as it counts."""
    if counts is None:
        return error.mean()
    weight = counts.to(error.dtype)
    return (error.mean((2, 3, 4)) * weight).sum() / weight.sum()


def score_timesteps(drawn: Tensor, schedule: FlowSchedule, lowest: float = 20.0, highest: float = 980.0) -> Tensor:
    """Warp timesteps drawn evenly from 0 to 999 as the sampler's are, and keep them off both ends."""
    return (schedule.warp(drawn.float() / 1000) * 1000).clamp(lowest, highest)


# how a score network is shown a clip


class View(Protocol):
    """What of a clip is scored as one sample, and what a network sees beside it."""

    def rows(self, clip: Clip) -> Tensor:
        """The samples [R, F, C, h, w] of a clip, with its gradients."""
        ...

    def counts(self, clip: Clip) -> Tensor | None:
        """How much each latent frame [R, F] counts, None for all alike."""
        ...

    def prompts(self, clip: Clip) -> list[str]:
        """One prompt per row."""
        ...

    def flow(
        self,
        network: Cast,
        text: Lines,
        clip: Clip,
        noisy: Tensor,
        timesteps: Tensor,
        negative: Sequence[str] | None,
        past: Tensor,
    ) -> Tensor:
        """The network's flow for noised rows at timesteps [R]; negative: prompts in place of the rows' own.

        past: noise for what is shown as a past, in the shape of `past_shape`."""
        ...

    def past_shape(self, clip: Clip) -> tuple[int, ...]: ...


def text_keys(network: Cast, text: Lines, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the keys and values [R, L, H, D] of one prompt per row; each prompt is projected once."""
    unique = list(dict.fromkeys(prompts))
    which = torch.tensor([unique.index(prompt) for prompt in prompts], device=network.patch_embedding.weight.device)
    return [(k[which], v[which]) for k, v in network.text_keys(text.embed(unique)[0])]


@dataclass(frozen=True)
class Joint:
    """Whole clips, all latent frames seeing each other at one noise level: bidirectional networks (Self-Forcing).

    Each row has the prompt of its last chunk; frames of the past are noised and seen like the others, and do not count.
    """

    def rows(self, clip: Clip) -> Tensor:
        return clip.latents

    def counts(self, clip: Clip) -> Tensor | None:
        if not clip.past:
            return None
        counts = torch.arange(clip.latents.shape[1], device=clip.latents.device) >= clip.past
        return counts.expand(len(clip.latents), -1)

    def prompts(self, clip: Clip) -> list[str]:
        return clip.prompts[-1]

    def past_shape(self, clip: Clip) -> tuple[int, ...]:
        return (0,)

    def flow(
        self,
        network: Cast,
        text: Lines,
        clip: Clip,
        noisy: Tensor,
        timesteps: Tensor,
        negative: Sequence[str] | None,
        past: Tensor,
    ) -> Tensor:
        prompts = self.prompts(clip) if negative is None else negative
        frames = torch.arange(noisy.shape[1], device=noisy.device)
        steps = timesteps[:, None].expand(noisy.shape[:2])
        return network(noisy, steps, text_keys(network, text, prompts), frames)[0]


@dataclass(frozen=True)
class Causal:
    """Chunks one by one, each seeing the clean chunks before it: causal networks (`training/flow.py`).

    Every chunk is a sample with a noise level of its own. It sees itself, `seen` chunks before it and the stream's first
    chunk, which stands just before the clip where it is further away. What is seen carries `context_noise` (sigma), as in
    a stream. The KL divergence of whole videos is the sum of those of chunks given their past, so nothing is lost but
    what a joint score would say against the past itself.
    """

    length: int = 3
    seen: int = 2
    context_noise: float = 0.0
    reminder_weight: float = 1.0  # how often a chunk counts in which somebody returns

    def rows(self, clip: Clip) -> Tensor:
        return clip.new.unflatten(1, (-1, self.length)).flatten(0, 1)

    def counts(self, clip: Clip) -> Tensor | None:
        reminders = self._reminders(clip)
        if not reminders or self.reminder_weight == 1:
            return None
        first, made = clip.past // self.length, clip.new.shape[1] // self.length
        counts = torch.ones(len(clip.latents), made, self.length, device=clip.latents.device)
        for row, chunk, *_ in reminders:
            counts[row, chunk - first] = self.reminder_weight
        return counts.flatten(0, 1)

    def prompts(self, clip: Clip) -> list[str]:
        made = clip.prompts[clip.past // self.length :]
        return [chunk[row] for row in range(len(clip.latents)) for chunk in made]

    def prompts_before(self, clip: Clip) -> list[str]:
        """Per row the prompt of the chunk before, its own where there is none."""
        first = clip.past // self.length
        before = [clip.prompts[max(0, k - 1)] for k in range(first, len(clip.prompts))]
        return [chunk[row] for row in range(len(clip.latents)) for chunk in before]

    def past_shape(self, clip: Clip) -> tuple[int, ...]:
        batch, frames = clip.latents.shape[:2]
        clean = batch * (frames // self.length - (clip.start == 0)) + len(self._reminders(clip))
        return (clean, self.length, *clip.latents.shape[2:])

    def _reminders(self, clip: Clip) -> list[tuple[int, int, Tensor, str]]:
        return [(row, k, x, told) for row, found in enumerate(clip.reminders) for k, (x, told) in found.items()]

    def flow(
        self,
        network: Cast,
        text: Lines,
        clip: Clip,
        noisy: Tensor,
        timesteps: Tensor,
        negative: Sequence[str] | None,
        past: Tensor,
    ) -> Tensor:
        """Rows of one pass: per stream the clean chunks that others see, then all noised ones."""
        device, batch, length = noisy.device, len(clip.latents), self.length
        chunks = clip.latents.detach().unflatten(1, (-1, length))  # [B, K, F, C, h, w]
        starts = clip.start + length * torch.arange(chunks.shape[1], device=device)
        shown, places, told = chunks[:, :-1], starts[:-1], clip.prompts[:-1]
        if clip.start:  # the stream's first chunk, just before the clip
            shown = torch.cat((clip.first[:, None], shown), 1)
            places, told = torch.cat((starts[:1] - length, places)), [clip.opening, *told]
        reminders = self._reminders(clip)
        # two chunks before the clip, where transformers meet a distant chunk in training
        clean = torch.cat((shown.flatten(0, 1), *(x[None] for _, _, x, _ in reminders)))
        if self.context_noise:
            clean = add_noise(clean, past, self.context_noise)
        far = (starts[:1] - 2 * length).expand(len(reminders))
        frames = torch.cat((places.repeat(batch), far, starts[clip.past // length :].repeat(batch)))
        own = self.prompts(clip) if negative is None else list(negative)
        prompts = [chunk[row] for row in range(batch) for chunk in told] + [told for *_, told in reminders] + own
        levels = torch.cat((timesteps.new_full((len(clean),), self.context_noise * 1000), timesteps))
        cell = network.config.patch[1] * network.config.patch[2]
        flow, _ = network(
            torch.cat((clean, noisy)),
            levels[:, None].expand(-1, length),
            text_keys(network, text, prompts),
            frames[:, None] + torch.arange(length, device=device),
            Rows(self.table(clip).to(device), noisy[0, :, 0].numel() // cell),
        )
        return flow[len(clean) :]

    def table(self, clip: Clip) -> Tensor:
        """Which clean rows each row of a pass sees, -1 for none: [clean rows + noised rows, at most 2 + seen]."""
        count, opened = clip.latents.shape[1] // self.length, clip.start > 0
        per_stream = count - 1 + opened  # clean rows

        def sees(base: int, chunk: int) -> list[int]:
            near = [base + opened + k if k >= 0 else -1 for k in range(chunk - self.seen, chunk)]
            # row `base` is the stream's first chunk; where the clip begins with it, the near ones may hold it already
            return [base if opened or chunk > self.seen else -1, *near]

        streams = range(len(clip.latents))
        reminders = self._reminders(clip)
        reminded = {(row, k): len(streams) * per_stream + i for i, (row, k, *_) in enumerate(reminders)}
        rows = []
        for stream in streams:
            rows += [[-1] * (1 + self.seen)] * opened
            rows += [sees(stream * per_stream, chunk) for chunk in range(count - 1)]
        rows = [[*row, -1] for row in rows] + [[-1] * (2 + self.seen)] * len(reminders)
        for stream in streams:
            for chunk in range(clip.past // self.length, count):
                rows.append([*sees(stream * per_stream, chunk), reminded.get((stream, chunk), -1)])
        table = torch.tensor(rows)
        return table[:, (table >= 0).any(0)]


# the two together


@dataclass(frozen=True)
class Noised:
    """A clip's rows with noise of a drawn level on them."""

    rows: Tensor  # with the clip's gradients
    noisy: Tensor
    noise: Tensor
    timesteps: Tensor  # [R]
    past: Tensor  # noise for what is shown as a past


def noised(clip: Clip, view: View, schedule: FlowSchedule, random: torch.Generator, **ends: float) -> Noised:
    """Draw a noise level for every row, and the noise."""
    rows = view.rows(clip)
    device = rows.device
    drawn = torch.randint(0, 1000, (len(rows),), generator=random)
    timesteps = score_timesteps(drawn, schedule, **ends).to(device)
    noise = torch.randn(rows.shape, generator=random).to(device)
    past = torch.randn(view.past_shape(clip), generator=random).to(device)
    noisy = add_noise(rows.detach(), noise, schedule.sigma(timesteps))
    return Noised(rows, noisy, noise, timesteps, past)


def predicted(
    network: Cast,
    view: View,
    text: Lines,
    clip: Clip,
    given: Noised,
    schedule: FlowSchedule,
    negative: Sequence[str] | None = None,
) -> Tensor:
    """The clean rows that a score network predicts; schedule: the table in which it looks its noise levels up."""
    flow = view.flow(network, text, clip, given.noisy, given.timesteps, negative, given.past)
    return flow_to_x0(flow, given.noisy, schedule.sigma(given.timesteps))
