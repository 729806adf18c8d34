"""Masks from outside: a file that says what every token of a video shows. Shared by policies; not a policy.

`slotmemory.world.masks` tells them from the narrative world's truth; any segmentation will do.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slotmemory.errors import InputError, shorten
from slotmemory.layout import Layout
from slotmemory.tree import atomic_file


def save_masks(path: str | Path, rows: Sequence[np.ndarray]) -> None:
    """Write what `load_masks` reads: uint8 [latents, rows, columns] of one video, or of each batch row, equally long."""
    with atomic_file(path) as file:
        np.savez_compressed(file, masks=rows[0] if len(rows) == 1 else np.stack(rows))


def load_masks(path: str, layout: Layout) -> Tensor:
    """Read the array `masks` of an .npz file -> [R, latents, n] int64; R is 1 (all rows of a batch alike) or the rows'.

    The file holds whole numbers from 0 (nobody), [latents, rows, columns] of tokens or with an axis of batch rows before.
    Raises InputError for anything else."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            masks = file["masks"]
    except OSError as error:
        raise InputError.from_os("read masks", path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{shorten(path, 200)} is not an .npz file with an array named masks") from None
    grid = tuple(layout.grid)
    if masks.ndim not in (3, 4) or masks.shape[-2:] != grid or not masks.size:
        raise InputError(
            f"masks of {shorten(path, 200)} have shape {list(masks.shape)}; expected [latents, {grid[0]}, {grid[1]}], "
            "one number per token of this model and size, or the same with an axis of batch rows before"
        )
    if not np.issubdtype(masks.dtype, np.integer) or masks.min() < 0:
        raise InputError(
            f"masks of {shorten(path, 200)} hold {masks.dtype} from {masks.min()}; expected whole numbers from 0"
        )
    return torch.from_numpy(masks.astype(np.int64)).reshape(-1, masks.shape[-3], layout.tokens_per_frame)


def masks_of(masks: Tensor, start: int, frames: int, batch: int) -> Tensor:
    """Cut latent frames start, start + 1, ... out of masks [R, latents, n] -> [B, frames * n]; InputError if too few."""
    if start + frames > masks.shape[1]:
        raise InputError(
            f"masks end after {masks.shape[1]} latent frames; this video needs {start + frames}: give longer ones"
        )
    if len(masks) not in (1, batch):
        raise InputError(f"masks are for {len(masks)} batch rows, there are {batch}; give one for all, or one for each")
    return masks[:, start : start + frames].flatten(1).expand(batch, -1)
