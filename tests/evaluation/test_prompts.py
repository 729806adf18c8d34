"""Following prompts: the world's own frames do, another story's do not, and half-way entrances ask nothing."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.evaluation import prompts
from slotmemory.evaluation.reader import Reader
from slotmemory.world import Narrative

TOLD = [
    "The meadow is empty.",
    "A red cat waits in the meadow.",
    "A blue ghost waits and a red cat jumps on the beach.",
    "A blue ghost walks in the snow.",
]


@pytest.fixture(scope="module")
def reader():
    return Reader.load()


def video(told, seed=3, chunks_per_shot=5):
    narrative = Narrative.from_prompts(told, seed, chunks_per_shot)
    return torch.from_numpy(narrative.render()), narrative


def test_the_worlds_own_frames_follow_their_prompts(reader):
    frames, narrative = video(TOLD)
    found = prompts.measure(frames, narrative, reader)
    assert found.at_cuts == 1.0 and found.between > 0.9 and found.kept > 0.8


def test_who_stays_after_a_cut_is_seen_at_once_and_only_there(reader):
    frames, narrative = video(TOLD)
    cut = narrative.shots[2].start_chunk
    late = frames.clone()
    span = prompts.chunk_frames(cut)
    late[span.start : span.stop] = frames[span.start - 1]
    honest, found = prompts.measure(frames, narrative, reader), prompts.measure(late, narrative, reader)
    assert found.at_cuts == 0.5 and found.between == honest.between


def test_other_kinds_and_colours_are_not_what_was_asked_for(reader):
    frames, narrative = video(TOLD)
    other, _ = video([told.replace("cat", "robot").replace("blue", "green") for told in TOLD])
    found = prompts.measure(other, narrative, reader)
    assert found.at_cuts == 0.5  # of the two cuts, one shows two, whose looks are not read
    assert found.between < prompts.measure(frames, narrative, reader).between - 0.3


def test_changed_clothes_are_not_kept(reader):
    frames, narrative = video(TOLD[3:], chunks_per_shot=4)
    others = (video(TOLD[3:], seed, chunks_per_shot=4) for seed in range(4, 40))
    looks = narrative.entities[0]
    changed = next(v for v, n in others if n.entities[0].accessory != looks.accessory)
    middle = prompts.chunk_frames(2).start
    found = prompts.measure(torch.cat((frames[:middle], changed[middle:])), narrative, reader)
    assert prompts.measure(frames, narrative, reader).kept == 1.0 and found.kept == pytest.approx(2 / 3)


def test_chunks_in_which_somebody_is_half_way_ask_nothing():
    _, narrative = video(TOLD[:2])
    asked = [prompts.sure(narrative, chunk) for chunk in range(narrative.chunks)]
    assert asked[:5] == [[]] * 5 and None in asked[5:8] and asked[-1] == [0]
    assert prompts.judge([], narrative) == (None, None, None)


def test_a_video_of_another_length_is_refused(reader):
    frames, narrative = video(TOLD[:1])
    with pytest.raises(InputError, match=f"a video of {len(frames) - 1} frames for a narrative of {len(frames)}"):
        prompts.measure(frames[:-1], narrative, reader)
