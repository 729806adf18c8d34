"""A toy objective: fit a linear map; sample i of step s is the same however many processes share the step."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

from slotmemory.training import loop
from slotmemory.training.recipe import Frozen


class Options(Frozen):
    crash_step: int | None = None
    nan_step: int | None = None
    nan_rank: int = 0
    signal_step: int | None = None
    noise: float = 0.0
    width: int = 6


class Objective(loop.Objective):
    def __init__(self, options, context):
        self.options, self.context = options, context
        self.net = nn.Sequential(nn.Linear(6, options.width), nn.Tanh(), nn.Linear(options.width, 3))
        self.net.register_buffer("seen", torch.zeros(1))

    def modules(self):
        return {"net": self.net}

    def running(self):
        return [self.net.seen]

    def metadata(self, module):
        return {"kind": "toy"}

    def loss(self, step, rank, generator):
        if step == self.options.crash_step:
            raise KeyboardInterrupt
        if step == self.options.signal_step and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        first = rank * self.context.batch
        x = torch.stack(
            [
                torch.randn(6, generator=torch.Generator().manual_seed(loop.seed_for(step, first + i)))
                for i in range(self.context.batch)
            ]
        )
        target = x[:, :3].cumsum(1)
        x = x + self.options.noise * torch.randn(x.shape, generator=generator)
        output = loop.cast_call(self.net, self.context.dtype, x.to(self.context.dtype)).float()
        fit = (output - target).square().mean()
        shrink = 0.01 * output.square().mean()
        if step == self.options.nan_step and rank == self.options.nan_rank:
            shrink = shrink * float("nan")
        self.net.seen = self.net.seen + x.mean().detach()
        return fit + shrink, {"fit": fit, "shrink": shrink}

    def validate(self, step):
        return {"first": float(self.net[0].weight[0, 0])}

    def sample(self, step, folder):
        (folder / "note.txt").write_text(str(step))
