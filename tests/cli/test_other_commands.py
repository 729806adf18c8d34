"""doctor and train."""

import torch

TOY = """
import torch
from torch import nn
from slotmemory.training import loop
from slotmemory.training.recipe import Frozen

class Options(Frozen):
    size: int = 2

class Objective(loop.Objective):
    def __init__(self, options, context):
        self.layer = nn.Linear(options.size, 1)

    def modules(self):
        return {"layer": self.layer}

    def loss(self, step, rank, generator):
        return self.layer(torch.randn(4, self.layer.in_features, generator=generator)).square().mean(), {}
"""


def test_doctor_names_versions_device_and_weights(slotmemory, model):
    done = slotmemory("doctor", "--model", model)
    assert done.status == 0
    for text in (torch.__version__, "device", "natively", "threads", str(model), "checksum"):
        assert text in done.out


def test_doctor_says_what_is_wrong_with_the_weights(slotmemory, tmp_path):
    (tmp_path / "model").mkdir()
    done = slotmemory("doctor", "--model", "model")
    assert done.status == 2 and "not usable" in done.out and "holds no transformer: expected model.json" in done.err


def test_train_goes_on_where_it_ended_and_fresh_refuses(slotmemory, tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text("objective: toy.py\nsteps: 2\nbatch: 4\n")
    done = slotmemory("train", "toy.yaml", "--out", "run")
    assert done.status == 0 and "run/weights" in done.out, done.err
    done = slotmemory("train", "toy.yaml", "--out", "run", "--set", "steps=5", "--set", "optimizer.clip=0.5")
    assert done.status == 0, done.err
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in range(1, 6)]
    done = slotmemory("train", "toy.yaml", "--out", "run", "--fresh")
    assert done.status == 2 and "run holds a run already" in done.err
    done = slotmemory("train", "toy.yaml", "--out", "run", "--set", "optimizer.clipp=1")
    assert done.status == 2 and "did you mean 'clip'?" in done.err
