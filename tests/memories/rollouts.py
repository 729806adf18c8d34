"""The published rollouts replayed through the session loop: recorded model, texts and noise, any memory."""

import torch

from slotmemory import memory
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.engine import Engine
from slotmemory.layout import Layout
from slotmemory.sampler import FewStep
from slotmemory.session import Session
from tests.recorded import tensors, wan

CLOSE = dict(atol=1e-4, rtol=1e-4)
LAYOUT = Layout(64, 48, layers=2, heads=4, head_dim=20, text_tokens=16)


class RecordedText:
    def encode(self, prompts):
        embeddings = torch.cat([tensors("causal_inputs")[p.replace("p", "prompt")] for p in prompts])
        return embeddings, torch.full((len(prompts),), embeddings.shape[1])

    def check(self, prompt):
        pass


class RecordedNoise:
    """Initial noise frame by frame, and the draws between steps in call order."""

    def __init__(self):
        self.used = self.drawn = 0

    def first(self, shape):
        self.used += shape[1]
        return tensors("causal_inputs")["noise"][self.used - shape[1] : self.used].transpose(0, 1)

    def fresh(self, shape):
        self.drawn += 1
        return tensors("causal_inputs")["renoise"][None, self.drawn - 1]

    def state(self):
        return self.used, self.drawn

    def restore(self, state):
        self.used, self.drawn = state


class NoCodec:
    dtype = torch.float32

    def start(self):
        return {}

    def push(self, latents, state):
        return latents[:, :, :3], state


class Recorder(torch.nn.Module):
    """The recorded model, remembering every flow it predicted."""

    def __init__(self):
        super().__init__()
        self.model, self.flows = wan(), []
        self.patch_embedding, self.dtype, self.text_keys = (
            self.model.patch_embedding,
            torch.float32,
            self.model.text_keys,
        )

    def forward(self, *inputs):
        flow, seen = self.model(*inputs)
        self.flows.append(flow)
        return flow, seen


def roll(name, steps, frames, prompts, **options):
    policy = memory.build(name, LAYOUT, **options)
    engine = Engine(Recorder(), NoCodec(), RecordedText(), FewStep(steps), policy, LAYOUT)
    session = Session(engine, prompts, frames // 3, noise=RecordedNoise())
    latents = torch.cat([chunk.latents for chunk in session], 1)
    return session, latents, engine.backbone.flows


def cache_of(session, banks, native=True):
    """What the published programs would hold: rotated keys (or raw ones) and values, [layers, B, N, H, D]."""
    keys, values = [], []
    for layer in range(2):
        found = [session.state[name][layer] for name in banks]
        k = torch.cat([bank.keys.flatten(1, 2) for bank in found], 1)
        if native:
            k = rotate(k, *rotation(torch.cat([bank.positions.flatten(1, 2) for bank in found], 1), 20))
        keys.append(k)
        values.append(torch.cat([bank.values.flatten(1, 2) for bank in found], 1))
    return torch.stack(keys), torch.stack(values)


FOUR, TWO = (1000, 750, 500, 250), (1000, 500)


def stepped(name, steps, frames, prompts, **options):
    """Roll chunk by chunk: the latents, the state after each chunk, and every flow."""
    policy = memory.build(name, LAYOUT, **options)
    engine = Engine(Recorder(), NoCodec(), RecordedText(), FewStep(steps), policy, LAYOUT)
    session = Session(engine, prompts, frames // 3, noise=RecordedNoise())
    latents, states = [], []
    for chunk in session:
        latents.append(chunk.latents)
        states.append(session.state)
    return torch.cat(latents, 1), states, engine.backbone.flows


def rotated_keys(bank):
    """A bank's keys as the published programs cache them: rotated at the latent frames they were made for."""
    return rotate(bank.keys.flatten(1, 2), *rotation(bank.positions.flatten(1, 2), LAYOUT.head_dim))
