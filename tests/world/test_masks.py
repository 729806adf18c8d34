"""The world's truth as masks of tokens, and as the file that `slots` groups by."""

import numpy as np
import pytest

from slotmemory.contract import toy
from slotmemory.memories._masks import load_masks, save_masks
from slotmemory.world import Narrative, WorldSize, latent_frames
from slotmemory.world.masks import token_masks

SIZE = WorldSize(64, 64)
SHOTS = [("A red cat waits and a blue ball waits on the beach.", 0), ("The beach is empty.", 2)]


def narrative(seed=3):
    return Narrative(SHOTS, 4, seed, SIZE)


def test_a_token_shows_who_covers_most_of_its_cell_over_its_latent_frame():
    story = narrative()
    masks, truth = token_masks(story, (4, 4)), story.truth().masks
    assert masks.shape == (12, 4, 4) and masks.dtype == np.uint8
    assert set(np.unique(masks[:6])) == {0, 1, 2} and not masks[-1].any()
    for latent in (0, 1, 5):
        frames = latent_frames(latent)
        for row, column in np.ndindex(4, 4):
            cell = truth[frames.start : frames.stop, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            shares = [(cell == entity).mean() for entity in (1, 2)]
            best = int(np.argmax(shares)) + 1 if max(shares) >= 0.25 else 0
            assert masks[latent, row, column] == best


def test_a_smaller_share_lets_more_tokens_show_somebody():
    counts = [int((token_masks(narrative(), (4, 4), covered) > 0).sum()) for covered in (0.05, 0.25, 0.9)]
    assert counts[0] > counts[1] > counts[2]


def test_a_grid_that_does_not_divide_the_picture_is_refused():
    with pytest.raises(ValueError, match="a grid of 5 x 4 tokens does not divide a picture of 64 x 64 pixels"):
        token_masks(narrative(), (5, 4))


def test_masks_are_read_as_they_were_written_for_one_narrative_or_a_row_each(tmp_path):
    layout = toy().layout
    save_masks(tmp_path / "one.npz", [token_masks(narrative(), layout.grid)])
    save_masks(tmp_path / "two.npz", [token_masks(narrative(seed), layout.grid) for seed in (1, 2)])
    one, two = (load_masks(str(tmp_path / f"{name}.npz"), layout) for name in ("one", "two"))
    assert np.array_equal(one.view(1, 12, 4, 4).numpy()[0], token_masks(narrative(), layout.grid))
    assert two.shape == (2, 12, 16)
    assert np.array_equal(two[1].view(12, 4, 4).numpy(), token_masks(narrative(2), layout.grid))


def test_the_script_that_writes_masks_does_so_for_a_script_as_long_as_its_video(tmp_path, capsys):
    from benchmarks.oracle_masks import main

    script, out = tmp_path / "story.yaml", tmp_path / "masks.npz"
    script.write_text("shots:\n- {prompt: A red cat waits in the snow., seconds: 3}\n")
    assert main([str(script), "--out", str(out), "--seeds", "1", "2"]) == 0
    with np.load(out) as file:
        assert file["masks"].shape[:2] == (2, 12) and set(np.unique(file["masks"])) == {0, 1}
    script.write_text("shots:\n- {prompt: A red dinosaur waits in the snow., seconds: 3}\n")
    assert main([str(script), "--out", str(out)]) == 1
    assert "unknown word 'dinosaur'" in capsys.readouterr().err
