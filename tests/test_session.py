"""A session either finishes a chunk or stays as it was, follows its script, and keeps its streams apart."""

import sys
import weakref
from dataclasses import replace

import pytest
import torch

from slotmemory import memory
from slotmemory.contract import TWO_PROMPTS, ToyCodec, Trial, difference, latents_of, toy
from slotmemory.errors import InputError
from slotmemory.script import parse_yaml
from slotmemory.session import Chunk, SeededNoise, Session

LENGTH = toy().layout.frames_per_chunk


def session(name="sink", prompts=TWO_PROMPTS, chunks=6, seeds=(7,), **parts) -> Session:
    policy = Trial(memory.find(name)).memory(recache=True)
    return Session(replace(toy(), memory=policy, **parts), dict(prompts), chunks, seeds)


def state_of(stream: Session) -> dict:
    return stream.snapshot()


# interruptions


class Interrupted(KeyboardInterrupt):
    pass


class Faulty(torch.nn.Module):
    """The toy backbone, failing at every n-th call."""

    def __init__(self, every: int, error: type[BaseException]):
        super().__init__()
        model = self.model = toy().backbone
        self.every, self.error, self.calls = every, error, 0
        self.patch_embedding, self.dtype, self.text_keys = model.patch_embedding, model.dtype, model.text_keys

    def forward(self, *inputs):
        self.calls += 1
        if self.calls % self.every == 0:
            raise self.error("stop")
        return self.model(*inputs)


@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
@pytest.mark.parametrize("name", ["sink", "slots"])
def test_a_step_interrupted_in_the_model_leaves_the_session_as_it_was(name, error):
    # a chunk calls the model three times, a chunk with a replay four: every fifth call is each of them in turn
    whole, stream = latents_of(session(name)), session(name, backbone=Faulty(5, error))
    made, failures = [], 0
    while not stream.done:
        before = state_of(stream)
        try:
            made.append(stream.step().latents)
        except error:
            failures += 1
            assert difference(before, state_of(stream), "session") is None
    assert failures >= 3
    assert torch.equal(torch.cat(made, 1), whole)


def test_an_interruption_at_any_line_of_a_step_falls_before_it_or_after_it():
    code = Session.step.__wrapped__.__code__
    ready = session()
    for _ in range(4):
        ready.step()
    before, finished = state_of(ready), ready.fork()
    finished.step()
    after = state_of(finished)

    def interrupted_at(line: int) -> Session | None:
        """Step a fork, with Ctrl-C as the line is reached; None if it never is."""
        stream, reached = ready.fork(), False

        def trace(frame, event, _):
            nonlocal reached
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line and not reached:
                reached = True
                raise Interrupted
            return trace

        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            stream.step()
        except Interrupted:
            pass
        finally:
            sys.settrace(tracing)
        return stream if reached else None

    found = {"before": 0, "after": 0}
    for line in sorted({line for *_, line in code.co_lines() if line}):
        stream = interrupted_at(line)
        if stream is None:
            continue
        now = state_of(stream)
        assert difference(before, now, "session") is None or difference(after, now, "session") is None, line
        found["after" if stream.index == finished.index else "before"] += 1
    assert found["before"] > 20 and found["after"] >= 1


@pytest.mark.parametrize("part", ["memory", "codec", "trace"])
def test_a_step_that_fails_after_the_model_is_undone_too(part, monkeypatch):
    stream, whole = session(), latents_of(session())
    made = [stream.step().latents]
    before = state_of(stream)

    def fail(*given):
        raise OSError("no")

    with monkeypatch.context() as patch:
        if part == "memory":
            patch.setattr(stream.engine.memory, "update", fail)
        elif part == "codec":
            patch.setattr(ToyCodec, "push", fail)
        else:
            patch.setattr("slotmemory.session.record", fail)
        with pytest.raises((OSError, InputError), match="no"):
            stream.step()
    assert difference(before, state_of(stream), "session") is None
    made += [chunk.latents for chunk in stream]
    assert torch.equal(torch.cat(made, 1), whole)


def test_a_chunk_that_is_not_finite_is_dropped_with_the_name_of_the_memory():
    stream = session("window")
    stream.step()
    before = state_of(stream)
    stream.state["window"][0].values[:] = float("nan")
    with pytest.raises(InputError, match="memory 'window' read values that are not finite in layer 0 at chunk 1"):
        stream.step()
    assert stream.index == 1 and difference(before["noise"], stream.noise.state(), "noise") is None


