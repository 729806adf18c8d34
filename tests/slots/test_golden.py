"""The slot modules compute what the published SlotContrast program computed (tests/golden/slot_attention.json)."""

import pytest
import torch

from slotmemory.slots import Grouper, LearnedInit, Predictor, RandomInit, SlotAttention, contrast, load_slotcontrast
from tests.recorded import tensors

# The tolerance the recording recommends: ten times the noise it measured between float32 and float64.
CLOSE = dict(atol=5e-5, rtol=1e-4)
# The steps of `contrast` are leading axes; whole-batch contrast also flattens batch and slots.
LOSSES = {"batch": (0.1, True), "nobatch": (0.1, False), "batch_tau05": (0.5, True)}
RENAMED = {"grouper.": "processor.module.corrector.", "predictor.": "processor.module.predictor."}


def recorded(name):
    return tensors("slot_attention")[name].clone()


def weights(prefix):
    return {k.removeprefix(prefix): v for k, v in tensors("slot_attention").items() if k.startswith(prefix)}


def released_checkpoint():
    """The recorded weights under the names of a SlotContrast file, with parts that must be dropped."""
    names = {}
    for name, tensor in weights("weights.").items():
        prefix = next((p for p in RENAMED if name.startswith(p)), "")
        if not name.startswith("random_initializer."):
            names[RENAMED.get(prefix, "") + name.removeprefix(prefix)] = tensor
    dropped = ("decoder.module.pos_emb", "encoder.module.output_transform.layers.0.weight")
    return names | {name: torch.zeros(1) for name in dropped}


def grouper():
    built = load_slotcontrast(released_checkpoint())
    built.first_iterations, built.next_iterations = 3, 2
    return built


def scan(grouper):
    features, steps, predicted = recorded("features"), [], []
    for t in range(features.shape[1]):
        tokens = features[:, t]
        steps.append(grouper.first(tokens) if t == 0 else grouper.next(steps[-1].slots, tokens))
        predicted.append(grouper.predict(steps[-1].slots))
    slots, assignment = (torch.stack(x, dim=1) for x in zip(*steps))
    return slots, assignment, torch.stack(predicted, dim=1)


def recorded_loss(slots, name, direction="col"):
    tau, whole_batch = LOSSES[name]
    steps = slots.transpose(0, 1)  # [T, B, S, C]
    steps = steps.flatten(1, 2) if whole_batch else steps
    return contrast(steps[:-1], steps[1:], tau=tau, direction=direction)


@pytest.mark.parametrize("case, iterations", [("single_iter1", 1), ("single", 2)])
def test_slot_attention_equals_the_published_one(case, iterations):
    attention = SlotAttention(64)
    attention.load_state_dict(weights("weights.grouper."))
    slots, assignment = attention(recorded("slots_initial"), recorded("features")[:, 0], iterations)
    torch.testing.assert_close(slots, recorded(f"{case}.slots"), **CLOSE)
    torch.testing.assert_close(assignment, recorded(f"{case}.masks"), **CLOSE)


def test_the_published_algorithm_of_the_gru_state_is_another_one():
    attention = SlotAttention(64, normalised_state=False)
    attention.load_state_dict(weights("weights.grouper."))
    slots, _ = attention(recorded("slots_initial"), recorded("features")[:, 0], 2)
    assert (slots - recorded("single.slots")).abs().max() > 0.01


def test_a_limit_above_all_logits_changes_nothing_and_a_tight_one_levels_the_assignment():
    loose, tight = SlotAttention(64, logit_limit=30.0), SlotAttention(64, logit_limit=1e-6)
    for attention in (loose, tight):
        attention.load_state_dict(weights("weights.grouper."))
    inputs = recorded("slots_initial"), recorded("features")[:, 0], 2
    torch.testing.assert_close(loose(*inputs).assignment, recorded("single.masks"), **CLOSE)
    torch.testing.assert_close(tight(*inputs).assignment, torch.full((2, 7, 30), 1 / 7))


def test_both_initialisers_equal_the_published_ones():
    learned, drawn = LearnedInit(7, 64), RandomInit(7, 64)
    learned.load_state_dict(weights("weights.initializer."))
    drawn.load_state_dict(weights("weights.random_initializer."))
    torch.testing.assert_close(learned((2,)), recorded("slots_initial"), atol=0, rtol=0)
    torch.testing.assert_close(drawn.place(recorded("random_init.noise")), recorded("random_init.out"), **CLOSE)


def test_the_predictor_equals_the_published_one_only_with_the_released_scale():
    outputs = {}
    for scale in ("released", 4.0, "standard"):
        predictor = Predictor(64, hidden=128, attn_scale=scale)
        predictor.load_state_dict(weights("weights.predictor."))
        outputs[scale] = predictor(recorded("single_iter1.slots"))
    torch.testing.assert_close(outputs["released"], recorded("predictor.out"), **CLOSE)
    torch.testing.assert_close(outputs[4.0], outputs["released"], atol=0, rtol=0)
    assert (outputs["standard"] - recorded("predictor.out")).abs().max() > 0.01


def test_the_scan_over_time_equals_the_published_one():
    slots, assignment, predicted = scan(grouper())
    torch.testing.assert_close(slots, recorded("scan.state"), **CLOSE)
    torch.testing.assert_close(predicted, recorded("scan.state_predicted"), **CLOSE)
    torch.testing.assert_close(assignment, recorded("scan.masks"), **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_the_contrastive_losses_and_their_gradients_equal_the_published_ones(name):
    slots = recorded("scan.state").requires_grad_()
    loss = recorded_loss(slots, name)
    loss.backward()
    torch.testing.assert_close(loss.reshape(1), recorded(f"contrastive.{name}.loss"), **CLOSE)
    # The gradients are small: measured against their own size, not against the tolerance of the outputs.
    expected = recorded(f"contrastive.{name}.grad")
    torch.testing.assert_close(slots.grad, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def test_the_published_loss_takes_its_softmax_over_the_earlier_slots():
    slots = recorded("scan.state")
    assert abs(recorded_loss(slots, "batch", "row") - recorded("contrastive.batch.loss")) > 1e-4


def test_gradients_through_the_whole_scan_equal_the_published_ones():
    model = grouper()
    recorded_loss(scan(model)[0], "batch").backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in weights("e2e.grad.").items():
        ours = name.replace("predictor.", "predictor.blocks.0.")
        torch.testing.assert_close(gradients[ours], expected, **CLOSE)


def test_a_fresh_grouper_has_the_names_and_sizes_of_the_released_one():
    assert sum(p.numel() for p in Grouper.fresh().parameters()) == 448 + 70_720 + 49_984
    assert set(Grouper.fresh().state_dict()) == set(grouper().state_dict())
