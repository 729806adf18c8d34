"""The full-size benchmark at its smallest: it measures, keeps what it measured, goes on, and refuses what cannot fit."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")

from benchmarks import full_size  # noqa: E402

from slotmemory.backbones.causal_wan import CausalWan  # noqa: E402
from slotmemory.bench.machine import operations  # noqa: E402
from slotmemory.cli import fit  # noqa: E402


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Run the benchmark: call(words...) -> status, the report, what was said; `call.measured` lists memories."""
    path, measured, measure = tmp_path / "report.json", [], full_size.measure

    def counted(engine, *given):
        measured.append(engine.memory.called())
        return measure(engine, *given)

    monkeypatch.setattr(full_size, "measure", counted)

    def run(*words):
        fixed = "--size tiny --width 32 --height 32 --seconds 1.5 --steps 1000 --undecoded 1 --dtype fp32 --device cpu"
        status = full_size.main([*fixed.split(), "--out", str(path), *words])
        said = "".join(capfd.readouterr())
        return status, json.loads(path.read_text()) if path.exists() else None, said

    run.measured, run.path = measured, path
    return run


def test_memories_are_measured_written_down_and_not_measured_again(call):
    status, report, said = call("--memories", "sink")
    assert status == 0 and list(report["memories"]) == ["none", "sink"]
    none, sink = report["memories"].values()
    assert none["frames"] == sink["frames"] == 4 * (3 * none["video_chunks"] - 1) + 1
    assert (none["tokens_read"], sink["tokens_read"]) == (0, 3 * 4)
    assert sink["operations_per_chunk"] > none["operations_per_chunk"] > 0 < report["matrix_rate"]
    for row in (none, sink):
        assert (
            row["undecoded_ms"] > 0
            and row["peak"]["device"] is None
            and row["chunk_ms"]["p95"] >= row["chunk_ms"]["p50"]
        )
        assert (
            0 < row["share_with_decode"]
            and 0 < row["share"] < 1
            and row["first_frame_ms"] == pytest.approx(row["all_ms"][0], abs=1e-3)
        )
    assert "frames/s" in said and " x, " in said

    status, again, _ = call("--memories", "window")
    assert status == 0 and call.measured == ["none", "sink", "window"]
    assert again["memories"]["none"] == none and set(again["memories"]) == {"none", "sink", "window"}
    status, _, said = call("--memories", "window", "--steps", "1000,500")
    assert status == 2 and "was measured with steps=1000, now steps=1000,500; choose another --out" in said


def test_a_kill_loses_nothing_that_was_measured(call, monkeypatch):
    measure = full_size.measure

    def killed(engine, *given):
        if engine.memory.called() == "sink":
            raise KeyboardInterrupt
        return measure(engine, *given)

    monkeypatch.setattr(full_size, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        call("--memories", "sink")
    assert list(json.loads(call.path.read_text())["memories"]) == ["none"]


def test_what_cannot_fit_is_refused_before_it_is_made(call, monkeypatch):
    monkeypatch.setattr(full_size, "measure", lambda *_: pytest.fail("it was made"))
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1000)
    status, report, said = call()
    assert (status, report) == (2, None) and "without a memory needs about" in said and "1 kB are free" in said


def test_a_memory_that_does_not_fit_is_passed_over_with_its_reason(call, monkeypatch):
    row = {"frames": 1}
    monkeypatch.setattr(full_size, "measure", lambda *_: row)
    monkeypatch.setattr(full_size, "table", lambda report: [])
    monkeypatch.setattr(full_size, "refusal", lambda found, dtype: "too large" if found.footprint.tokens else None)
    _, report, _ = call("--memories", "sink,everything")
    assert report["memories"] == {"none": row, "sink": {"refused": "too large"}, "everything": {"refused": "too large"}}


def test_an_unknown_memory_is_refused(call):
    status, _, said = call("--memories", "snik")
    assert status == 2 and "unknown memory 'snik'; did you mean 'sink'" in said


@torch.no_grad()
def test_operations_are_those_that_the_transformer_does():
    config = full_size.SIZES["tiny"].config
    model = full_size.randomised(CausalWan(config))
    text = model.text_keys(torch.randn(1, config.text_len, config.text_dim))
    embedding = sum(
        2 * 3 * a * b
        for a, b in ((config.freq_dim, config.dim), (config.dim, config.dim), (config.dim, 6 * config.dim))
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 16, 8, 12), torch.zeros(1, 3), text, torch.arange(3))
    tokens = 3 * 4 * 6
    assert counter.get_total_flops() - embedding == operations(config, tokens, 0, 1)  # of timesteps: one row per frame
    assert (
        operations(config, tokens, 10, 1) - operations(config, tokens, 0, 1)
        == 4 * config.num_layers * tokens * 10 * config.dim
    )
