"""The schedule, its conversions and the samplers compute the published numbers."""

import pytest
import torch

from slotmemory.sampler import Euler, FewStep, FlowSchedule, add_noise, euler_step, flow_to_x0, x0_to_flow
from tests.recorded import tensors


@pytest.mark.parametrize("shift", [5, 8])
def test_tables_and_warped_steps_equal_the_published_ones(shift):
    g, schedule = tensors("scheduler"), FlowSchedule(shift)
    torch.testing.assert_close(schedule.sigmas, g[f"shift{shift}.sigmas"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(schedule.timesteps, g[f"shift{shift}.timesteps"], rtol=0, atol=1e-3)
    for name, steps in (
        ("4step", [1000, 750, 500, 250]),
        ("6step", [1000, 800, 600, 400, 200, 100]),
        ("with0", [1000, 500, 0]),
    ):
        expected = g[f"shift{shift}.warped_{name}"]
        torch.testing.assert_close(torch.tensor(schedule.few_step(steps)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", [5, 8])
def test_conversions_equal_the_published_ones(shift):
    g, schedule = tensors("scheduler"), FlowSchedule(shift)
    close = dict(atol=1e-5, rtol=1e-5)
    sigma = schedule.sigma(g["timestep"])
    torch.testing.assert_close(add_noise(g["x0"], g["noise"], sigma), g[f"shift{shift}.add_noise"], **close)
    torch.testing.assert_close(flow_to_x0(g["flow"], g["x0"], sigma), g[f"shift{shift}.flow_to_x0"], **close)
    sigma = schedule.sigma(g["timestep_nonzero"])
    torch.testing.assert_close(x0_to_flow(g["flow"], g["x0"], sigma), g[f"shift{shift}.x0_to_flow"], **close)
    sigma = schedule.sigma(g["timestep"])
    torch.testing.assert_close(euler_step(g["flow"], g["x0"], sigma, 0.0), g[f"shift{shift}.step_to_final"], **close)


def test_both_samplers_find_a_target_that_the_model_knows():
    target = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    for sampler in (FewStep(), Euler(count=8)):
        sigma = sampler.schedule.sigma

        def predict(x, t, sigma=sigma):
            return (x - target) / max(float(sigma(t)), 1e-6)

        out = sampler.denoise(predict, noise, lambda: torch.randn(target.shape))
        torch.testing.assert_close(out, target, atol=1e-3, rtol=1e-3)


def test_impossible_steps_are_refused():
    with pytest.raises(ValueError, match="from 1000 down to 0"):
        FlowSchedule().few_step([1200, 3])
