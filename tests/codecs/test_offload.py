"""A codec that rests elsewhere gives the codec's numbers, and is back where it rests after every verb."""

import pytest
import torch

from slotmemory.codecs.base import Codec
from slotmemory.codecs.offload import Offloaded
from slotmemory.codecs.preview import PreviewCodec, PreviewConfig

SIZES = PreviewConfig(
    patch=8, encoder_channels=(8, 8, 8), decoder_channels=(8, 8, 8, 8), blocks=(1, 1, 1), space=(False, False, False)
)


def codec():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = PreviewCodec(SIZES)
        torch.nn.init.normal_(made.decoder[-1].weight, std=0.1)
    return made.eval().requires_grad_(False)


def devices(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@torch.no_grad()
def test_it_is_the_codec_to_the_bit_through_every_verb():
    plain, away = codec(), Offloaded(codec(), "cpu")
    assert isinstance(away, Codec) and away.dtype == plain.dtype
    video = torch.rand(1, 9, 3, 16, 24) * 2 - 1
    latents = plain.encode(video)
    assert torch.equal(away.encode(video), latents) and torch.equal(away.decode(latents), plain.decode(latents))
    states = [plain.start(), away.start()]
    for part in latents.split(1, 1):
        (expected, states[0]), (found, states[1]) = plain.push(part, states[0]), away.push(part, states[1])
        assert torch.equal(found, expected)
    assert torch.equal(plain.feed(video, plain.start())[0], away.feed(video, away.start())[0])


@pytest.mark.parametrize("fails", [False, True])
def test_weights_visit_the_device_for_a_decode_and_rest_with_the_cache_otherwise(monkeypatch, fails):
    inner = codec()
    away, before, seen = Offloaded(inner, "meta"), {k: v.clone() for k, v in inner.state_dict().items()}, []

    def push(latents, state):
        seen.append((devices(inner), latents.device.type, {t.device.type for row in state.values() for t in row}))
        if fails:
            raise RuntimeError("no")
        return latents, {"decoder": [torch.zeros(1)]}

    monkeypatch.setattr(inner, "push", push)
    state = {"decoder": [torch.ones(2)]}
    try:
        video, state = away.push(torch.zeros(1, 1, 16, 2, 2), state)
        assert not fails and video.device.type == "meta" and state["decoder"][0].device.type == "cpu"
    except RuntimeError:
        assert fails
    assert seen == [({"meta"}, "meta", {"meta"})] and devices(away) == {"cpu"}
    assert all(torch.equal(inner.state_dict()[name], tensor) for name, tensor in before.items())
