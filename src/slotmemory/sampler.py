"""Flow matching: the noise schedule, its conversions, and the two ways to denoise a chunk. Pure functions of tensors.

x_t = (1 - sigma) x0 + sigma noise; the model predicts the flow noise - x0; timestep = 1000 sigma.
sigma(s) = shift s / (1 + (shift - 1) s) for s in (0, 1] (Wan: shift 5). Source: Self-Forcing `utils/scheduler.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Predict = Callable[[Tensor, float], Tensor]  # noisy latents, timestep -> flow
Draw = Callable[[], Tensor]  # -> fresh noise in the shape of the chunk


@dataclass(frozen=True)
class FlowSchedule:
    """The table of noise levels that all published checkpoints of the family look up."""

    shift: float = 5.0
    levels: int = 1000

    def warp(self, s: Tensor) -> Tensor:
        """Map even time s in [0, 1] to noise levels sigma."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    @cached_property
    def sigmas(self) -> Tensor:
        """[levels] fp32, from 1 downwards; the last entry is above 0."""
        return self.warp(torch.linspace(1.0, 0.0, self.levels + 1)[:-1])

    @cached_property
    def timesteps(self) -> Tensor:
        return self.sigmas * 1000

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Look up the nearest entry, as the checkpoints were trained: sigma(0) is the smallest level, not 0."""
        t = torch.as_tensor(timestep, dtype=torch.float32)
        nearest = (self.timesteps.to(t.device) - t.reshape(-1, 1)).abs().argmin(1)
        return self.sigmas.to(t.device)[nearest].view(t.shape)

    def few_step(self, steps: Sequence[int]) -> list[float]:
        """Warp a published few-step list, e.g. [1000, 750, 500, 250] -> 1000, 937.5, 833.33, 625."""
        bad = [s for s in steps if not 0 <= s <= 1000]
        if bad or not steps:
            raise ValueError(f"steps={list(steps)}: expected numbers from 1000 down to 0, such as 1000,750,500,250")
        table = torch.cat((self.timesteps, self.timesteps.new_zeros(1)))
        return [float(table[1000 - s]) for s in steps]

    def even_steps(self, count: int) -> list[float]:
        """Timesteps of a many-step solver: count points evenly spaced before the warp, from 1000 downwards."""
        return (self.warp(torch.linspace(1.0, 0.0, count + 1)[:-1]) * 1000).tolist()


def _per_row(sigma: Tensor | float, like: Tensor) -> Tensor:
    sigma = torch.as_tensor(sigma, device=like.device)
    return sigma.reshape(*sigma.shape, *([1] * (like.ndim - sigma.ndim)))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Mix in fp32: sigma broadcasts over x0's leading dimensions."""
    sigma = _per_row(sigma, x0).float()
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def flow_to_x0(flow: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = x_t - sigma v, in float64 (the published wrappers do, and few-step samplers amplify rounding)."""
    return (noisy.double() - _per_row(sigma, noisy).double() * flow.double()).to(flow.dtype)


def x0_to_flow(x0: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
    """v = (x_t - x0) / sigma, in float64; sigma must be above 0."""
    return ((noisy.double() - x0.double()) / _per_row(sigma, noisy).double()).to(x0.dtype)


def euler_step(flow: Tensor, noisy: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """One step of the probability-flow equation from sigma to next_sigma."""
    return noisy + flow * (_per_row(next_sigma, noisy) - _per_row(sigma, noisy)).to(noisy.dtype)


@dataclass(frozen=True)
class FewStep:
    """The sampler of distilled models: predict x0, add fresh noise at the next level, repeat."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    schedule: FlowSchedule = field(default_factory=FlowSchedule)

    @cached_property
    def timesteps(self) -> list[float]:
        return self.schedule.few_step(self.steps)

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        """noise [B, F, C, h, w] -> clean latents; draws fresh noise between steps, none after the last."""
        x = noise
        for i, t in enumerate(self.timesteps):
            if i:
                x = add_noise(x, draw(), self.schedule.sigma(t))
            x = flow_to_x0(predict(x, t), x, self.schedule.sigma(t))
        return x


@dataclass(frozen=True)
class Euler:
    """The sampler of undistilled models: many small steps along the flow."""

    count: int = 20
    schedule: FlowSchedule = field(default_factory=FlowSchedule)

    @cached_property
    def timesteps(self) -> list[float]:
        return self.schedule.even_steps(self.count)

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        x = noise
        for t, following in zip(self.timesteps, [*self.timesteps[1:], 0.0]):
            x = euler_step(predict(x, t), x, t / 1000, following / 1000)
        return x
