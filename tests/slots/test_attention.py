"""What slot attention promises beside the recorded numbers: symmetry, rows, precision, seeds."""

import pytest
import torch

from slotmemory.slots import Adapter, Grouper, LayerAdapters, LearnedInit, Predictor, RandomInit, SlotAttention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sharp(dim=16):
    """Random weights, scaled so that slots disagree."""
    attention = SlotAttention(dim)
    with torch.no_grad():
        attention.to_q.weight *= 4
        attention.to_k.weight *= 4
    return attention


def test_permuting_the_slots_permutes_slots_and_assignment():
    attention, predictor = sharp(), Predictor(16)
    slots, tokens, order = torch.randn(2, 5, 16), torch.randn(2, 40, 16), torch.tensor([3, 0, 4, 1, 2])
    plain, permuted = attention(slots, tokens, 3), attention(slots[:, order], tokens, 3)
    torch.testing.assert_close(permuted.slots, plain.slots[:, order])
    torch.testing.assert_close(permuted.assignment, plain.assignment[:, order])
    torch.testing.assert_close(predictor(slots[:, order]), predictor(slots)[:, order])


def test_permuting_the_tokens_permutes_only_the_assignment():
    attention, order = sharp(), torch.randperm(40)
    slots, tokens = torch.randn(2, 5, 16), torch.randn(2, 40, 16)
    plain, permuted = attention(slots, tokens, 3), attention(slots, tokens[:, order], 3)
    torch.testing.assert_close(permuted.slots, plain.slots)
    torch.testing.assert_close(permuted.assignment, plain.assignment[..., order])


def test_every_token_is_shared_out_whole():
    _, assignment = sharp()(torch.randn(5, 16), torch.randn(40, 16), 2)
    torch.testing.assert_close(assignment.sum(dim=-2), torch.ones(40))
    assert assignment.std(dim=-2).mean() > 0.05


def test_layers_and_rows_do_not_leak_into_each_other():
    grouper, tokens = Grouper.fresh(4, 16), torch.randn(3, 2, 20, 16)
    together = grouper.next(grouper.first(tokens).slots, tokens)
    for layer in range(3):
        for row in range(2):
            alone = grouper.next(grouper.first(tokens[layer, row]).slots, tokens[layer, row])
            torch.testing.assert_close(alone.slots, together.slots[layer, row])
            torch.testing.assert_close(alone.assignment, together.assignment[layer, row])


