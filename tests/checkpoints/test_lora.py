"""Adapters: the published numbers merged and unmerged, every layout that people share, and scales."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.checkpoints.lora import Adapter, merge, read_lora, to_tensors
from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny
from tests.recorded import tensors, wan

CLOSE = dict(atol=1e-4, rtol=1e-4)  # golden README
WEIGHTS = tiny.transformer()
PAIRS = tiny.lora(WEIGHTS)


def recorded_lora(folder):
    g = tensors("lora")
    pairs = {name.removeprefix("lora."): tensor for name, tensor in g.items() if name.startswith("lora.")}
    torch.save({"generator_lora": pairs, "critic_lora": {"x": torch.zeros(1)}, "step": 3000}, folder / "lora.pt")
    return read_lora(folder / "lora.pt")


@torch.no_grad()
def recorded_flows(model):
    """The four calls of the recording: two chunks, each noisy and then clean, over one cache."""
    g, empty = tensors("lora"), torch.zeros(1, 0, 4, 20)
    x, text = g["x"], model.text_keys(g["prompt"])
    context, flows = [(empty, empty)] * model.config.num_layers, []
    for start, noise in ((0, 937.5), (3, 625.0)):
        frames, pattern = torch.arange(start, start + 3), Buffered(context)
        for t in (noise, 0.0):
            flow, seen = model(x[:, start : start + 3], torch.full((1, 3), t), text, frames, pattern)
            flows.append(flow)
        turn = rotation(grid_positions(frames[None], 4, 3), 20)
        context = [
            (torch.cat((k, rotate(s.keys, *turn)), 1), torch.cat((v, s.values), 1)) for (k, v), s in zip(context, seen)
        ]
    return torch.stack(flows)


def copy_of_wan():
    model = CausalWan(wan().config)
    model.load_state_dict(tensors("causal_weights"))
    return model.eval().requires_grad_(False)


def test_flows_without_with_and_merged_adapter_equal_the_published_ones(tmp_path):
    g, lora, model = tensors("lora"), recorded_lora(tmp_path), copy_of_wan()
    assert (lora.rank, len(lora.pairs)) == (8, 20)
    torch.testing.assert_close(recorded_flows(model), g["flow_base"], **CLOSE)
    adapter = Adapter(model, lora)
    torch.testing.assert_close(recorded_flows(model), g["flow_lora"], **CLOSE)
    adapter.scale = 0
    torch.testing.assert_close(recorded_flows(model), g["flow_base"], **CLOSE)
    adapter.remove()
    merged = merge(model.state_dict(), lora)
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"):
        torch.testing.assert_close(merged[name], g[f"merged.{name}"], **CLOSE)
    model.load_state_dict(merged)
    torch.testing.assert_close(recorded_flows(model), g["flow_lora_merged"], **CLOSE)


def comfy(pairs):
    return {name.replace("base_model.model.", "diffusion_model."): tensor for name, tensor in pairs.items()}


def diffusers(pairs):
    return {
        "transformer." + tiny.diffusers_name(name.removeprefix("base_model.model.")): tensor
        for name, tensor in pairs.items()
    }


def kohya(pairs):
    found = {}
    for name, tensor in pairs.items():
        layer, half, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        found[
            "lora_unet_" + layer.replace(".", "_") + (".lora_down" if half == "lora_A" else ".lora_up") + ".weight"
        ] = tensor
    return found


def named(pairs):
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in pairs.items()}


@pytest.mark.parametrize("layout", [dict, comfy, diffusers, kohya, named], ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_adapter(tmp_path, layout):
    save_file(layout(PAIRS), tmp_path / "lora.safetensors")
    merged = merge(WEIGHTS, read_lora(tmp_path / "lora.safetensors"))
    expected = merge(WEIGHTS, read(tmp_path, PAIRS))
    assert all(torch.equal(merged[name], expected[name]) for name in WEIGHTS)
    changed = {name for name in WEIGHTS if not torch.equal(merged[name], WEIGHTS[name])}
    assert len(changed) == len(PAIRS) / 2


def read(folder, pairs, **config):
    folder = folder / "peft"
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(pairs, folder / "adapter_model.safetensors")
    return read_lora(folder / "adapter_model.safetensors")


def test_alpha_over_rank_scales_an_adapter_wherever_it_is_told(tmp_path):
    layer = "blocks.0.self_attn.q"
    full = read(tmp_path, PAIRS).pairs[layer]
    assert full.strength == 1  # rank 4, nothing told: alpha equals the rank
    assert read(tmp_path, PAIRS, lora_alpha=2, r=4).pairs[layer].strength == 0.5
    told = PAIRS | {f"base_model.model.{layer}.alpha": torch.tensor(12.0)}
    assert read(tmp_path, told, lora_alpha=2).pairs[layer].strength == 3


@torch.no_grad()
def test_a_switched_on_adapter_equals_a_merged_one_at_any_scale(tmp_path):
    lora = read(tmp_path, PAIRS, lora_alpha=2)
    text = torch.randn(1, 5, tiny.CONFIG.text_dim)
    x, t = torch.randn(1, 2, 16, 4, 4), torch.full((1, 2), 500.0)

    def flow(weights, switch=None):
        model = CausalWan(tiny.CONFIG)
        model.load_state_dict(weights)
        if switch is not None:
            Adapter(model, lora, switch)
        return model(x, t, model.text_keys(text), torch.arange(2))[0]

    base = flow(WEIGHTS)
    for scale in (1.0, -0.5):
        switched = flow(WEIGHTS, scale)
        torch.testing.assert_close(switched, flow(merge(WEIGHTS, lora, scale)), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(switched, base, atol=1e-3)
    assert torch.equal(flow(WEIGHTS, 0.0), base)


def test_two_adapters_add_up_and_leave_alone(tmp_path):
    model = CausalWan(tiny.CONFIG)
    model.load_state_dict(WEIGHTS)
    lora, names = read(tmp_path, PAIRS), set(model.state_dict())
    layer, x = model.blocks[0].ffn[0], torch.randn(3, 128)
    base = layer(x)
    first, second = Adapter(model, lora, 1.0, "one"), Adapter(model, lora, 0.5, "two")
    both = layer(x) - base
    second.scale = 0
    torch.testing.assert_close(both, 1.5 * (layer(x) - base))
    with pytest.raises(InputError, match="has an adapter 'one' already"):
        Adapter(model, lora, name="one")
    first.remove()
    second.remove()
    assert torch.equal(layer(x), base) and set(model.state_dict()) == names


def test_an_adapter_round_trips(tmp_path):
    lora = read(tmp_path, PAIRS, lora_alpha=2)
    save_file(*to_tensors(lora)[:1], tmp_path / "again.safetensors")
    again = read_lora(tmp_path / "again.safetensors")
    assert {k: v.strength for k, v in again.pairs.items()} == {k: v.strength for k, v in lora.pairs.items()}
    assert len(load_file(tmp_path / "again.safetensors")) == len(PAIRS) * 3 // 2


LAYER = "base_model.model.blocks.0.self_attn.q"
BROKEN = {
    "half a pair": ({f"{LAYER}.lora_A.weight": torch.zeros(2, 128)}, "'.*self_attn.q' lacks its 'up' matrix"),
    "ranks that differ": (
        {f"{LAYER}.lora_A.weight": torch.zeros(2, 128), f"{LAYER}.lora_B.weight": torch.zeros(128, 3)},
        r"matrices of \(2, 128\) and \(128, 3\)",
    ),
    "a whole tensor": (PAIRS | {"blocks.0.norm3.diff": torch.zeros(128)}, "'blocks.0.norm3.diff' .* whole tensors"),
    "a transformer": (WEIGHTS, "is a Wan 128-wide, 2-layer transformer, expected a LoRA adapter"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_adapter_says_why(tmp_path, name):
    with pytest.raises(InputError, match=BROKEN[name][1]):
        read(tmp_path, BROKEN[name][0])


def test_an_adapter_of_another_model_is_refused(tmp_path):
    wide = {name: tensor.repeat(1, 2) if "lora_A" in name else tensor for name, tensor in PAIRS.items()}
    with pytest.raises(
        InputError, match=r"for a weight of \(128, 256\), the transformer's is \(128, 128\); .*another size"
    ):
        merge(WEIGHTS, read(tmp_path, wide))
    deep = {name.replace("blocks.1", "blocks.31"): tensor for name, tensor in PAIRS.items()}
    with pytest.raises(InputError, match="changes 'blocks.31.*', which the transformer does not have"):
        merge(WEIGHTS, read(tmp_path, deep))
