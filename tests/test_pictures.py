"""The filmstrip and the memory timeline: what they show can be found in their pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from slotmemory.errors import InputError
from slotmemory.pictures import caption, filmstrip, timeline

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (40, 50, 220)


def plain(colour, count=2) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(count, 3, 48, 80).contiguous()


def where(path, colour) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of about a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.nonzero((np.abs(pixels - colour) < 12).all(-1))


def test_shots_stand_side_by_side_in_order_with_their_captions_below(tmp_path):
    shots = [plain(RED), plain(GREEN), plain(BLUE)]
    filmstrip(shots, [caption(i, i + 1, f"shot {i}") for i in range(3)], tmp_path / "f.png")
    (red_y, red_x), (_, green_x), (_, blue_x) = (where(tmp_path / "f.png", colour) for colour in (RED, GREEN, BLUE))
    assert red_x.max() < green_x.min() and green_x.max() < blue_x.min()
    pixels = np.asarray(Image.open(tmp_path / "f.png"))
    assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()
    assert (pixels[red_y.max() + 1 :, : red_x.max()] < 100).any()


def test_frames_of_a_shot_follow_downwards(tmp_path):
    shot = np.concatenate([plain(RED, 1).numpy(), plain(BLUE, 1).numpy()])
    filmstrip([shot], ["0:00 - 0:01\na"], tmp_path / "f.png")
    assert where(tmp_path / "f.png", RED)[0].max() < where(tmp_path / "f.png", BLUE)[0].min()


def test_labels_stand_to_the_left_of_their_frames(tmp_path):
    shot = np.concatenate([plain(RED, 1).numpy(), plain(BLUE, 1).numpy()])
    filmstrip([shot, shot], ["0:00\na", "0:01\nb"], tmp_path / "f.png", frame_width=160, labels=["above", "below"])
    dark = (np.asarray(Image.open(tmp_path / "f.png")) < 100).all(-1)
    for colour in (RED, BLUE):
        rows, columns = where(tmp_path / "f.png", colour)
        assert len(rows) == 2 * 160 * 96
        assert dark[rows.min() : rows.max(), : columns.min()].any()


def test_eight_shots_make_two_rows_and_each_is_enlarged(tmp_path):
    filmstrip([plain(RED, 1)] * 8, ["0:00\nwords " * 3] * 8, tmp_path / "f.png", frame_width=160)
    rows, columns = where(tmp_path / "f.png", RED)
    assert len(rows) == 8 * 160 * 96
    assert len(np.unique(columns)) == 4 * 160 and len(np.unique(rows)) == 2 * 96


@pytest.mark.parametrize("words", ["", "x" * 4096, "word " * 800, "\u2603 caf\xe9 \U0001f600"])
def test_any_prompt_can_be_a_caption(tmp_path, words):
    filmstrip([plain(RED, 1)], [caption(0, 3671, words)], tmp_path / "f.png", frame_width=120)
    assert Image.open(tmp_path / "f.png").size[1] < 400
    timeline([{"prompt": words, "shot": 0}], tmp_path / "t.png")


def test_captions_say_the_time():
    assert caption(5, 65.4, "A cat.") == "0:05 - 1:05\nA cat."


def test_shots_without_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 shots and 0 captions"):
        filmstrip([plain(RED)], [], tmp_path / "f.png")
    with pytest.raises(ValueError, match="expected .3, H, W. of uint8"):
        filmstrip([plain(RED).float()], ["a"], tmp_path / "f.png")


def record(chunk: int, items: list[dict], **more) -> dict:
    seconds = [chunk * 0.75, (chunk + 1) * 0.75]
    return {"chunk": chunk, "seconds": seconds, "shot": 0, "prompt": "a", "items": items, **more}


def item(read: bool, owner: int = 0, born: int = 0) -> dict:
    return {"id": f"slots:{born}.{owner}", "kind": "slots", "born": born, "owner": owner, "tokens": 16, "read": read}


SLOT_0 = (45, 123, 194)


def columns(path, colour) -> int:
    """How many pixel columns show a colour, above the legend."""
    rows, found = where(path, colour)
    return len(np.unique(found[rows < Image.open(path).size[1] - 60]))


def test_an_item_is_full_where_it_is_read_and_pale_where_it_is_only_held(tmp_path):
    records = [record(k, [item(read=k >= 5)] if k < 8 else []) for k in range(10)]
    timeline(records, tmp_path / "t.png", width=1166)  # 1000 pixels for 10 chunks
    assert columns(tmp_path / "t.png", SLOT_0) == pytest.approx(300, abs=3)
    pale = tuple(round(c + (255 - c) * 0.68) for c in SLOT_0)
    assert columns(tmp_path / "t.png", pale) == pytest.approx(500, abs=3)


def test_an_eviction_is_marked_at_its_end(tmp_path):
    held = [record(k, [item(True)]) for k in range(5)]
    timeline([*held, record(5, [])], tmp_path / "kept.png")
    timeline([*held[:4], record(4, [item(True)], evicted=["slots:0.0"]), record(5, [])], tmp_path / "evicted.png")
    kept, evicted = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("kept.png", "evicted.png"))
    assert kept.shape == evicted.shape
    changed = np.nonzero((kept != evicted).any(-1))
    assert 0 < len(np.unique(changed[1])) <= 4
    assert (evicted[changed] < 60).all(-1).any()


def test_slots_differ_in_colour(tmp_path):
    timeline([record(0, [item(True, owner) for owner in range(7)])], tmp_path / "t.png")
    bars = np.asarray(Image.open(tmp_path / "t.png").convert("HSV"))[:-60, 400]
    hues = np.unique(bars[bars[:, 1] > 100][:, 0]).astype(int)
    assert len(hues) == 7 and np.diff(hues).min() > 10


def test_frames_stand_above_the_chunk_they_belong_to(tmp_path):
    records = [record(k, []) for k in range(10)]
    timeline(records, tmp_path / "t.png", frames={0: plain(RED)[0], 5: plain(BLUE)[0], 99: plain(GREEN)[0]}, width=1166)
    assert where(tmp_path / "t.png", RED)[1].min() == pytest.approx(130 + 6, abs=2)
    assert where(tmp_path / "t.png", BLUE)[1].min() == pytest.approx(630 + 6, abs=2)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{}],
        [{"chunk": 3}, {"items": [{}, {"kind": "x", "owner": None, "score": None}]}],
        [{"read": {"a": 0}, "items": None, "evicted": ["unknown"], "prompt": None}, {"seconds": [0, 1]}],
        [{"seconds": [5, 5], "read": {"a": 7}}],
        [{"items": [item(True, owner, born) for owner in range(40) for born in range(30)]}],
    ],
)
def test_missing_parts_are_drawn_as_far_as_they_go(tmp_path, records):
    timeline(records, tmp_path / "t.png")
    width, height = Image.open(tmp_path / "t.png").size
    assert width == 1800 and 100 < height < 1000


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot write .*: no such file or folder"):
        timeline([], tmp_path / "none" / "t.png")
