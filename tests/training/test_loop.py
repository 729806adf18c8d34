"""The training loop: resuming, processes, stops, files; driven by the toy objective beside this file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from slotmemory.training import optimise, trainer
from slotmemory.training.loop import (
    Context,
    TrainingError,
    cast_call,
    generator_for,
    seed_for,
    train,
)
from slotmemory.training.optimise import rate_factor
from slotmemory.training.recipe import find_objective, parse_recipe
from tests.disk import file_size_limit

TOY = str(Path(__file__).with_name("toy.py"))


def recipe(options=None, optimizer=None, **values):
    defaults = {"objective": TOY, "steps": 8, "batch": 4, "ema": 0.9, "validate_steps": 100, "sample_steps": 100}
    optimizer = {"learning_rate": 0.05, "warmup": 2, **(optimizer or {})}
    options = {"noise": 0.1} if options is None else options
    return parse_recipe({**defaults, "optimizer": optimizer, "options": options, **values})


def losses(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), "a step is logged twice or never"
    return {record["step"]: (record["loss"], record["gradient"]) for record in records}


def weights(run, kind=""):
    return load_file(run / "weights" / f"net{kind}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    assert train(recipe(), run) == "steps"
    return run


def test_the_loss_falls(tmp_path):
    train(recipe({}, steps=150), tmp_path)
    curve = losses(tmp_path)
    assert curve[150][0] < 0.25 * curve[1][0]


@pytest.mark.parametrize("optimizer", [{}, {"muon": 0.02}])
def test_a_killed_run_resumes_bitwise(tmp_path, optimizer):
    train(recipe(optimizer=optimizer), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe({"noise": 0.1, "crash_step": 5}, optimizer, checkpoint_steps=3), tmp_path / "killed")
    assert max(losses(tmp_path / "killed")) == 5  # two steps beyond the checkpoint, which will be done again
    train(recipe(optimizer=optimizer), tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for kind in ("", ".ema"):
        assert same(weights(tmp_path / "killed", kind), weights(tmp_path / "whole", kind))


def test_sigterm_saves_and_the_run_goes_on_bitwise(tmp_path, whole):
    assert train(recipe({"noise": 0.1, "signal_step": 4}), tmp_path) == "signal"
    assert max(losses(tmp_path)) == 5
    assert train(recipe(), tmp_path) == "steps"
    assert losses(tmp_path) == losses(whole) and same(weights(tmp_path), weights(whole))


def test_a_finished_run_can_be_extended(tmp_path):
    flat = {"decay": 0.0}
    train(recipe(optimizer=flat, steps=8), tmp_path / "whole")
    train(recipe(optimizer=flat, steps=5), tmp_path / "longer")
    train(recipe(optimizer=flat, steps=8), tmp_path / "longer")
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", [{}, {"muon": 0.02}])
def test_a_resumed_run_obeys_the_recipe_of_now(tmp_path, optimizer):
    train(recipe(optimizer=optimizer, steps=4), tmp_path)
    before = weights(tmp_path)
    still = {"learning_rate": 1e-12} | ({"muon": 1e-12} if optimizer else {})
    train(recipe(optimizer=still, steps=8), tmp_path)
    after = weights(tmp_path)
    assert all(torch.allclose(before[key], after[key], atol=1e-8) for key in before if key != "seen")


def test_nan_stops_before_the_optimizer_step(tmp_path):
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        with pytest.raises(TrainingError, match="shrink is nan in step 4"):
            train(recipe({"nan_step": 3}, checkpoint_steps=2), tmp_path)
    finally:
        hook.remove()
    assert len(steps) == 3
    assert torch.load(tmp_path / "checkpoint" / "last.pt", weights_only=True)["step"] == 2


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    train(recipe({}, steps=5), tmp_path / "one")
    train(recipe({}, steps=5, processes=2), tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert all(torch.allclose(torch.tensor(one[s]), torch.tensor(two[s]), rtol=1e-5) for s in range(1, 6))
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.allclose(tensor, weights(tmp_path / "two")[name], atol=1e-5), name


def test_a_nan_on_another_rank_stops_all(tmp_path):
    with pytest.raises(TrainingError, match="shrink is nan in step 2"):
        train(recipe({"nan_step": 1, "nan_rank": 1}, processes=2), tmp_path)


def test_the_time_limit_saves_and_stops(tmp_path):
    assert train(recipe(steps=10**6, max_minutes=0.005), tmp_path) == "minutes"
    saved = torch.load(tmp_path / "checkpoint" / "last.pt", weights_only=True)
    assert saved["step"] > 0 and saved["minutes"] >= 0.005
    assert train(recipe(steps=10**6, max_minutes=0.005), tmp_path) == "minutes"
    assert max(losses(tmp_path)) == saved["step"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole):
    train(recipe(steps=8, checkpoint_steps=2), tmp_path)
    last = tmp_path / "checkpoint" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    train(recipe(), tmp_path)
    assert losses(tmp_path) == losses(whole)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "checkpoint" / name).write_bytes(b"no")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        train(recipe(), tmp_path)


def test_a_run_folder_holds_what_it_promises(whole, tmp_path):
    assert {path.name for path in whole.iterdir()} >= {"recipe.yaml", "run.json", "log.jsonl", "checkpoint", "weights"}
    with safe_open(whole / "weights" / "net.ema.safetensors", framework="pt") as file:
        assert file.metadata()["kind"] == "toy" and file.metadata()["step"] == "8"
    assert (whole / "samples" / "0000008" / "note.txt").read_text() == "8"
    assert not list(whole.rglob("*partial*"))


def test_validation_sees_the_averaged_weights_and_leaves_the_trained_ones(whole):
    record = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()][-1]
    averaged, trained = weights(whole, ".ema")["0.weight"], weights(whole)["0.weight"]
    assert record["validate"]["first"] == pytest.approx(float(averaged[0, 0]))
    assert not torch.equal(averaged, trained)


def test_a_run_starts_from_exported_weights(tmp_path, whole):
    train(recipe(steps=0, init=str(whole)), tmp_path / "folder")
    assert same(weights(tmp_path / "folder"), weights(whole, ".ema"))
    file = whole / "weights" / "net.safetensors"
    train(recipe(steps=0, init=str(file)), tmp_path / "file")
    assert same(weights(tmp_path / "file"), weights(whole))
    with pytest.raises(ValueError, match="'0.weight' has shape \\(6, 6\\), expected \\(7, 6\\)"):
        train(recipe({"width": 7}, init=str(file)), tmp_path / "other")
    with pytest.raises(ValueError, match="'0.weight' has shape"):
        train(recipe({"width": 7}), whole)


def test_a_started_folder_is_not_overwritten_unasked(whole):
    with pytest.raises(ValueError, match="holds a run already"):
        train(recipe(), whole, resume=False)


def test_a_full_disk_stops_no_training_but_its_end_and_nothing_kept_is_lost(tmp_path, whole, caplog):
    train(recipe(steps=4), tmp_path)
    before = (tmp_path / "checkpoint" / "last.pt").read_bytes()
    with file_size_limit(3000), pytest.raises(TrainingError, match="is not of step 8; free some space"):
        train(recipe(checkpoint_steps=2), tmp_path)
    assert "the last checkpoint stays" in caplog.text
    assert (tmp_path / "checkpoint" / "last.pt").read_bytes() == before and not list(tmp_path.rglob("*partial*"))
    train(recipe(), tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_a_checkpoint_is_tried_again_once_there_is_space(tmp_path, monkeypatch):
    saves, save = [], trainer.Trainer.save

    def refusing(trainer):
        saves.append(trainer.step)
        if trainer.step == 4:
            raise OSError(28, "No space left on device")
        save(trainer)

    monkeypatch.setattr(trainer.Trainer, "save", refusing)
    train(recipe(checkpoint_steps=2), tmp_path)
    assert saves == [2, 4, 6, 8, 8]
    assert torch.load(tmp_path / "checkpoint" / "last.pt", weights_only=True)["step"] == 8


def test_a_watcher_is_told_every_step_with_what_is_left(tmp_path):
    seen = []
    train(recipe(), tmp_path, watch=seen.append)
    assert [record["step"] for record in seen] == list(range(1, 9))
    assert seen[-1]["seconds_left"] == 0 < seen[0]["seconds_left"] and "fit" in seen[0]


def test_modules_that_a_step_does_not_train_keep_weights_momenta_and_average(tmp_path, monkeypatch):
    monkeypatch.setattr(find_objective(TOY).Objective, "trains", lambda self, step: {"net.2"} if step else None)
    train(recipe(steps=1), tmp_path / "one")
    train(recipe(steps=4), tmp_path / "four")
    for kind in ("", ".ema"):
        one, four = weights(tmp_path / "one", kind), weights(tmp_path / "four", kind)
        assert torch.equal(one["0.weight"], four["0.weight"]) and not torch.equal(one["2.weight"], four["2.weight"])


def test_groups_with_a_clip_are_clipped_apart():
    pieces = {name: torch.full((4,), 2.0) for name in ("a", "b", "c")}  # norm 4 each
    optimise.clip_gradient(pieces, optimise.clip_parts(list(pieces), [(1.0, ["a"]), (100.0, ["b", "unseen"])], 2.0))
    assert [float(pieces[name].norm()) for name in pieces] == pytest.approx([1, 4, 2])


def test_a_gradient_is_clipped_by_the_norm_of_all_its_shares():
    mine, other = torch.full((4,), 2.0), 48.0  # norm 4 here, and 48 its square elsewhere: 8 in all
    optimise.clip_gradient({}, [(2.0, ["a"])], {"a": mine}, [float(mine.square().sum()) + other])
    assert float(mine.norm()) == pytest.approx(1)


def test_averages_that_begin_later_do_so_at_their_full_length():
    late, early = recipe(ema=0.99, ema_from=200), recipe(ema=0.99)
    assert [optimise.average_decay(late, step) for step in (0, 199, 200, 900)] == [0, 0, 0.99, 0.99]
    assert [optimise.average_decay(early, step) for step in (0, 10**4)] == [0.1, 0.99]


def test_rates_warm_up_stay_and_fall_to_zero():
    r = recipe(steps=100, optimizer={"warmup": 9, "decay": 0.2})
    rates = [rate_factor(r, step, 0.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0
    timed = recipe(max_minutes=10, optimizer={"warmup": 0, "decay": 0.5, "decay_by": "minutes"})
    assert [rate_factor(timed, 5, m) for m in (1, 7.5, 11)] == [1.0, pytest.approx(0.5), 0.0]


def test_cast_calls_compute_in_bf16_and_train_fp32():
    net = torch.nn.Linear(4, 4)
    output = cast_call(net, torch.bfloat16, torch.ones(1, 4, dtype=torch.bfloat16))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert net.weight.dtype == net.weight.grad.dtype == torch.float32
    assert Context(batch=1).dtype == torch.float32


def test_random_streams_differ_by_seed_step_and_rank():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    draws = {float(torch.rand(1, generator=generator_for(*key))) for key in keys}
    assert len(draws) == 4 and seed_for(1, 23) != seed_for(12, 3) and seed_for(5) < 1 << 62
