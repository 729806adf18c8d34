"""The `narrative` memory repeats MemFlow's recorded rollouts, keeps what fits the prompt and activates what fits the chunk."""

from dataclasses import replace

import pytest
import torch

from slotmemory.backbones.attention import attend
from slotmemory.errors import InputError
from slotmemory.memories.narrative import Activated
from slotmemory.memory import build
from tests.memories.rollouts import CLOSE, TWO, rotated_keys, stepped
from tests.memories.seen import LAYOUT, now, prompt, stream, tell, written
from tests.recorded import facts, tensors

PER_FRAME = LAYOUT.tokens_per_frame
SCENARIOS = {
    "single_dense": ({0: "p0"}, dict(compat="single")),
    "single_sma": ({0: "p0"}, dict(compat="single", active=3)),
    "switch_dense": ({0: "p0", 7: "p1"}, dict(compat="interactive")),
    "switch_sma": ({0: "p0", 7: "p1"}, dict(compat="interactive", active=3)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_rollouts_and_every_banks_frames_equal_the_published_ones(name):
    g, scenario = tensors("memflow_bank_rollout"), facts("memflow_bank_rollout")["scenarios"][name]
    prompts, options = SCENARIOS[name]
    latents, states, flows = stepped("narrative", TWO, scenario["frames"], prompts, sink=3, window=9, **options)
    torch.testing.assert_close(latents, g[f"{name}.latents"], **CLOSE)
    for flow in (flow for flow in flows if flow.shape[1] != 3):
        torch.testing.assert_close(flow, g[f"{name}.recache0.flow"][:, -flow.shape[1] :], **CLOSE)
    # the published program takes a frame in at the first step of the chunk after it
    shown = {c["start_frame"] // 3: c["bank_slots_by_layer"] for c in scenario["calls"] if c["timestep"] == 1000}
    for chunk, state in enumerate(states[:-1], 1):
        published = [[int(slot.partition("@frame")[2]) for slot in bank if slot != "empty"] for bank in shown[chunk]]
        assert [bank.born[0].tolist() for bank in state["bank"]] == published
    bank = states[-2]["bank"]
    held = bank[0].tokens
    torch.testing.assert_close(torch.stack([rotated_keys(b) for b in bank]), g[f"{name}.bank_k"][:, :, :held], **CLOSE)
    torch.testing.assert_close(
        torch.stack([b.values.flatten(1, 2) for b in bank]), g[f"{name}.bank_v"][:, :, :held], **CLOSE
    )


def born(state, layer=0):
    return state["bank"][layer].born.tolist()


def test_every_third_chunk_gives_its_first_frame_and_none_is_stored_twice():
    states = list(stream(build("narrative", LAYOUT), 20))
    assert [born(state)[0] for state in states[:9]] == [[0]] * 3 + [[0, 9]] * 3 + [[0, 9, 18]] * 3
    for chunk, state in enumerate(states[9:], 9):
        for layer in range(LAYOUT.layers):
            (kept,) = born(state, layer)
            assert kept[-1] == chunk // 3 * 9 and len(set(kept)) == 3 and kept == sorted(kept)
    assert born(states[9]) == born(states[10])


def test_a_full_bank_keeps_the_frames_that_fit_the_words_of_the_prompt_best():
    """One stored frame is made of the prompt's own mean word, another of its opposite: the one stays, the other goes."""
    memory, text = build("narrative", LAYOUT, bank=2, record_every=1), prompt(3)

    def told(seen, layer, sign):
        words = now(0, text).words(layer)[:, None]
        keys = seen.keys.clone()
        keys[:, :PER_FRAME] = sign * words
        return seen._replace(keys=keys)

    for good in (0, 1):
        state = memory.start(1)
        for chunk in range(3):
            sign = 0.1 if chunk == 2 else 1 if chunk == good else -1
            shown = written(now(chunk, text), change=lambda seen, layer, sign=sign: told(seen, layer, sign))
            state = tell(memory, state, shown)
        for layer in range(LAYOUT.layers):
            assert born(state, layer) == [[3 * good, 6]]


def test_padding_does_not_count_unless_the_published_program_is_repeated():
    """All words but the first are called padding: only the repetition of the program still listens to them."""
    quiet = prompt(3)
    loud = [(torch.cat((keys[:, :1], 9 * keys[:, 1:].flip(1)), 1), values) for keys, values in quiet]
    found = {}
    for compat in ("", "interactive"):
        for name, text in (("quiet", quiet), ("loud", loud)):
            memory = build("narrative", LAYOUT, bank=2, record_every=1, compat=compat)
            state = memory.start(1)
            for chunk in range(3):
                moment = replace(now(chunk, text), text_tokens=torch.tensor([1]))
                state = tell(memory, state, written(moment))
            found[compat, name] = state["bank"][0].score
    assert torch.equal(found["", "quiet"], found["", "loud"])
    assert not torch.equal(found["interactive", "quiet"], found["interactive", "loud"])


def random_chunk(seed, tokens, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, tokens, 2, 4, generator=generator) for _ in range(3)]


def chosen_by_hand(query, context, own, frames, active, per_frame):
    """Sparse activation spelled out: head by head, row by row, one softmax over what was chosen."""
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            keys, values = (x[row : row + 1, :, head : head + 1] for x in context)
            fit = [float(query[row, :, head].mean(0) @ k[0, :, 0].mean(0)) for k in keys.split(per_frame, 1)[:frames]]
            best = sorted(range(frames), key=fit.__getitem__)[-active:]
            seen = [i for i in range(keys.shape[1]) if i // per_frame in best or i >= frames * per_frame]
            keys, values = (
                torch.cat((x[:, seen], y[row : row + 1, :, head : head + 1]), 1) for x, y in zip((keys, values), own)
            )
            out[row, :, head] = attend(query[row : row + 1, :, head : head + 1], keys, values)[0, :, 0]
    return out


@pytest.mark.parametrize("gradients", [False, True])
def test_each_head_of_each_row_attends_to_the_frames_that_fit_it_best_in_every_pass(gradients):
    per_frame, frames, active = 3, 5, 2
    context = random_chunk(0, 7 * per_frame)[1:]
    pattern = Activated([context], [frames], per_frame, active)
    for step in (1, 2):  # another query in the second step chooses other frames of the same buffer
        query, *own = random_chunk(step, 2 * per_frame)
        if gradients:
            query, own = query.requires_grad_(), [x.requires_grad_() for x in own]
        found = pattern(0, query, *own)
        expected = chosen_by_hand(query.detach(), context, [x.detach() for x in own], frames, active, per_frame)
        torch.testing.assert_close(found.detach(), expected)
        if gradients:
            asked = torch.autograd.grad(found.square().sum(), [query, *own])
            assert all(float(x.abs().sum()) > 0 for x in asked)


def test_activating_all_frames_is_attending_to_everything():
    context = random_chunk(0, 12)[1:]
    query, *own = random_chunk(1, 6)
    everything = attend(query, *(torch.cat((a, b), 1) for a, b in zip(context, own)))
    torch.testing.assert_close(Activated([context], [4], 3, 4)(0, query, *own), everything)


def test_a_budget_gives_a_third_to_the_bank_and_the_rest_to_sink_and_window():
    memory = build("narrative", LAYOUT, 6 * PER_FRAME)
    assert (memory.bank, memory.sink, memory.past) == (2, 3, 1)
    assert build("narrative", LAYOUT).budget == (3 + 6 + 3) * PER_FRAME


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bank=-1), "bank=-1 is too small; use 0 or more"),
        (dict(active=0), "active=0 is too small; use 1 or more"),
        (dict(compat="singel"), "unknown compat 'singel'; did you mean 'single'?"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("narrative", LAYOUT, **options)
    assert message in str(refusal.value)
