"""More than one process: what they compute together is what one computes alone, and any number goes on with a checkpoint.

Two processes are started once, then three; each takes part in all runs of its number, as a launcher would have it."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from slotmemory.cli.app import run as command
from slotmemory.config import launched
from slotmemory.errors import InputError
from slotmemory.slots.learning import Learning, Lesson
from slotmemory.slots.learning import losses as slot_losses
from slotmemory.training.loop import Context, train
from slotmemory.training.processes import Place, join, leave
from slotmemory.training.recipe import dump_recipe, parse_recipe
from tests.models_for_tests import write_model

TOY = str(Path(__file__).with_name("toy_network.py"))
PROMPTS = ["A red cat walks.", "A blue ball waits.", "A green robot waits."]


def recipe(options=None, **values):
    defaults = {"objective": TOY, "steps": 2, "batch": 6, "ema": 0.9, "validate_steps": 100, "sample_steps": 100}
    optimizer = {"learning_rate": 0.01, "warmup": 0, "clip": 0.5, "decay": 0.0}
    return parse_recipe({**defaults, "optimizer": optimizer, "options": options or {}, **values})


def micro(folder, objective, **options):
    """A stage of the micro model on prompts from a file."""
    given = {"student": str(folder / "micro"), "prompts": str(folder / "prompts.txt"), "steps": [1000, 500]}
    short = {"chunks": 2, "new": 2, "length": 18, "switches": [6], "ratio": 1}
    if objective == "distribution_matching":
        short = {"chunks": 2, "ratio": 1, "recompute": True}
    return {"objective": objective, "options": {**given, **short, **options}}


def runs(folder) -> dict[str, dict]:
    """What is run by two processes, and by one for comparison: a recipe's keys by the run's name."""
    long = {"memory": "sink", "memory_options": {"sink": 3, "window": 9, "recache": True}}
    return {
        "sharded": {"shard": "fsdp"},
        "recomputed": {"shard": "fsdp", "options": {"lora": 2, "recompute": True, "constant": True}, "steps": 1},
        "bf16": {"shard": "fsdp", "precision": "bf16", "steps": 1},
        "sequence": {"sequence_parallel": 2, "options": {"recompute": True}, "steps": 1},
        "matching": {**micro(folder, "distribution_matching"), "shard": "fsdp", "batch": 2, "steps": 1},
        "streams": {**micro(folder, "long_tuning", **long), "sequence_parallel": 2, "batch": 1},
        "slots": {**micro(folder, "slots"), "sequence_parallel": 2, "batch": 1, "steps": 1},
    }


def losses(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("minutes", "steps_per_second")} for r in records if "loss" in r]


def weights(run, kind=""):
    files = sorted((run / "weights").glob(f"*{kind}.safetensors"))
    return {f"{file.name}:{k}": v for file in files for k, v in load_file(file).items()}


def same(one: Path, two: Path, rtol=1e-4, atol=1e-5):
    """The same steps were taken and the same weights came of it."""
    first, second = losses(one), losses(two)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert a == pytest.approx(b, rel=rtol, abs=atol)
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def lesson(rows: slice) -> Lesson:
    random = torch.Generator().manual_seed(0)
    slots, earlier = torch.randn(2, 1, 4, 3, 5, generator=random).unbind()
    weight = torch.rand(1, 4, 3, 6, generator=random).softmax(2)
    tokens, mass = torch.randn(1, 4, 6, 5, generator=random), torch.full((1, 4, 3), 2.0)
    mass[0, 1, 2] = 0.0
    given = (x[:, rows] for x in (slots, weight, tokens, earlier, mass))
    return Lesson(*given, switched=False)


def contrasted(rows: slice, gather=None):
    given = lesson(rows)
    given.slots.requires_grad_()
    given.earlier.requires_grad_()
    loss = slot_losses(given, Learning(gather=gather))["slot_contrast"]
    loss.backward()
    return loss.detach(), given.slots.grad, given.earlier.grad


def work(rank: int, world: int, folder: Path, ports: list[int], scenarios: str) -> None:
    """One of several processes: take part in everything that is done by so many."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    for name in scenarios.split():
        os.environ["MASTER_PORT"] = str(ports.pop())
        place = Place(*launched())
        if name == "contrast":
            from slotmemory.training.lessons import LessonOptions, Lessons

            join(place, "cpu", 1)
            lessons = Lessons.__new__(Lessons)
            lessons.options, lessons.context = LessonOptions(gathered=True), Context(1, rank=rank, processes=world)
            share = slice(rank * 4 // world, (rank + 1) * 4 // world)
            torch.save(contrasted(share, lessons.gathered), folder / f"contrast-{rank}.pt")
            leave()
        elif name == "command":
            code = command(["train", str(folder / "sharded.yaml"), "--out", str(folder / "two" / "sharded")])
            assert code == 0
        elif name == "resumed":
            train(recipe(shard="fsdp", steps=4, processes=world), folder / "three" / name, place=place)
        elif name == "thirds":
            train(recipe(sequence_parallel=3, processes=world, steps=1), folder / "three" / name, place=place)
        else:
            train(recipe(**{**runs(folder)[name], "processes": world}), folder / "two" / name, place=place)


def start(world: int, folder: Path, scenarios: str) -> None:
    sockets = [socket.create_server(("localhost", 0)) for _ in scenarios.split()]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    multiprocessing.spawn(work, (world, folder, ports, scenarios), nprocs=world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    write_model(folder / "micro")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "sharded.yaml").write_text(dump_recipe(recipe(shard="fsdp", processes=1)))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Runs of two processes, all of them taken up once."""
    names = [name for name in runs(folder) if name != "sharded"]
    start(2, folder, " ".join(["command", "contrast", *names]))
    return folder / "two"


@pytest.fixture(scope="module")
def three(folder, two):
    """Runs of three processes, one of them a run of two gone on with."""
    shutil.copytree(two / "sharded", folder / "three" / "resumed")
    start(3, folder, "resumed thirds")
    return folder / "three"


@pytest.fixture(scope="module")
def whole(folder):
    """The toy trained for four steps by one process."""
    train(recipe(steps=2), folder / "one" / "short")
    shutil.copytree(folder / "one" / "short", folder / "one" / "long")
    train(recipe(steps=4), folder / "one" / "long")
    return folder / "one"


def test_gradients_that_are_accumulated_make_the_step_of_the_whole_batch(tmp_path, whole):
    train(recipe(accumulate=3), tmp_path)
    same(tmp_path, whole / "short")


def test_a_batch_divides_among_processes_and_calls():
    with pytest.raises(InputError, match="batch=6 does not divide among processes=2 and accumulate=2"):
        recipe(processes=2, accumulate=2)
    with pytest.raises(InputError, match="processes=3 do not divide into groups of sequence_parallel=2"):
        recipe(processes=3, sequence_parallel=2)
    assert recipe(processes=6, sequence_parallel=2).samples == 2


def test_launched_processes_join_and_take_sharded_steps_that_equal_one_process(two, whole):
    same(two / "sharded", whole / "short")
    assert (two / "sharded" / "checkpoint" / "last" / ".metadata").is_file()
    assert "processes: 2" in (two / "sharded" / "recipe.yaml").read_text()


def test_sharded_blocks_with_adapters_are_computed_again_and_constant_as_in_one_process(folder, two, tmp_path):
    train(recipe(**{**runs(folder)["recomputed"], "shard": "none"}), tmp_path)
    same(two / "recomputed", tmp_path)


def test_sharded_weights_are_cast_as_whole_ones_are(folder, two, tmp_path):
    train(recipe(precision="bf16", steps=1), tmp_path)
    assert losses(two / "bf16")[0] == pytest.approx(losses(tmp_path)[0], rel=0.02)


def test_a_checkpoint_of_two_is_gone_on_with_by_one_and_by_three(folder, two, three, whole, tmp_path):
    shutil.copytree(two / "sharded", tmp_path / "one")
    train(recipe(steps=4), tmp_path / "one")
    for run in (tmp_path / "one", three / "resumed"):
        same(run, whole / "long")
    kept = {path.name for path in (tmp_path / "one" / "checkpoint").iterdir()}
    assert kept == {"last.pt", "previous"}  # by one process whole again, the shares of two are the one before
    averages = weights(whole / "long", ".ema")
    for name, tensor in weights(three / "resumed", ".ema").items():
        torch.testing.assert_close(tensor, averages[name], rtol=1e-4, atol=1e-5)


def test_slots_of_all_processes_are_contrasted_as_those_of_one_batch(folder, two):
    loss, slots, earlier = contrasted(slice(None))
    parts = [torch.load(folder / f"contrast-{rank}.pt") for rank in range(2)]
    for value, *_ in parts:
        torch.testing.assert_close(value, loss)
    # losses of the processes are averaged: their gradients add up to twice the whole
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1) / 2, slots)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 1) / 2, earlier)
    alone = contrasted(slice(0, 2))[0]
    assert abs(float(alone - loss)) > 1e-3


@pytest.mark.parametrize("name", ["sequence", "streams", "slots"])
def test_processes_that_share_tokens_compute_what_one_computes(folder, two, name, tmp_path):
    values = {**runs(folder)[name], "shard": "none", "sequence_parallel": 1}
    train(recipe(**values), tmp_path)
    same(two / name, tmp_path)


def test_tokens_divide_among_three(three, whole, tmp_path):
    train(recipe(steps=1), tmp_path)
    same(three / "thirds", tmp_path)


def test_a_student_learns_from_sharded_scores_as_from_whole_ones(folder, two, tmp_path):
    """Calls that are accumulated draw what processes draw."""
    train(recipe(**{**runs(folder)["matching"], "shard": "none", "accumulate": 2}), tmp_path)
    same(two / "matching", tmp_path)


def test_what_has_no_transformer_cannot_be_shared(tmp_path):
    toy = str(Path(__file__).with_name("toy.py"))
    with pytest.raises(InputError, match="trains no transformer to share; leave shard out"):
        train(recipe(objective=toy, shard="fsdp"), tmp_path)


def test_a_launcher_is_believed_or_named_as_wrong(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == (3, 8, 1)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="expected numbers"):
        launched()
    with pytest.raises(InputError, match="2 processes were started for a recipe of processes=1"):
        train(recipe(), tmp_path, place=Place(0, 2))


def test_distributed_groups_are_left_behind_by_no_run():
    assert not distributed.is_initialized()
