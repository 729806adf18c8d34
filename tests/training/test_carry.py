"""A student is carried over to a teacher that has learnt more."""

import shutil
import sys

import pytest
import torch

from slotmemory.codecs.base import read_tensors
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.training import carry, pack


def weights(folder, part="transformer"):
    return read_tensors(pack.exported(folder, part))[0]


@pytest.fixture
def three(micro, other, tmp_path):
    """Student, its teacher, the teacher as it is now: model folders, the last with other words, too."""
    student, teacher, now = (tmp_path / name for name in ("student", "teacher", "now"))
    for folder, source in ((student, micro), (teacher, micro), (now, other)):
        shutil.copytree(source, folder)
    changed = {name: tensor + 0.5 for name, tensor in weights(student).items()}
    pack.write_part(student / "transformer.safetensors", changed, read_tensors(student / "transformer.safetensors")[1])
    return student, teacher, now


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_what_distillation_changed_is_added_to_the_new_teacher(three, tmp_path, share):
    carry.carry(*three, share, tmp_path / "out")
    made, now = weights(tmp_path / "out"), weights(three[2])
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, now[name].float() + share * 0.5, rtol=1e-2, atol=1e-2)


def test_what_was_carried_packs_into_a_model_with_the_students_steps_and_the_new_words(
    three, micro, tmp_path, monkeypatch
):
    student, teacher, now = three
    run, model = tmp_path / "out", tmp_path / "model"
    named = {"student": student, "teacher": teacher, "onto": now, "out": run}
    monkeypatch.setattr(sys, "argv", ["carry", "--share", "0.5", *(f"--{k}={v}" for k, v in named.items())])
    assert carry.main() == 0
    monkeypatch.setattr(sys, "argv", ["pack", f"--transformer={run}", f"--codec={micro}", f"--out={model}"])
    assert pack.main() == 0
    engine = Engine.from_pretrained(str(model), "window")
    assert engine.sampler.steps == Engine.from_pretrained(str(student), "window").sampler.steps
    for name, tensor in weights(run, "words").items():
        torch.testing.assert_close(tensor, weights(now, "words")[name])


def test_another_networks_teacher_is_refused():
    small, large = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    with pytest.raises(InputError, match="other names or shapes"):
        carry.carried(small, large, small, 1.0)


def test_a_folder_without_weights_is_named(three, tmp_path, monkeypatch, capsys):
    named = {"student": tmp_path / "none", "teacher": three[1], "onto": three[2], "out": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["carry", *(f"--{k}={v}" for k, v in named.items())])
    assert carry.main() == 2
    assert "holds no transformer weights" in capsys.readouterr().err