def test_a_slot_that_no_token_chose_reads_the_mean_of_all_tokens():
    attention, tokens = SlotAttention(8), torch.randn(30, 8)
    tokens[:, 0] += 20  # what all tokens share, slot 0 asks for and slot 1 shuns
    slots = torch.tensor([[5.0], [-5.0]]) * torch.eye(8)[0]
    with torch.no_grad():
        attention.to_q.weight.copy_(1e3 * torch.eye(8))
        attention.to_k.weight.copy_(torch.eye(8)[0] * torch.eye(8))
    after, assignment = attention(slots, tokens, 1)
    assert bool((assignment[1] == 0).all())
    mean = attention.to_v(attention.norm_features(tokens)).mean(dim=0, keepdim=True)
    expected = attention.mlp(attention.gru(mean, attention.norm_slots(slots[1:])))
    torch.testing.assert_close(after[1:], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_and_autocast_are_computed_in_fp32(dtype):
    grouper, adapter, tokens = Grouper.fresh(4, 16), Adapter(24, 16), torch.randn(2, 20, 24).to(dtype)
    plain = grouper.next(grouper.first(adapter(tokens.float())).slots, adapter(tokens.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = grouper.next(grouper.first(adapter(tokens)).slots, adapter(tokens))
    for expected, given in zip(plain, lowered):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, expected, atol=0, rtol=0)


def test_casting_the_model_around_it_leaves_the_slot_weights_in_fp32():
    grouper = Grouper.fresh(4, 16)
    before = {name: p.clone() for name, p in grouper.named_parameters()}
    around = torch.nn.ModuleList([torch.nn.Linear(2, 2), grouper, LayerAdapters(2, 8, 16)]).to(torch.bfloat16)
    assert around[0].weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in around[2].parameters())
    for name, p in grouper.named_parameters():
        torch.testing.assert_close(p, before[name], atol=0, rtol=0)
    assert grouper.double().initializer.slots.dtype == torch.float64


def test_the_recurrence_stays_that_of_fp32_over_forty_chunks_inside_a_bf16_model():
    surroundings = torch.nn.Sequential(Grouper.fresh(4, 16)).to(torch.bfloat16)
    plain = Grouper.fresh(4, 16)
    plain.load_state_dict(surroundings[0].state_dict())
    chunks = torch.randn(40, 60, 16).bfloat16()
    outer, inner = plain.first(chunks[0].float()), surroundings[0].first(chunks[0])
    agreement = []
    for chunk in chunks:
        outer = plain.next(outer.slots, chunk.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inner = surroundings[0].next(inner.slots, chunk)
        agreement.append((outer.assignment.argmax(-2) == inner.assignment.argmax(-2)).float().mean())
    assert torch.stack(agreement).mean() >= 0.999


def test_random_slots_follow_the_generator_and_refuse_to_go_without():
    start = RandomInit(5, 16)
    one, same, other = (start((3,), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    torch.testing.assert_close(one, same, atol=0, rtol=0)
    assert (one - other).abs().max() > 0.1
    assert one.shape == (3, 5, 16) and abs(one.std() / 16**-0.5 - 1) < 0.2
    with pytest.raises(ValueError, match="torch.Generator"):
        start((3,))


def test_a_learned_start_is_the_same_for_every_row_and_any_generator():
    start = LearnedInit(5, 16)
    rows = start((2, 3), torch.Generator().manual_seed(1))
    assert rows.shape == (2, 3, 5, 16) and bool((rows == start.slots[0]).all())


def test_the_first_chunk_takes_three_iterations_and_a_later_one_two():
    grouper, tokens = Grouper.fresh(4, 16), torch.randn(20, 16)
    first = grouper.first(tokens)
    torch.testing.assert_close(first.slots, grouper.grouper(grouper.initializer(()), tokens, 3).slots)
    later = grouper.next(first.slots, tokens)
    torch.testing.assert_close(later.slots, grouper.grouper(grouper.predict(first.slots), tokens, 2).slots)


def test_adapting_all_layers_at_once_equals_adapting_one_at_a_time():
    stacked, features = LayerAdapters(3, 24, 16), torch.randn(3, 2, 20, 24)
    with torch.no_grad():
        for p in stacked.parameters():
            p.add_(torch.randn_like(p))
    together = stacked(features)
    assert together.shape == (3, 2, 20, 16)
    for layer in range(3):
        single = Adapter(24, 16)
        single.norm.weight.data, single.norm.bias.data = stacked.norm_weight[layer], stacked.norm_bias[layer]
        single.linear.weight.data, single.linear.bias.data = stacked.weight[layer], stacked.bias[layer]
        torch.testing.assert_close(together[layer], single(features[layer]), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(stacked.one(layer, features[layer]), single(features[layer]))


def test_the_adapter_has_the_size_of_the_papers_account():
    assert sum(p.numel() for p in Adapter(1536, 64).parameters()) == 101_440


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="iterations=0"):
        SlotAttention(8)(torch.zeros(2, 8), torch.zeros(4, 8), 0)
    with pytest.raises(ValueError, match="logit_limit=0"):
        SlotAttention(8, logit_limit=0)
    with pytest.raises(ValueError, match="heads=3"):
        Predictor(8, heads=3)
    with pytest.raises(ValueError, match="attn_scale='relased'"):
        Predictor(8, attn_scale="relased")
    with pytest.raises(ValueError, match="3 layers"):
        LayerAdapters(3, 24, 16)(torch.zeros(2, 1, 5, 24))