# the script


def test_the_codec_decodes_when_what_was_read_and_seen_is_gone(monkeypatch):
    passes, alive = [], []
    clean = Session._clean_pass

    def remembered(self, *given):
        written = clean(self, *given)
        passes.append([weakref.ref(x) for x in (written, written.pattern, written.layers[0].query)])
        return written

    class Decoder(ToyCodec):
        def push(self, latents, state):
            alive.extend(ref() for ref in passes[-1])
            return super().push(latents, state)

    monkeypatch.setattr(Session, "_clean_pass", remembered)
    stream = session("sink", codec=Decoder())
    stream.step()
    assert alive == [None] * 3


def test_a_stream_ends_with_its_script_and_says_so():
    stream = session(chunks=3)
    chunks = list(stream)
    assert [chunk.index for chunk in chunks] == [0, 1, 2] and stream.done
    with pytest.raises(InputError, match="the stream is over after 3 chunks"):
        stream.step()


def test_a_chunk_has_the_frames_seconds_and_prompt_of_its_place():
    engine = toy().with_memory("sink")
    chunks: list[Chunk] = list(session(chunks=5))
    assert chunks[0].latents.shape == (1, 3, 4, 8, 8) and chunks[0].frames.dtype == torch.uint8
    assert chunks[0].start == 0
    for a, b in zip(chunks, chunks[1:]):
        assert a.stop == b.start == engine.layout.chunk_start(b.index)
    assert [chunk.shot for chunk in chunks] == [0, 0, 0, 0, 1]
    assert chunks[4].prompt == TWO_PROMPTS[4]


def test_a_script_is_followed_shot_by_shot():
    script = parse_yaml("seed: 3\nshots:\n- {prompt: a red cat, seconds: 1.5}\n- {prompt: a dog, seconds: 1.5}\n")
    stream = toy().with_memory("window").session(script)
    assert stream.prompts == {0: "a red cat", 2: "a dog"} and stream.chunks == 4
    found = list(stream)
    assert [chunk.prompt for chunk in found] == ["a red cat"] * 2 + ["a dog"] * 2
    again = toy().with_memory("window").session(script, seed=3)
    assert torch.equal(torch.cat([c.latents for c in found], 1), latents_of(again))


def test_a_script_streams_from_its_file(tmp_path):
    path = tmp_path / "script.yaml"
    path.write_text("shots:\n- {prompt: a red cat, seconds: 1.5}\n")
    engine = toy().with_memory("window")
    (a, b), (c, d) = list(engine.stream(path, seed=1)), list(engine.stream(str(path), seed=1))
    assert torch.equal(a.latents, c.latents) and torch.equal(b.latents, d.latents)


def test_a_live_prompt_holds_from_the_next_chunk_until_the_scripts_next_shot():
    stream = session(chunks=6)
    stream.step()
    assert stream.prompt("a green bird") == 1
    told = [(chunk.prompt, chunk.trace["switched"]) for chunk in stream]
    bird, dog = "a green bird", TWO_PROMPTS[4]
    assert told == [(bird, True), (bird, False), (bird, False), (dog, True), (dog, False)]


def test_a_live_prompt_is_a_script_written_in_time():
    live, told = session(prompts={0: "a red cat"}), session(prompts={0: "a red cat", 2: "a dog"})
    made = [live.step().latents, live.step().latents]
    live.prompt("a dog")
    assert torch.equal(torch.cat([*made, latents_of(live)], 1), latents_of(told))


def test_the_same_prompt_again_is_no_switch():
    stream, quiet = session(prompts={0: "a red cat"}), session(prompts={0: "a red cat"})
    made = [stream.step().latents]
    stream.prompt("a red cat")
    chunks = list(stream)
    assert not any(chunk.trace["switched"] for chunk in chunks)
    assert torch.equal(torch.cat([*made, *[c.latents for c in chunks]], 1), latents_of(quiet))


def test_a_live_stream_has_no_end():
    stream = toy().with_memory("window").session("a red cat")
    for _ in range(3):
        stream.step()
    assert stream.chunks is None and not stream.done


