"""Wan's text encoder: its own weights and names computed twice, prompts cleaned, padded, remembered and kept on disk."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny

pytest.importorskip("transformers", reason="the text encoder needs transformers: pip install 'slotmemory[wan]'")

from slotmemory.codecs.umt5 import UMT5, build_umt5, clean, read_umt5  # noqa: E402

WIDTH = tiny.CONFIG.text_dim
WEIGHTS = tiny.umt5_weights()
PROMPT = "a red cat walks in the snow ."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.save(WEIGHTS, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny.write_tokenizer(folder / "tokenizer.json")
    return folder


def encoder(files, cache=None, loads=None, **options):
    path = files / "models_t5_umt5-xxl-enc-bf16.pth"

    def load():
        if loads is not None:
            loads.append(1)
        return build_umt5(path, WIDTH)

    return UMT5(load, files / "tokenizer.json", identity="tiny", width=WIDTH, cache=cache, **options)


# what the encoder computes, written down from the description of Wan's `t5.py`


def bucket(distance, buckets=32, reach=128):
    """T5's buckets for both directions: exact up to 8, then logarithmic up to `reach`."""
    half = buckets // 2
    found, near = (half if distance > 0 else 0), abs(distance)
    if near < half // 2:
        return found + near
    far = half // 2 + int(math.log(near / (half // 2)) / math.log(reach / (half // 2)) * (half - half // 2))
    return found + min(far, half - 1)


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def computed(ids, weights, heads=3):
    x, count = weights["token_embedding.weight"][ids], len(ids)
    table = torch.tensor([[bucket(key - query) for key in range(count)] for query in range(count)])
    for layer in range(2):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        y = rms(x, w["norm1.weight"])
        q, k, v = ((y @ w[f"attn.{n}.weight"].T).view(count, heads, -1).transpose(0, 1) for n in "qkv")
        scores = q @ k.transpose(1, 2) + w["pos_embedding.embedding.weight"][table].permute(2, 0, 1)  # not scaled
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1) @ w["attn.o.weight"].T
        y = rms(x, w["norm2.weight"])
        gate = F.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (y @ w["ffn.fc1.weight"].T * gate) @ w["ffn.fc2.weight"].T
    return rms(x, weights["norm.weight"])


@pytest.mark.parametrize("length", [9, 300])
def test_wans_weights_compute_what_wans_description_says(files, length):
    prompt = " ".join(["a", "red", "cat", "walks"][i % 4] for i in range(length - 1))
    embeddings, counts = encoder(files).encode([prompt])
    ids = [tiny.WORDS.index(word) + 3 for word in prompt.split()] + [1]
    assert counts.tolist() == [length]
    torch.testing.assert_close(embeddings[0, :length], computed(ids, WEIGHTS), atol=1e-4, rtol=1e-3)


def test_prompts_are_padded_with_zeros_to_512_tokens(files):
    embeddings, counts = encoder(files).encode([PROMPT, "", "blue ghost"])
    assert embeddings.shape == (3, 512, WIDTH) and counts.tolist() == [9, 1, 3]
    for row, count in zip(embeddings, counts):
        assert bool(row[:count].any(1).all()) and not row[count:].any()


def test_prompts_are_cleaned_as_wan_cleans_them():
    assert clean(" a \n red\t cat &amp;amp; dog ") == "a red cat & dog"
    assert clean("a &lt; b &amp;amp; c < d") == "a < b & c < d"
    assert clean("schÃ¶n") == "schön"


def test_a_prompt_beside_others_is_encoded_as_alone(files):
    both, _ = encoder(files).encode([PROMPT, "blue ghost jumps in the meadow"])
    alone, _ = encoder(files).encode([PROMPT])
    assert torch.equal(both[:1], alone)


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end_mark(files, caplog):
    text = encoder(files)
    text.check("cat " * 600)
    assert "longer than 512 tokens" in caplog.text
    embeddings, counts = text.encode(["cat " * 600])
    assert counts.tolist() == [512]
    torch.testing.assert_close(embeddings[0, -1], computed([6] * 511 + [1], WEIGHTS)[-1], atol=1e-4, rtol=1e-3)
    caplog.clear()
    text.check("cat " * 511)
    assert not caplog.text


def test_announced_prompts_are_encoded_in_one_go_and_never_again(files, monkeypatch):
    text, ran = encoder(files), []
    run = text._run
    monkeypatch.setattr(text, "_run", lambda model, prompt: ran.append(prompt) or run(model, prompt))
    for prompt in (PROMPT, "blue ghost", " blue  ghost "):
        text.check(prompt)
    assert ran == []
    text.encode([PROMPT])
    assert ran == [PROMPT, "blue ghost"]
    text.encode(["blue ghost", PROMPT])
    assert len(ran) == 2


def test_the_model_goes_to_an_accelerator_for_new_prompts_only_and_leaves_it(files, monkeypatch):
    loads = []
    text = encoder(files, loads=loads, device="meta")  # stands for an accelerator
    rows = torch.ones(2, WIDTH)
    monkeypatch.setattr(text, "_run", lambda model, prompt: rows if model.device.type == "meta" else None)
    for prompts, times in (([PROMPT], 1), ([PROMPT], 1), ([PROMPT, "cat"], 2)):
        embeddings, _ = text.encode(prompts)
        assert embeddings.device.type == "meta" and len(loads) == times and text._model is None


def test_an_offloaded_model_computes_on_the_processor_and_its_embeddings_go_to_the_accelerator(files, monkeypatch):
    text = encoder(files, device="meta", computes_on="cpu")
    run, places = text._run, []
    monkeypatch.setattr(text, "_run", lambda model, prompt: places.append(model.device.type) or run(model, prompt))
    embeddings, words = text.encode([PROMPT])
    assert places == ["cpu"] and embeddings.device.type == words.device.type == "meta" and text._model is None
    assert torch.equal(text._known[PROMPT], encoder(files).encode([PROMPT])[0][0, : len(text._known[PROMPT])])


