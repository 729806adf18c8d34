"""Clips of video files: the stream's size and rate, prompts beside them, bad files skipped and counted."""

import av
import numpy as np
import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.training.videos import Videos, fitted

LAYOUT = Layout(32, 48, 16, layers=1, heads=1, head_dim=8, text_tokens=4, latent_channels=4, patch=(1, 1, 1))


def write_video(path, frames, rate=16, height=32, width=48):
    """A video whose frame number is its brightness, in steps of 4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 10**7
        for number in range(frames):
            image = np.full((height, width, 3), 4 * number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def brightness(pixels) -> torch.Tensor:
    return pixels.float().mean((1, 2, 3)) / 4


def test_a_clip_has_whole_chunks_at_the_streams_rate(tmp_path):
    write_video(tmp_path / "fast.mp4", 60, rate=32)
    (tmp_path / "fast.txt").write_text("a  red\ncat\n")
    pixels, prompt = Videos(tmp_path, LAYOUT).clip(3, 7)
    assert pixels.shape == (LAYOUT.frames(6), 3, 32, 48) and pixels.dtype == torch.uint8  # 30 frames hold two chunks
    steps = brightness(pixels).diff()
    assert prompt == "a red cat" and steps.mean() == pytest.approx(2, abs=0.1)


def test_a_slow_video_shows_its_frames_longer(tmp_path):
    write_video(tmp_path / "slow.mp4", 20, rate=8)
    pixels, prompt = Videos(tmp_path, LAYOUT).clip(0, 1)
    assert len(pixels) == 9 and brightness(pixels).diff().mean() == pytest.approx(0.5, abs=0.1) and prompt == ""


def test_a_clip_is_a_function_of_its_seed(tmp_path):
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", 60)
    videos = Videos(tmp_path, LAYOUT)
    assert torch.equal(videos.clip(5, 1)[0], Videos(tmp_path, LAYOUT).clip(5, 1)[0])
    assert len({float(brightness(videos.clip(seed, 1)[0])[0]) for seed in range(8)}) > 2


def test_pictures_cover_the_size_and_lose_both_sides_alike():
    wide = torch.zeros(1, 3, 32, 96, dtype=torch.uint8)
    wide[..., 24:72] = 200
    assert fitted(wide, 32, 48).float().mean() == 200
    assert fitted(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8), 32, 48).shape == (2, 3, 32, 48)


def test_bad_files_are_skipped_by_name_and_counted(tmp_path, caplog):
    (tmp_path / "inside").mkdir()
    write_video(tmp_path / "inside" / "good.mp4", 20)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    write_video(tmp_path / "short.mp4", 5)
    (tmp_path / "notes.md").write_text("no video, and none expected")
    videos = Videos(tmp_path, LAYOUT)
    assert [path.name for path in videos.frames] == ["good.mp4"] and videos.skipped == 2
    assert "broken.mp4" in caplog.text and "short.mp4 has 5 frames" in caplog.text and "2 of 3 videos" in caplog.text


def test_a_folder_of_only_bad_files_is_an_error(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no video that can be used, of 1 files"):
        Videos(tmp_path, LAYOUT)
    with pytest.raises(InputError, match="is no folder of videos"):
        Videos(tmp_path / "none", LAYOUT)


def test_videos_that_are_only_measured_are_not_learnt_from(tmp_path, caplog):
    write_video(tmp_path / "only.mp4", 30)
    alone = Videos(tmp_path, LAYOUT)
    assert [list(part.frames) for part in alone.split(2)] == [
        list(alone.frames)
    ] * 2 and "one video only" in caplog.text
    for number in range(10):
        write_video(tmp_path / f"{number}.mp4", 30)
    learnt, measured = (set(part.frames) for part in Videos(tmp_path, LAYOUT).split(4))
    assert len(measured) == 2 and len(learnt) == 9 and not learnt & measured  # a fifth of 11


def test_videos_shorter_than_what_is_asked_for_are_skipped(tmp_path, caplog):
    write_video(tmp_path / "long.mp4", 60)
    write_video(tmp_path / "short.mp4", 20)
    assert [path.name for path in Videos(tmp_path, LAYOUT, 3).frames] == ["long.mp4"]
    assert "short.mp4 has 20 frames at 16 per second, 3 chunks have" in caplog.text