def test_prompts_are_checked_before_anything_is_made():
    engine = toy().with_memory("none")
    with pytest.raises(InputError, match="prompt at chunk 3: the prompt is empty"):
        engine.session({0: "a cat", 3: "  "})
    with pytest.raises(InputError, match="needs a prompt for its first chunk"):
        engine.session({1: "a cat"})
    stream = engine.session("a cat")
    with pytest.raises(ValueError, match="the prompt is empty"):
        stream.prompt(" ")
    assert stream.prompts == {0: "a cat"}


# streams


def test_seeds_are_rows_of_a_batch_and_none_depends_on_its_neighbours():
    rows = latents_of(session("slots", seeds=(1, 2, 1)))
    assert rows.shape[0] == 3 and torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    other = latents_of(session("slots", seeds=(5, 2, 6)))
    torch.testing.assert_close(rows[1], other[1], atol=2e-4, rtol=0)
    torch.testing.assert_close(rows[1:2], latents_of(session("slots", seeds=(2,))), atol=2e-4, rtol=0)


def test_noise_of_a_row_is_its_seeds_alone_and_goes_on_from_a_saved_state():
    many, one = SeededNoise((1, 2)), SeededNoise((2,))
    shape = (3, 4, 2, 2)
    assert torch.equal(many.first((2, *shape))[1:], one.first((1, *shape)))
    saved = one.state()
    expected = one.fresh((1, *shape))
    one.restore(saved)
    assert torch.equal(one.fresh((1, *shape)), expected)
    assert torch.equal(many.fresh((2, *shape))[1:], expected)


def test_streams_on_one_engine_do_not_meet():
    engine = session("slots").engine
    a, b = (Session(engine, dict(TWO_PROMPTS), 5, (seed,)) for seed in (1, 2))
    made = [(a.step().latents, b.step().latents) for _ in range(5)]
    for seed, mine in zip((1, 2), zip(*made)):
        assert torch.equal(torch.cat(mine, 1), latents_of(Session(engine, dict(TWO_PROMPTS), 5, (seed,))))


def test_a_fork_shares_the_past_and_no_future():
    stream = session()
    stream.step()
    fork = stream.fork()
    fork.prompt("a green bird")
    mine, theirs = latents_of(stream), latents_of(fork)
    assert not torch.equal(mine, theirs)
    whole = session()
    whole.step()
    assert torch.equal(mine, latents_of(whole)) and stream.prompts == TWO_PROMPTS


def test_a_saved_session_goes_on_with_its_prompts_pixels_and_end(tmp_path):
    stream = session("slots", seeds=(3, 4))
    stream.step()
    stream.prompt("a green bird")
    for _ in range(2):
        stream.step()
    stream.save(tmp_path / "state")
    rest = list(stream)
    loaded = session("slots", prompts={0: "not this"}, chunks=None, seeds=(0, 0))
    loaded.load(tmp_path / "state")
    for a, b in zip(rest, list(loaded), strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)
        assert (a.prompt, a.shot, a.start) == (b.prompt, b.shot, b.start)
        assert {**a.trace, "milliseconds": 0} == {**b.trace, "milliseconds": 0}


def test_a_snapshot_does_not_change_while_the_session_goes_on():
    stream = session("slots")
    for _ in range(3):
        stream.step()
    saved = stream.snapshot()
    copied = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
    list(stream)
    assert difference(saved, copied, "snapshot") is None


@pytest.mark.parametrize("name", ["window", "sink", "everything"])
def test_known_latents_pushed_first_are_the_past_as_if_they_had_been_made_here(name):
    first = session(name, prompts={0: "a red cat"}, chunks=5)
    past = torch.cat([first.step().latents for _ in range(3)], 1)
    second = session(name, prompts={0: "a red cat"}, chunks=2)
    second.prefill(past)
    second.noise.restore(first.noise.state())
    assert second.frame == first.frame == 9 and second.index == 0
    torch.testing.assert_close(latents_of(second), latents_of(first), atol=2e-4, rtol=0)


def test_clean_passes_at_a_noise_level_draw_from_the_streams_own_noise():
    quiet, noisy = session("slots"), session("slots", context_noise=0.1)
    assert torch.equal(quiet.step().latents, noisy.step().latents)
    assert not torch.equal(quiet.step().latents, noisy.step().latents)
    again = latents_of(session("slots", context_noise=0.1))
    assert torch.equal(again, latents_of(session("slots", context_noise=0.1)))
