"""Compiled regions of the blocks: used while they compute what the blocks compute, left out with a message otherwise."""

import shutil
from functools import partial

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounter

from slotmemory.backbones import compiled
from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.backbones.compiled import compile_blocks, deviation
from slotmemory.backbones.quantise import quantise
from slotmemory.engine import Engine
from tests import checkpoints_for_tests as tiny
from tests.models_for_tests import write_model


def model(dtype=torch.float32):
    made = CausalWan(tiny.CONFIG)
    made.load_state_dict(tiny.transformer())
    return made.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def flow(made, frames=3):
    generator = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(*shape, generator=generator) for shape in ((1, frames, 16, 4, 4), (1, 5, tiny.CONFIG.text_dim))
    )
    return made(x, torch.full((1, frames), 500.0), made.text_keys(text), torch.arange(frames))[0]


def text_of(caplog):
    """What the product said; torch's compiler talks too."""
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("slotmemory"))


def changed(how):
    """A compiler whose results are changed by `how(tensor)`."""

    def compiler(function):
        def run(*given):
            made = function(*given)
            return (how(made[0]), *made[1:])

        return run

    return compiler


def test_one_compilation_serves_all_blocks_and_every_step():
    expected, counter, made = flow(model()), CompileCounter(), model()
    torch._dynamo.reset()
    regions = compile_blocks(made, partial(torch.compile, backend=counter, fullgraph=True))
    for _ in range(2):
        assert torch.equal(flow(made), expected)
    assert counter.frame_count == 2 < 2 * len(made.blocks) and not any(region.dropped for region in regions)
    assert set(made.state_dict()) == set(model().state_dict())


@pytest.mark.parametrize(
    "how, said",
    [
        (lambda x: x * 1.1, "is off by 1.0e-01 of its length (limit 1e-03)"),
        (lambda x: x * float("nan"), "is off by nan"),
        (lambda x: torch.cat((x[:, :1] * 2, x[:, 1:]), 1), "is off by 1.0e+00"),
    ],
    ids=["all of it", "no number", "one row"],
)
def test_a_region_that_disagrees_is_left_out_with_a_message(caplog, how, said):
    expected, made = flow(model()), model()
    regions = compile_blocks(made, changed(how))
    assert torch.equal(flow(made), expected) and all(region.dropped for region in regions)
    assert "the region 'enter' of the blocks compiled" in text_of(caplog) and said in text_of(caplog)
    assert text_of(caplog).count("it runs as it is") == 2  # once per region, not once per block


def test_where_nothing_can_be_compiled_the_blocks_run_as_they_are(caplog):
    def compiler(function):
        def run(*given):
            raise RuntimeError("\nno compiler found\nat all")

        return run

    expected, made = flow(model()), model()
    compile_blocks(made, compiler)
    assert torch.equal(flow(made), expected)
    assert "cannot be compiled here (RuntimeError: no compiler found)" in text_of(caplog)


def test_every_new_shape_is_compared(caplog):
    made = model()
    compile_blocks(made, changed(lambda x: x * 2 if x.shape[1] == 2 * 4 or x.shape[1] == 2 else x))
    flow(made)
    assert not text_of(caplog)
    assert torch.equal(flow(made, 2), flow(model(), 2)) and "is off by" in text_of(caplog)


def test_what_is_trained_is_not_compiled():
    made = model()
    compile_blocks(made, lambda function: pytest.fail)
    x, text = torch.zeros(1, 1, 16, 4, 4), torch.zeros(1, 5, tiny.CONFIG.text_dim)
    with torch.enable_grad():
        made(x, torch.zeros(1, 1), made.text_keys(text), torch.arange(1))


def test_rows_count_by_their_share_and_short_ones_by_the_mean():
    base = torch.ones(1, 2, 4)
    base[0, 1] = 1e-6
    off = base.clone()
    off[0, 1] += 1e-3
    assert deviation([off], [base]) == pytest.approx(2e-3, rel=0.1)
    assert deviation((base * 1.5,), (base,)) == pytest.approx(0.5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for processors")
def test_a_stream_of_compiled_blocks_is_the_stream_of_the_blocks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "REGIONS", ("enter",))  # one is enough to see that a compiler's work is used
    monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)
    caplog.set_level("WARNING", "slotmemory")
    name = str(write_model(tmp_path / "micro"))
    made = []
    for compile in (False, True):
        engine = Engine.from_pretrained(name, "sink", dtype=torch.float32, compile=compile)
        session = engine.session({0: "A red cat walks in the meadow."}, 0)
        made.append(torch.cat([session.step().latents for _ in range(2)], 1))
    assert not [record for record in caplog.records if record.name.startswith("slotmemory")]
    assert not engine.backbone.blocks[0].enter.func.dropped
    torch.testing.assert_close(made[1], made[0], atol=1e-3, rtol=1e-3)


def test_rounded_weights_compile_too():
    pytest.importorskip("torchao", reason="eight-bit weights need torchao: pip install 'slotmemory[quant]'")
    made = model(torch.bfloat16)
    quantise(made, "int8")
    expected = flow(made)
    torch._dynamo.reset()
    regions = compile_blocks(made, partial(torch.compile, backend="eager"))
    assert torch.equal(flow(made), expected) and not any(region.dropped for region in regions)
