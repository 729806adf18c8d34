"""Drift: true narratives have none, and a video that slowly blurs, pales, darkens or grows noisy shows just that."""

import pytest
import torch
import torch.nn.functional as F

from slotmemory.errors import InputError
from slotmemory.evaluation import drift
from slotmemory.evaluation.drift import DISTANCE, LOOKS, Gaussian, clips, course, describe, eye, frechet, looks, measure
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

PROMPTS = [
    "A red cat walks in the meadow.",
    "A blue robot jumps on the beach.",
    "The night is empty.",
    "A blue robot waits in the night.",
]
SMALL = WorldSize(80, 48)


def told(seed: int) -> torch.Tensor:
    return torch.from_numpy(Narrative.from_prompts(PROMPTS, seed, 7, SMALL).render())  # 21 s


@pytest.fixture(scope="module")
def codec():
    return eye()


@pytest.fixture(scope="module")
def world(codec):
    return describe([told(1), told(2)], codec)


@pytest.fixture(scope="module")
def video():
    return told(3)


@pytest.fixture(scope="module")
def courses(world, codec):
    """Measure a video -> the course of every quantity."""

    def run(video):
        found = measure(video, world, codec)
        return {name: course(values, [window.seconds for window in world]) for name, values in found.items()}

    return run


@pytest.fixture(scope="module")
def true(courses, video):
    return courses(video)


def worse(video, spoil):
    """The more, the later: frames as they are at the start, as `spoil` makes them at the end."""
    share = torch.linspace(0, 1, len(video))[:, None, None, None]
    x = video.float()
    return ((1 - share) * x + share * spoil(x)).round().clamp(0, 255).to(torch.uint8)


def test_another_telling_of_the_same_prompts_hardly_drifts(true):
    for name in LOOKS:
        assert 0.7 < true[name].first < 1.4 and 0.7 < true[name].last < 1.4, name


def test_what_only_the_prompts_change_is_no_drift(true, world):
    first, last = (window.looks["brightness"] for window in (world[0], world[-1]))
    assert last < 0.6 * first  # day and night
    assert abs(true["brightness"].last - true["brightness"].first) < 0.2


def blurred(x):
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)


def noised(x):
    return x + 12 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("spoil", "name", "sign"),
    [
        (blurred, "sharpness", -1),
        (noised, "sharpness", 1),
        (lambda x: x.mean(1, keepdim=True).expand_as(x), "saturation", -1),
        (lambda x: 0.7 * x, "brightness", -1),
        (lambda x: 0.4 * x + 0.6 * x.mean((1, 2, 3), keepdim=True), "contrast", -1),
    ],
)
def test_what_is_lost_on_the_way_is_named_and_the_distance_grows(courses, video, true, spoil, name, sign):
    found = courses(worse(video, spoil))
    assert sign * (found[name].slope - true[name].slope) > 0.3
    lost, at_first = (sign * (getattr(found[name], part) - getattr(true[name], part)) for part in ("last", "first"))
    assert lost > 0.1 and lost > 1.5 * at_first
    if spoil is not noised:  # which the codec leaves out
        assert found[DISTANCE].last > 1.2 * true[DISTANCE].last
        assert found[DISTANCE].slope > true[DISTANCE].slope


def test_distances_are_in_those_of_one_telling_to_another(codec, true):
    first, second = told(1), told(2)
    assert max(measure(first, describe([second, first], codec), codec)[DISTANCE]) < 0.5
    assert 0.3 < true[DISTANCE].first < 2 and 0.3 < true[DISTANCE].last < 2


def test_frechet_of_independent_channels_is_the_difference_of_means_and_deviations():
    a = Gaussian(torch.zeros(2), torch.diag(torch.tensor([4.0, 1.0])))
    b = Gaussian(torch.full((2,), 2.0), torch.diag(torch.tensor([1.0, 9.0])))
    assert frechet(a, b) == pytest.approx(2 * 2**2 + (2 - 1) ** 2 + (1 - 3) ** 2)


def test_frechet_does_not_mind_turned_axes_or_order():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    x, y, turn = draw(50, 3) @ draw(3, 3), draw(50, 3) @ draw(3, 3), torch.linalg.qr(draw(3, 3))[0]

    def distance(x, y):
        return frechet(*(Gaussian(z.mean(0), torch.cov(z.T)) for z in (x, y)))

    assert distance(x, y) == pytest.approx(distance(y, x))
    assert distance(x, y) == pytest.approx(distance(x @ turn, y @ turn))
    assert distance(x, y) > 0.1 and distance(x, x) == pytest.approx(0, abs=1e-9)


def test_looks_of_plain_and_striped_frames_are_as_the_formulas_say():
    red = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    red[:, 0] = 255
    found = {name: float(value) for name, value in looks(red).items()}
    assert found == pytest.approx({"brightness": 0.299, "contrast": 0, "saturation": 1, "sharpness": 0}, abs=1e-6)
    stripes = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    stripes[..., ::2] = 255
    found = {name: float(value) for name, value in looks(stripes).items()}
    assert found == pytest.approx({"brightness": 0.5, "contrast": 0.5, "saturation": 0, "sharpness": 1}, abs=1e-6)


def test_a_course_is_first_last_and_least_squares_per_minute():
    assert course([1.0, 2.0, 3.0], [5, 15, 25]) == pytest.approx((1, 3, 6))
    assert course([1.0, 0.0, 1.0], [5, 15, 25]) == pytest.approx((1, 1, 0))


def test_a_minute_has_six_windows_and_their_middles_are_ten_seconds_apart(monkeypatch):
    monkeypatch.setattr(drift, "_window", lambda second, seen, codec: (second, *seen.shape[:2]))
    windows = describe([torch.zeros(957, 3, 8, 8, dtype=torch.uint8)] * 2, None)
    assert windows == [(4.5 + 10 * k, 2, 10) for k in range(6)]


def test_videos_that_cannot_be_measured_are_named(codec, world):
    with pytest.raises(InputError, match="drift in 20 frames: give at least 21"):
        clips(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="expected .T, 3, H, W. of uint8"):
        clips(torch.zeros(40, 3, 8, 8))
    with pytest.raises(InputError, match="of 480 frames has 3 windows, the world's 2"):
        measure(torch.zeros(480, 3, 8, 8, dtype=torch.uint8), world, codec)
    with pytest.raises(InputError, match="two or more"):
        measure(told(1), describe([told(1)], codec), codec)
