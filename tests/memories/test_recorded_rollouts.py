"""Published rollouts are reproduced in fp32 by the session loop with the `window` and `sink` memories."""

import pytest
import torch

from slotmemory import memory
from slotmemory.engine import Engine
from slotmemory.sampler import FewStep
from slotmemory.session import Session
from tests.memories.rollouts import (
    CLOSE,
    FOUR,
    LAYOUT,
    TWO,
    NoCodec,
    RecordedNoise,
    RecordedText,
    Recorder,
    cache_of,
    roll,
)
from tests.recorded import facts, tensors


@pytest.mark.parametrize(
    "fixture, name, policy, options, steps, prompt",
    [
        ("causal_rollout_selfforcing", "global", "window", dict(window=21), FOUR, "p0"),
        ("causal_rollout_selfforcing", "global", "everything", {}, FOUR, "p0"),
        ("causal_rollout_selfforcing", "window", "window", dict(window=6), FOUR, "p0"),
        ("causal_rollout_selfforcing", "window_sink", "sink", dict(sink=3, window=9), TWO, "p1"),
        ("longlive_sink_rollout", "rollout", "sink", dict(sink=3, window=9), FOUR, "p0"),
        ("longlive_sink_rollout", "infinite", "sink", dict(sink=3, window=9, placing="relative"), TWO, "p2"),
    ],
)
def test_single_prompt_rollouts_equal_the_published_ones(fixture, name, policy, options, steps, prompt):
    g = tensors(fixture)
    frames = facts(fixture)["scenarios"][name]["frames"]
    session, latents, flows = roll(policy, steps, frames, {0: prompt}, **options)
    torch.testing.assert_close(latents, g[f"{name}.latents"], **CLOSE)
    torch.testing.assert_close(torch.stack(flows).view(g[f"{name}.flow"].shape), g[f"{name}.flow"], **CLOSE)


def test_the_sink_bank_holds_what_the_published_cache_holds():
    g = tensors("longlive_sink_rollout")
    session, *_ = roll("sink", FOUR, 21, {0: "p0"}, sink=3, window=9)
    keys, values = cache_of(session, ["sink", "window"])
    # the published cache still holds the window's oldest block, which the next block evicts before anybody reads it
    held = torch.cat((torch.arange(36), torch.arange(72, 108)))
    torch.testing.assert_close(keys, g["rollout.cache_k"][:, :, held], **CLOSE)
    torch.testing.assert_close(values, g["rollout.cache_v"][:, :, held], **CLOSE)


@pytest.mark.parametrize(
    "name, prompts, options",
    [
        ("switch_global_sink", {0: "p0", 2: "p1", 6: "p2"}, dict(global_sink=True, compat="longlive")),
        ("switch_reset", {0: "p1", 6: "p0"}, dict(global_sink=False)),
    ],
)
def test_prompt_switches_with_recache_equal_the_published_ones(name, prompts, options):
    g = tensors("longlive_sink_rollout")
    session, latents, flows = roll("sink", TWO, 24, prompts, sink=3, window=9, recache=True, **options)
    torch.testing.assert_close(latents, g[f"{name}.latents"], **CLOSE)
    recached = [flow for flow in flows if flow.shape[1] != 3]
    for number, flow in enumerate(recached):
        # of a full window, the published program recomputes the sink's worth of frames too and drops their keys
        torch.testing.assert_close(flow, g[f"{name}.recache{number}.flow"][:, -flow.shape[1] :], **CLOSE)


def test_known_latents_pushed_first_equal_the_published_video_continuation():
    g = tensors("causal_rollout_selfforcing")
    known = g["v2v.initial_latent"]
    policy = memory.build("window", LAYOUT, window=21)
    engine = Engine(Recorder(), NoCodec(), RecordedText(), FewStep(TWO), policy, LAYOUT)
    session = Session(engine, {0: "p2"}, 2, noise=RecordedNoise())
    session.prefill(known)
    torch.testing.assert_close(engine.backbone.flows[0], g["v2v.initial.flow"], **CLOSE)
    latents = torch.cat([known, *[chunk.latents for chunk in session]], 1)
    torch.testing.assert_close(latents, g["v2v.latents"], **CLOSE)
