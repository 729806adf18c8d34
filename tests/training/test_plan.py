"""What a dry run says: parameters as published, arithmetic as counted, and nothing read or written."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.cli.app import run
from slotmemory.errors import InputError
from slotmemory.training.plan import SIZES, Plan, Work, forward, plan, told
from slotmemory.training.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "train").glob("*/*.yaml"))
WAN = [path for path in RECIPES if path.parent.name == "wan2.1-1.3b"]
CONFIG = WanConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=3, freq_dim=16, text_dim=8, text_len=6, in_dim=4, out_dim=4
)


def label(path):
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("keys", [0, 20])
def test_the_arithmetic_of_a_pass_is_what_is_counted(keys):
    model = CausalWan(CONFIG)
    context = [(torch.zeros(1, keys, 2, 32), torch.zeros(1, keys, 2, 32))] * 3
    text = model.text_keys(torch.zeros(1, 2, 8))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1, 3), text, torch.arange(3), Buffered(context))
    counted = counter.get_total_flops()
    assert 0.9 * counted < forward(CONFIG, 3 * 16, keys) < counted  # embeddings and head are left out


def test_a_backward_pass_counts_twice_and_what_is_computed_again_once_more():
    work = Work("x", CONFIG, 2.0, 48, 0, 3.0)
    assert work.flops == 6 * forward(CONFIG, 48, 0) and work.kept == 0
    both, again = (Work("x", CONFIG, 2.0, 48, 0, 3.0, True, recompute) for recompute in (False, True))
    assert both.flops == 3 * work.flops and again.flops == 4 * work.flops
    assert again.kept == pytest.approx(both.kept / 3 + 2 * 48 * 3 * 64)  # one block at a time, and every block's input


def test_published_sizes_have_the_published_number_of_parameters():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in CausalWan(config).parameters()) for name, config in SIZES.items()}
    assert counts == {"1.3B": 1_418_996_800, "14B": 14_288_491_584}


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_every_recipe_is_valid(path):
    assert load_recipe(path).steps > 0


@pytest.mark.parametrize("path", WAN, ids=label)
def test_recipes_of_published_models_are_planned_without_their_files(path):
    found = plan(load_recipe(path))
    trained = {name: t for name, (t, _) in found.parameters.items()}
    adapters = 30 * 256 * (8 * 2 * 1536 + 2 * (1536 + 8960))
    stage = path.stem
    expected = {"transformer": adapters, "critic": adapters, "teacher": 0}
    if stage in ("ode", "distribution_matching"):
        expected |= {"transformer": 1_418_996_800, "critic": 1_418_996_800}
    if stage.startswith("slots"):
        adapting = 30 * (1536 * 64 + 64 + 2 * 1536)
        expected["memory.slots"] = adapting + (121_152 if stage == "slots_stage2" else 0)
    if stage == "ode":
        del expected["critic"]
    assert trained == expected
    slots = expected.pop("memory.slots", 0)  # whole in every process
    assert found.memory["trained weights"] == 20 / 8 * sum(expected.values()) + 24 * slots
    assert 25e9 < sum(found.memory.values()) < 100e9 and 20 < found.steps_per_hour(400) < 1000
    alone = plan(load_recipe(path, {"shard": "none"}))
    assert alone.memory["trained weights"] == 24 * (sum(expected.values()) + slots) and alone.shares == 1


def test_what_is_kept_for_the_backward_pass_and_a_process_computes_is_shared_with_its_tokens():
    path = next(p for p in WAN if p.stem == "long_tuning")
    one, four = (plan(load_recipe(path, {"sequence_parallel": degree, "batch": 8 // degree})) for degree in (1, 4))
    name = "kept for the backward pass"
    assert four.memory[name] == one.memory[name] / 4 and sum(four.flops.values()) == sum(one.flops.values()) / 4
    twice = plan(load_recipe(path, {"batch": 16, "accumulate": 2}))
    assert twice.memory == one.memory and sum(twice.flops.values()) == 2 * sum(one.flops.values())


def test_published_settings_of_the_two_stages():
    first, second = (load_recipe(p) for p in WAN if p.stem.startswith("slots"))
    for recipe, steps, stage in ((first, 2000, 1), (second, 1000, 2)):
        o, rates = recipe.options, recipe.optimizer
        assert (recipe.steps, o.stage, recipe.batch, recipe.processes) == (steps, stage, 8, 8)
        assert (rates.learning_rate, rates.betas) == (1e-5, (0, 0.999))
        assert o.critic_rate * rates.learning_rate == pytest.approx(2e-6)
        assert (o.memory_weight, o.ratio, o.guidance, o.steps, o.shift) == (0.2, 5, 3.0, (1000, 750, 500, 250), 5.0)
        assert (3 * o.chunks, 3 * o.new, o.length, o.switches) == (21, 18, 240, tuple(range(21, 202, 18)))


def test_a_dry_run_prints_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(WAN[-1]), "--dry-run", "--tflops", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["trained", "memory", "arithmetic"]
    assert "at 100 TFLOP/s sustained" in lines[2] and not list(tmp_path.iterdir())


def test_stages_without_a_student_have_no_plan():
    codec = next(p for p in RECIPES if label(p) == "tiny-codec")
    with pytest.raises(InputError, match="objective codec trains no student"):
        plan(load_recipe(codec))


def test_a_plan_says_hours_for_its_steps():
    lines = told(Plan({"net": (10**6, 2 * 10**6)}, {"weights": 1e9}, {"all": 3.6e15}, 100), 1.0)
    assert lines[2].endswith("at 1 TFLOP/s sustained 1 steps per hour, 100.0 h for 100 steps")


def test_a_plan_that_ends_by_the_clock_says_how_many_steps_that_is():
    def last(minutes):
        return told(Plan({}, {}, {"all": 3.6e13}, 200, minutes=minutes), 1.0)[2]

    assert last(90).endswith("100 steps per hour, 150 of 200 steps in its 90 minutes")
    assert last(120).endswith("2.0 h for 200 steps") and last(None) == last(120)


def test_a_processor_is_measured_as_the_recipe_uses_it_and_a_gpu_is_assumed(monkeypatch, capsys):
    asked, before = [], torch.get_num_threads()

    def rate(device, dtype, repeats):
        asked.append((device.type, dtype, torch.get_num_threads()))
        return 5e10

    monkeypatch.setattr("slotmemory.bench.machine.matrix_rate", rate)
    tiny = next(path for path in RECIPES if label(path) == "tiny-ode")

    def said(path, *words):
        assert run(["train", str(path), "--dry-run", *words]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    line = said(tiny, "--set", "threads=2", "--set", "precision=bf16")
    assert "at 0.05 TFLOP/s of a matrix product here and now (bf16, 2 threads) " in line
    assert asked == [("cpu", torch.bfloat16, 2)] and torch.get_num_threads() == before
    assert "at 0.2 TFLOP/s sustained " in said(tiny, "--tflops", "0.2")
    assert "at 400 TFLOP/s sustained " in said(WAN[-1]) and len(asked) == 1
