"""Every published layout of a transformer gives the same tensors, and what is no such transformer is told apart."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.checkpoints.files import fingerprint, flat, read_tree
from slotmemory.checkpoints.layouts import build, check_transformer, kind_of, read_transformer, wan_names
from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny
from tests.recorded import facts, frame_major, tensors, wan

WEIGHTS = tiny.transformer()
EMA = tiny.transformer(seed=9)


def same(found, expected=WEIGHTS):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def written(layout, folder):
    """Write WEIGHTS in a layout -> the file to read."""
    if layout == "wan":
        return tiny.write_wan(folder, WEIGHTS) / "diffusion_pytorch_model.safetensors"
    if layout == "wan-shards":
        return tiny.write_wan(folder, WEIGHTS, shards=3) / "diffusion_pytorch_model.safetensors.index.json"
    if layout == "diffusers":
        return tiny.write_diffusers(folder, WEIGHTS) / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    if layout == "generator":
        return tiny.write_training(folder / "model.pt", WEIGHTS)
    if layout == "generator-ema":
        return tiny.write_training(folder / "self_forcing_dmd.pt", EMA, ema=WEIGHTS)
    trees = {
        "ode-init": {"generator": tiny.prefixed(WEIGHTS, "model.")},
        "bare": WEIGHTS,
        "compiled": {"model": tiny.prefixed(WEIGHTS, "_orig_mod.module.")},
        "checkpointed": {
            "generator": {
                name.replace("blocks.", "model.blocks.").replace(".self_attn", "._checkpoint_wrapped_module.self_attn")
                if name.startswith("blocks.")
                else "model." + name: tensor
                for name, tensor in WEIGHTS.items()
            }
        },
        "comfy": tiny.prefixed(WEIGHTS, "model.diffusion_model."),
    }
    torch.save(trees[layout], folder / "ode_init.pt")
    return folder / "ode_init.pt"


LAYOUTS = "wan wan-shards diffusers generator generator-ema ode-init bare compiled checkpointed comfy".split()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_sizes(tmp_path, layout):
    config, found = read_transformer(written(layout, tmp_path))
    same(found)
    assert config == tiny.CONFIG


def test_a_part_of_a_checkpoint_can_be_chosen(tmp_path):
    path = tiny.write_training(tmp_path / "model.pt", EMA, ema=WEIGHTS)
    same(read_transformer(path, "generator")[1], EMA)
    same(read_transformer(path, "generator_ema")[1])
    with pytest.raises(InputError, match="no part 'generator_av'; it holds critic, generator, generator_ema, step"):
        read_transformer(path, "generator_av")


def test_diffusers_names_are_those_that_diffusers_gave():
    g = tensors("wan_bidirectional")
    theirs = {name.removeprefix("diffusers."): t for name, t in g.items() if name.startswith("diffusers.")}
    same(wan_names(theirs), tensors("causal_weights"))
    told = facts("wan_bidirectional")["diffusers_config"]
    with pytest.raises(InputError, match="a width of 80 does not tell the number of heads"):
        check_transformer(wan_names(theirs), "file", {})
    config, weights = check_transformer(wan_names(theirs), "file", told | {"text_len": 16})
    assert config == wan().config
    model = build(config, weights, torch.device("cpu"), torch.float32)
    x = frame_major(g["x"])
    t = g["timestep"][:, None].expand(x.shape[:2])
    flow, _ = model(x, t, model.text_keys(g["context"]), torch.arange(x.shape[1]))
    torch.testing.assert_close(flow, frame_major(g["out_diffusers"]), atol=2e-4, rtol=1e-4)


def test_the_test_helper_names_tensors_as_diffusers_does():
    pairs = facts("wan_bidirectional")["key_map_original_to_diffusers"]
    assert {ours: tiny.diffusers_name(ours) for ours in pairs} == pairs


def test_built_weights_are_rounded_and_need_no_gradient(tmp_path):
    config, found = read_transformer(written("wan", tmp_path))
    model = build(config, found, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in model.parameters()
    )
    assert torch.equal(model.blocks[1].ffn[0].weight, WEIGHTS["blocks.1.ffn.0.weight"].bfloat16())


def without(*dropped):
    return {name: tensor for name, tensor in WEIGHTS.items() if name not in dropped}


WRONG = {
    "missing": (
        without("blocks.1.norm3.bias", "blocks.0.norm3.bias"),
        r"lacks the tensor 'blocks.0.norm3.bias': expected shape \(128,\), found none \(and 1 more\)",
    ),
    "missing whole": (without("patch_embedding.weight"), "is another model .*expected a Wan transformer"),
    "misshapen": (
        WEIGHTS | {"blocks.0.ffn.2.weight": torch.zeros(128, 7)},
        r"'blocks.0.ffn.2.weight' has shape \(128, 7\), expected \(128, 48\)",
    ),
    "surplus": (
        WEIGHTS | {"blocks.0.norm9.weight": torch.zeros(5)},
        r"unknown tensor 'blocks.0.norm9.weight' of shape \(5,\), expected none",
    ),
    "image to video": (
        WEIGHTS | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2), "img_emb.proj.0.weight": torch.zeros(9)},
        r"image-to-video transformer \(in_dim 36, 1 tensors such as 'img_emb.proj.0.weight'\)",
    ),
    "image to video without CLIP": (
        WEIGHTS | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)},
        "36 input channels, 16 of them latents .*the other 20 cannot be given here",
    ),
    "vace": (WEIGHTS | {"vace_blocks.0.q.weight": torch.zeros(9)}, "VACE transformer"),
    "quantised": (
        WEIGHTS | {"blocks.0.ffn.0.weight": torch.zeros(48, 128, dtype=torch.int8)},
        "'blocks.0.ffn.0.weight' shows that the weights are quantised",
    ),
    "2-D patches": (WEIGHTS | {"patch_embedding.weight": torch.zeros(128, 64)}, r"shape \(128, 64\), expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_transformer_is_refused_with_names_and_shapes(tmp_path, name):
    weights, expected = WRONG[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=expected) as error:
        read_transformer(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(error.value)


OTHERS = {
    "a LoRA adapter": tiny.lora(WEIGHTS),
    "the UMT5 text encoder": tiny.umt5_weights(),
    "the Wan video autoencoder": dict.fromkeys(tiny.original_autoencoder_names(1), torch.zeros(1)),
    "a Hunyuan or Flux transformer": {"double_blocks.0.img_attn.weight": torch.zeros(1)},
    "another model (weight)": {"weight": torch.zeros(1)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_recognised(kind):
    assert kind_of(OTHERS[kind]) == kind


def test_a_model_of_another_size_is_recognised(tmp_path):
    with torch.device("meta"):
        big = CausalWan(WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)).state_dict()
    with pytest.raises(InputError, match="this is a Wan 14B transformer; the recipe says 1.3B"):
        check_transformer(big, "model.pt", {}, "1.3B")
    config, _ = check_transformer(big, "model.pt", {}, "14B")
    assert (config.num_heads, config.num_layers, config.ffn_dim) == (40, 40, 13824)
    with pytest.raises(InputError, match="this is a Wan 128-wide, 2-layer transformer; the recipe says 14B"):
        check_transformer(WEIGHTS, "model.pt", {}, "14B")


def test_a_config_that_contradicts_the_tensors_is_reported(tmp_path):
    tiny.write_wan(tmp_path, WEIGHTS)
    with pytest.raises(InputError, match="tensors say ffn_dim=48, the config.json .* says 64"):
        read_transformer(tmp_path / "diffusion_pytorch_model.safetensors", hints={"ffn_dim": 64})


# files


class Harmful:
    def __reduce__(self):
        return (print, ("hidden code ran",))


def test_a_file_that_needs_more_than_weights_only_is_refused_and_runs_nothing(tmp_path, capfd):
    torch.save({"generator": WEIGHTS, "config": Harmful()}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"holds more than tensors \(print\).*refused: ask its author"):
        read_tree(tmp_path / "model.pt")
    assert "hidden code" not in capfd.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_a_file_that_breaks_off_is_reported(tmp_path, keep):
    path = tiny.write_training(tmp_path / "model.pt", WEIGHTS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is truncated or no file of weights"):
        read_tree(path)


def test_files_of_the_old_pickle_format_are_read_too(tmp_path):
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(flat(read_tree(tmp_path / "old.pth"), tmp_path))


def test_an_incomplete_set_of_shards_says_which_is_missing(tmp_path):
    index = tiny.sharded(tmp_path, "model", WEIGHTS, parts=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="names the shard model-00002-of-00003.safetensors, which is not beside it"):
        read_tree(index)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(
        InputError, match="00002-of-00003.safetensors lacks the tensor '.*' that model.safetensors.index.json"
    ):
        read_tree(index)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("model.gguf", b"GGUF", "quantised weights"),
        ("model.h5", b"", "weights end in .safetensors"),
        ("x.safetensors.index.json", b"{", "is no JSON"),
        ("x.safetensors.index.json", b"[]", "holds a list, expected an object"),
        ("x.safetensors.index.json", b"{}", "has no 'weight_map'"),
        ("x.safetensors.index.json", b'{"weight_map": {"a": "../../etc/x"}}', "which is not beside it"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_tree(tmp_path / name)


def test_a_checkpoint_without_a_generator_says_what_it_holds(tmp_path):
    torch.save({"critic": WEIGHTS, "step": 3}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds critic, step; expected tensors by name, or one of generator_ema"):
        read_transformer(tmp_path / "model.pt")
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds a list, expected tensors by name"):
        read_transformer(tmp_path / "model.pt")


def test_a_fingerprint_follows_content_and_not_place(tmp_path, monkeypatch):
    monkeypatch.setattr("slotmemory.checkpoints.files.WHOLE", 1000)  # so that a small file is sampled as a large one is
    monkeypatch.setattr("slotmemory.checkpoints.files.SAMPLE", 8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.bin").write_bytes(bytes(5000))
    print_a, print_b = (fingerprint([tmp_path / folder / "x.bin"]) for folder in ("a", "b"))
    assert print_a == print_b
    for change in (bytes(4999) + b"1", b"1" + bytes(4999), bytes(5001)):
        (tmp_path / "b" / "x.bin").write_bytes(change)
        assert fingerprint([tmp_path / "b" / "x.bin"]) != print_a


def test_configs_say_what_the_tensors_do_not(tmp_path):
    weights = tiny.transformer(WanConfig(dim=96, ffn_dim=16, num_heads=3, num_layers=1, freq_dim=8, text_dim=4))
    save_file(weights, tmp_path / "model.safetensors")
    config, _ = read_transformer(tmp_path / "model.safetensors", hints=json.loads('{"num_heads": 3, "eps": 1e-5}'))
    assert config.num_heads == 3 and config.eps == 1e-5
    with pytest.raises(InputError, match="num_heads"):
        read_transformer(tmp_path / "model.safetensors", hints={"num_heads": 5})
