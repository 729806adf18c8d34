"""Video files: playable after a kill, byte-identical after a resume, honest when the disk is full."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.errors import InputError
from slotmemory.video import Fragments, VideoWriter, count_chunks, read_video
from tests.disk import file_size_limit

LENGTHS = (9, 12, 12, 12)


def chunks(lengths=LENGTHS, height=48, width=80, seed=0) -> list[torch.Tensor]:
    """Smooth moving frames, uint8 [T, 3, H, W] per chunk."""
    coarse = torch.rand(1, 3, 5, 8, generator=torch.Generator().manual_seed(seed))
    still = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    frames = torch.stack([(still.roll(2 * t, 2) * 255).to(torch.uint8) for t in range(sum(lengths))])
    return list(frames.split(list(lengths)))


def write(path, parts, **options) -> None:
    with VideoWriter(path, 16, 80, 48, **options) as video:
        for part in parts:
            video.write(part)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * float(np.log10(255**2 / (a.double() - b.double()).square().mean().item()))


def test_what_is_written_is_read_back_frame_by_frame(tmp_path):
    parts = chunks()
    write(tmp_path / "v.mp4", parts)
    frames = read_video(tmp_path / "v.mp4")
    assert frames.dtype == torch.uint8 and frames.shape == (45, 3, 48, 80)
    # chroma at half the resolution costs the most
    assert psnr(frames, torch.cat(parts)) > 26
    assert count_chunks(tmp_path / "v.mp4") == (4, 45)


def test_frames_stay_in_order_and_colours_true(tmp_path):
    levels = torch.arange(24, dtype=torch.uint8) * 10
    grey = levels[:, None, None, None].expand(24, 3, 48, 80)
    red = torch.tensor([200, 40, 40], dtype=torch.uint8)[None, :, None, None].expand(12, 3, 48, 80)
    write(tmp_path / "v.mp4", [grey[:12], grey[12:], red])
    frames = read_video(tmp_path / "v.mp4").float().mean((2, 3))
    assert (frames[:24] - levels[:, None]).abs().max() < 3
    assert (frames[24:] - torch.tensor([200.0, 40, 40])).abs().max() < 4


def test_small_frames_are_enlarged(tmp_path):
    parts = chunks()
    write(tmp_path / "v.mp4", parts, scale=8)
    frames = read_video(tmp_path / "v.mp4", [0, 30])
    assert frames.shape == (2, 3, 384, 640)
    small = torch.nn.functional.avg_pool2d(frames.float(), 8)
    assert psnr(small, torch.cat(parts)[[0, 30]]) > 35


def test_the_file_is_playable_after_every_chunk(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", 16, 80, 48) as video:
        for number, part in enumerate(chunks(), 1):
            video.write(part.numpy())
            assert len(read_video(tmp_path / "v.mp4")) == sum(LENGTHS[:number]) == video.frames
            assert video.chunks == number


def test_a_player_is_told_how_long_the_video_is(tmp_path):
    write(tmp_path / "v.mp4", chunks())
    data = (tmp_path / "v.mp4").read_bytes()
    at = data.index(b"mehd")
    assert int.from_bytes(data[at + 8 : at + 12], "big") == round(45 / 16 * 1000)


def test_a_killed_run_leaves_a_playable_video(tmp_path):
    path = tmp_path / "v.mp4"
    code = (
        "import sys, torch\nfrom slotmemory.video import VideoWriter\n"
        "video = VideoWriter(sys.argv[1], 16, 80, 48)\n"
        "for k in range(1000):\n"
        "    video.write(torch.full((12, 3, 48, 80), k % 256, dtype=torch.uint8))\n"
        "    print(k, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if int(line) == 20:
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    written, frames = count_chunks(path)
    assert written >= 21 and frames == 12 * written
    decoded = read_video(path)
    assert len(decoded) >= frames
    assert abs(int(decoded[12 * 20].float().mean()) - 20) < 3
    write(path, chunks()[1:3], keep=7)
    assert len(read_video(path)) == 12 * 9


@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), st.data())
@settings(derandomize=True, max_examples=12, deadline=None)
def test_a_resumed_video_is_the_same_file_as_an_uninterrupted_one(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("resume")
    parts = chunks(lengths)
    write(folder / "whole.mp4", parts)
    keep = data.draw(st.integers(0, len(parts)))
    done = data.draw(st.integers(keep, len(parts)))
    write(folder / "resumed.mp4", parts[:done])
    torn = data.draw(st.integers(0, 200))
    with open(folder / "resumed.mp4", "ab") as file:
        file.write((folder / "whole.mp4").read_bytes()[-torn:] if torn else b"")
    write(folder / "resumed.mp4", parts[keep:], keep=keep)
    assert (folder / "resumed.mp4").read_bytes() == (folder / "whole.mp4").read_bytes()


def test_a_video_that_breaks_off_gives_what_is_whole(tmp_path):
    write(tmp_path / "v.mp4", chunks())
    data = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(data[:-200])
    assert count_chunks(tmp_path / "v.mp4") == (3, 33)
    assert 33 <= len(read_video(tmp_path / "v.mp4")) <= 45


def test_resuming_after_more_chunks_than_there_are_is_refused(tmp_path):
    write(tmp_path / "v.mp4", chunks()[:2])
    before = (tmp_path / "v.mp4").read_bytes()
    with pytest.raises(InputError, match="holds 2 whole chunks, 3 are needed to go on"):
        VideoWriter(tmp_path / "v.mp4", 16, 80, 48, keep=3)
    assert (tmp_path / "v.mp4").read_bytes() == before


@pytest.mark.parametrize("options", [{"fps": 8}, {"width": 96}, {"scale": 2}])
def test_resuming_with_other_sizes_is_refused(tmp_path, options):
    write(tmp_path / "v.mp4", chunks()[:2])
    with pytest.raises(InputError, match="was not written with"):
        VideoWriter(tmp_path / "v.mp4", **{"fps": 16, "width": 80, "height": 48, **options}, keep=1)


def test_resuming_something_else_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"hello")
    with pytest.raises(InputError, match="was not written with"):
        VideoWriter(tmp_path / "v.mp4", 16, 80, 48, keep=1)
    with pytest.raises(InputError, match="no such file"):
        VideoWriter(tmp_path / "none.mp4", 16, 80, 48, keep=1)


def test_a_full_disk_is_one_line_and_keeps_the_chunks_before(tmp_path):
    parts = chunks()
    video = VideoWriter(tmp_path / "v.mp4", 16, 80, 48)
    video.write(parts[0])
    before = (tmp_path / "v.mp4").read_bytes()
    with file_size_limit(len(before) + 500):
        with pytest.raises(InputError, match="cannot write the video .*v.mp4: .*free some space") as caught:
            video.write(parts[1])
    assert "\n" not in str(caught.value)
    assert (tmp_path / "v.mp4").read_bytes() == before
    for part in parts[1:]:
        video.write(part)
    video.close()
    write(tmp_path / "whole.mp4", parts)
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_places_that_cannot_be_written_are_said_in_one_line(tmp_path):
    for path, reason in [
        ("/dev/full", "the disk is full"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "v.mp4", "no such file or folder"),
    ]:
        with pytest.raises(InputError, match=reason):
            VideoWriter(path, 16, 80, 48)


def test_files_that_are_no_video_are_said_in_one_line(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write(tmp_path / "header.mp4", [])
    for name in ("v.mp4", "empty.mp4", "none.mp4", "header.mp4", "."):
        with pytest.raises(InputError) as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    write(tmp_path / "v.mp4", chunks())
    with pytest.raises(InputError, match="has no frame 45"):
        read_video(tmp_path / "v.mp4", [3, 45])


def test_sizes_and_frames_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(InputError, match="81x48 pixels are odd"):
        Fragments(16, 81, 48)
    Fragments(16, 81, 47, scale=2)
    with pytest.raises(InputError, match="fps=0 is not a whole number of at least 1"):
        Fragments(0, 80, 48)
    with VideoWriter(tmp_path / "v.mp4", 16, 80, 48) as video:
        for frames in (torch.zeros(2, 3, 48, 80), torch.zeros(2, 48, 80, 3).byte(), torch.zeros(0, 3, 48, 80).byte()):
            with pytest.raises(ValueError, match=r"expected \[T, 3, 48, 80\] of uint8"):
                video.write(frames)


def test_writing_costs_little_next_to_generating(tmp_path):
    part = chunks()[1]
    with VideoWriter(tmp_path / "v.mp4", 16, 80, 48, scale=8) as video:
        video.write(part)
        start = time.process_time()
        for _ in range(5):
            video.write(part)
    assert (time.process_time() - start) / 5 < 0.25  # a chunk is shown for 0.75 s
