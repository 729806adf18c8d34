"""Eight-bit weights: half the bytes, nearly the same flow, and a message where they cannot be had."""

import pytest
import torch

from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.backbones.quantise import KINDS, quantise
from slotmemory.checkpoints.lora import Adapter, Lora, Pair
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.footprint import bytes_of
from tests import checkpoints_for_tests as tiny
from tests.models_for_tests import write_model

pytest.importorskip("torchao", reason="eight-bit weights need torchao: pip install 'slotmemory[quant]'")


def model(kind=None):
    made = CausalWan(tiny.CONFIG)
    made.load_state_dict(tiny.transformer())
    made = made.to(torch.bfloat16).eval().requires_grad_(False)
    if kind:
        quantise(made, kind)
    return made


@torch.no_grad()
def flow(made):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(*shape, generator=generator) for shape in ((1, 3, 16, 4, 4), (1, 5, tiny.CONFIG.text_dim)))
    return made(x, torch.full((1, 3), 500.0), made.text_keys(text), torch.arange(3))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_halve_and_the_flow_hardly_moves(kind):
    plain, small = model(), model(kind)
    assert bytes_of(small.blocks.parameters()) < 0.55 * bytes_of(plain.blocks.parameters())
    assert bytes_of(small.head.parameters()) == bytes_of(plain.head.parameters())
    expected, found = flow(plain), flow(small)
    assert 0 < float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_an_adapter_stays_switchable_on_rounded_weights():
    made = model("int8")
    before = flow(made)
    pair = Pair(torch.ones(1, tiny.CONFIG.dim), torch.ones(tiny.CONFIG.dim, 1), 1.0)
    adapter = Adapter(made, Lora({"blocks.0.self_attn.o": pair}), 0.1)
    assert not torch.equal(flow(made), before)
    adapter.scale = 0
    assert torch.equal(flow(made), before)


def test_shapes_tell_the_bytes_before_anything_is_loaded(tmp_path):
    from slotmemory.models import load

    name = str(write_model(tmp_path / "micro"))
    engine = Engine.from_pretrained(name, "sink", dtype=torch.bfloat16, quant="int8")
    shapes = load(name, torch.device("meta"), torch.bfloat16, "int8")
    sizes = [[bytes_of(m.parameters()) for m in each.modules] for each in (engine, shapes)]
    assert sizes[0] == sizes[1]
    session = engine.session({0: "A red cat walks in the meadow."}, 0)
    assert bool(torch.isfinite(session.step().latents).all())


def test_other_kinds_are_refused():
    with pytest.raises(InputError, match="unknown kind of eight bits 'int9'; did you mean 'int8'"):
        quantise(model(), "int9")
