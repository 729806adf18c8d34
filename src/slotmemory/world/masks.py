"""Say which entity every token of a video shows, from the world's truth; what the memory `slots` takes as oracle masks.

It knows narratives and a grid of tokens, no model. The truth is that of the rendered video: it is a stream's truth where
the stream was given those frames (`Session.prefill`), and an intention where a model makes its own.
"""

import numpy as np

from slotmemory.world.clock import FRAMES_PER_LATENT, latent_frames
from slotmemory.world.narrative import Narrative

COVERED = 0.25  # a token shows an entity that covers at least this share of its cell


def token_masks(narrative: Narrative, grid: tuple[int, int], covered: float = COVERED) -> np.ndarray:
    """Who is on each token: uint8 [latents, rows, columns], 0 nobody, index + 1 the entity that covers most of it.

    A token's cell is its share of the picture over the pixel frames of its latent frame. Raises ValueError if the grid
    does not divide the picture."""
    (rows, columns), (height, width) = grid, (narrative.size.height, narrative.size.width)
    if height % rows or width % columns:
        raise ValueError(f"a grid of {rows} x {columns} tokens does not divide a picture of {height} x {width} pixels")
    masks = narrative.truth().masks.reshape(-1, rows, height // rows, columns, width // columns)
    shares = np.zeros((len(narrative.entities) + 1, len(masks), rows, columns))
    for entity in range(1, len(shares)):
        shares[entity] = (masks == entity).mean((2, 4))
    latents = (len(masks) - 1) // FRAMES_PER_LATENT + 1
    spans = [latent_frames(latent) for latent in range(latents)]
    shares = np.stack([shares[:, span.start : span.stop].mean(1) for span in spans], 1)
    shares[0] = np.nextafter(covered, 0)  # nobody, who loses to an entity that covers just as much
    return shares.argmax(0).astype(np.uint8)
