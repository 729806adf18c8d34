"""Count time in pixel frames, codec latents and chunks.

Knows no pixels and no model: frame 0 alone is latent 0, every later latent is four frames, a chunk is three latents.
"""

FPS = 16
FRAMES_PER_LATENT = 4
LATENTS_PER_CHUNK = 3
FRAMES_PER_CHUNK = FRAMES_PER_LATENT * LATENTS_PER_CHUNK
# Chunk 0 is short (its first latent is a single frame); shifting by this makes every chunk start a multiple of 12.
LEAD_FRAMES = FRAMES_PER_LATENT - 1


def latent_frames(latent: int) -> range:
    """Give the pixel frames of one latent."""
    if latent < 0:
        raise ValueError(f"latent={latent} is negative; latents count from 0")
    start = max(0, FRAMES_PER_LATENT * latent - LEAD_FRAMES)
    return range(start, FRAMES_PER_LATENT * latent + 1)


def chunk_frames(chunk: int) -> range:
    """Give the pixel frames of one chunk: 9 for chunk 0, 12 for every later one."""
    if chunk < 0:
        raise ValueError(f"chunk={chunk} is negative; chunks count from 0")
    start = max(0, FRAMES_PER_CHUNK * chunk - LEAD_FRAMES)
    return range(start, FRAMES_PER_CHUNK * (chunk + 1) - LEAD_FRAMES)


def num_frames(chunks: int) -> int:
    """Count the pixel frames of a video of so many chunks."""
    if chunks < 1:
        raise ValueError(f"chunks={chunks} is no video; give at least 1")
    return chunk_frames(chunks - 1).stop


def chunks_in(seconds: float) -> int:
    """Count the chunks whose length is nearest to so many seconds; at least 1."""
    return max(1, round((seconds * FPS + LEAD_FRAMES) / FRAMES_PER_CHUNK))


def chunk_of(frame: int) -> int:
    """Name the chunk that holds a pixel frame."""
    return (frame + LEAD_FRAMES) // FRAMES_PER_CHUNK
