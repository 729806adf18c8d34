"""A SlotContrast file loads under its own names, and a wrong one is told what is wrong with it."""

import pytest
import torch

from slotmemory.slots import load_slotcontrast
from tests.slots.test_golden import recorded, released_checkpoint


def test_every_tensor_of_the_three_parts_arrives_and_the_rest_is_dropped():
    grouper = load_slotcontrast(released_checkpoint())
    torch.testing.assert_close(grouper.initializer.slots.data, recorded("weights.initializer.slots"), atol=0, rtol=0)
    for name, tensor in grouper.state_dict().items():
        torch.testing.assert_close(tensor, recorded(f"weights.{name}"), atol=0, rtol=0)


def test_a_whole_lightning_checkpoint_loads_too():
    grouper = load_slotcontrast({"state_dict": released_checkpoint(), "epoch": 3})
    assert grouper.initializer.slots.shape == (1, 7, 64)


def test_a_checkpoint_in_bf16_is_raised_to_fp32():
    grouper = load_slotcontrast({name: t.bfloat16() for name, t in released_checkpoint().items()})
    assert all(p.dtype == torch.float32 for p in grouper.parameters())


def test_a_missing_tensor_is_named_as_the_file_would_name_it():
    checkpoint = released_checkpoint()
    del checkpoint["processor.module.corrector.to_q.weight"]
    with pytest.raises(ValueError, match=r"missing: processor\.module\.corrector\.to_q\.weight"):
        load_slotcontrast(checkpoint)


@pytest.mark.parametrize("anchor", ["initializer.slots", "processor.module.predictor.blocks.0.linear1.weight"])
def test_a_missing_tensor_that_gives_the_sizes_is_named_too(anchor):
    checkpoint = released_checkpoint()
    del checkpoint[anchor]
    with pytest.raises(ValueError, match=anchor.replace(".", r"\.") + " is missing"):
        load_slotcontrast(checkpoint)


def test_a_misshapen_tensor_is_named_with_both_shapes():
    checkpoint = released_checkpoint()
    checkpoint["processor.module.corrector.gru.bias_ih"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"misshapen: .*corrector\.gru\.bias_ih is \[64\], expected \[192\]"):
        load_slotcontrast(checkpoint)
    checkpoint["initializer.slots"] = torch.zeros(7, 64)
    with pytest.raises(ValueError, match=r"initializer\.slots is \[7, 64\], expected 3 axes"):
        load_slotcontrast(checkpoint)


def test_an_unknown_tensor_inside_the_three_parts_is_named():
    checkpoint = released_checkpoint() | {"processor.module.predictor.blocks.1.linear1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown: processor\.module\.predictor\.blocks\.1"):
        load_slotcontrast(checkpoint)