def test_it_says_whether_its_weights_will_be_needed(files, tmp_path):
    text = encoder(files, tmp_path)
    assert not text.knows(PROMPT)
    text.encode([PROMPT])
    assert text.knows(f" {PROMPT} ") and not text.knows("cat")
    assert encoder(files, tmp_path).knows(PROMPT) and not encoder(files).knows(PROMPT)


def test_embeddings_on_disk_spare_loading_the_model(files, tmp_path):
    loads = []
    first, _ = encoder(files, tmp_path, loads).encode([PROMPT])
    again = encoder(files, tmp_path, loads)
    again.check(PROMPT)
    second, counts = again.encode([PROMPT])
    assert torch.equal(first, second) and counts.tolist() == [9] and len(loads) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_embeddings_of_other_weights_are_not_taken(files, tmp_path):
    encoder(files, tmp_path).encode([PROMPT])
    other, loads = encoder(files, tmp_path), []
    other.identity, other._load = (
        "other",
        lambda: loads.append(1) or build_umt5(files / "models_t5_umt5-xxl-enc-bf16.pth", WIDTH),
    )
    other.encode([PROMPT])
    assert loads == [1] and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_on_disk_is_made_again(files, tmp_path, caplog):
    first, _ = encoder(files, tmp_path).encode([PROMPT])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    second, _ = encoder(files, tmp_path).encode([PROMPT])
    assert torch.equal(first, second) and "encoded again" in caplog.text
    third, _ = encoder(files, tmp_path, loads := []).encode([PROMPT])
    assert torch.equal(first, third) and not loads


def test_a_disk_that_takes_nothing_is_said_once_and_does_not_stop(files, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    text = encoder(files, tmp_path / "file")
    text.encode([PROMPT])
    text.encode(["cat"])
    assert caplog.text.count("not kept on disk") == 1


# files


def test_the_layout_of_transformers_gives_the_same_encoder(files, tmp_path):
    _, renamed = read_umt5(files / "models_t5_umt5-xxl-enc-bf16.pth")
    renamed.pop("encoder.embed_tokens.weight")  # saved once
    index = tiny.sharded(tmp_path, "model", renamed)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "umt5", "relative_attention_max_distance": 128}))
    ids = torch.tensor([[3, 4, 5, 1]])
    ours, theirs = (build_umt5(path, WIDTH) for path in (files / "models_t5_umt5-xxl-enc-bf16.pth", index))
    assert torch.equal(ours(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)


def test_the_published_number_of_weights_is_that_of_the_release():
    import transformers

    sizes, _ = read_sizes(24, 64, 4096, 10240, 256384)
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    assert sum(p.numel() for p in model.parameters()) == 5_680_910_336


def read_sizes(layers, heads, width, hidden, vocabulary):
    """Sizes that are read off tensors shaped as those of models_t5_umt5-xxl-enc-bf16.pth."""
    from slotmemory.checkpoints import names
    from slotmemory.codecs.umt5 import _sizes

    shapes = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for layer in range(layers):
        place = f"blocks.{layer}"
        shapes |= {f"{place}.attn.{n}.weight": (width, width) for n in "qkvo"}
        shapes |= {
            f"{place}.ffn.gate.0.weight": (hidden, width),
            f"{place}.pos_embedding.embedding.weight": (32, heads),
        }
    tensors = {names.text_encoder(name): torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    return _sizes(tensors, "file", {}), tensors


def test_bf16_weights_stay_bf16_and_fp16_becomes_bf16(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        save_file({k: v.to(dtype) for k, v in WEIGHTS.items()}, tmp_path / "text.safetensors")
        assert build_umt5(tmp_path / "text.safetensors", WIDTH).dtype == torch.bfloat16


def test_files_that_are_no_encoder_say_what_they_are(files, tmp_path):
    cases = {
        "a transformer": (tiny.transformer(), "is a Wan 128-wide, 2-layer transformer, expected Wan's text encoder"),
        "without a block": (
            {k: v for k, v in WEIGHTS.items() if "pos_embedding" not in k},
            "lacks the tensor 'encoder.block.0.*relative_attention_bias",
        ),
        "a missing tensor": (
            {k: v for k, v in WEIGHTS.items() if k != "blocks.1.norm2.weight"},
            "lacks the tensor 'encoder.block.1.layer.1.layer_norm.weight': expected shape",
        ),
        "eight bits": (
            {k: v.to(torch.float8_e4m3fn) for k, v in WEIGHTS.items()},
            "float8_e4m3fn numbers; use the bf16",
        ),
    }
    for content, expected in cases.values():
        torch.save(content, tmp_path / "text.pth")
        with pytest.raises(InputError, match=expected):
            build_umt5(tmp_path / "text.pth", WIDTH)
    with pytest.raises(InputError, match="embeddings of 24 numbers; the transformer takes 4096"):
        build_umt5(files / "models_t5_umt5-xxl-enc-bf16.pth", 4096)


def test_a_damaged_encoder_is_found_when_a_prompt_is_announced(files, tmp_path):
    text = encoder(files)
    text._load = lambda: build_umt5(tmp_path / "nothing.pth", WIDTH)
    with pytest.raises(InputError, match="no weights at"):
        text.check(PROMPT)


def test_a_file_that_is_no_tokenizer_is_refused(files, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer.json"):
        UMT5(lambda: None, tmp_path / "tokenizer.json", identity="", width=WIDTH)
