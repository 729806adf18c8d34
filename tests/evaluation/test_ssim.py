"""Structural similarity: equal pictures give 1, and known pictures the value of the formula."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.evaluation.ssim import C1, C2, ssim


def test_a_picture_is_like_itself_and_less_so_the_more_it_is_disturbed():
    torch.manual_seed(0)
    picture, noise = torch.rand(2, 3, 24, 32) * 2 - 1, torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(ssim(picture, picture), torch.ones(2))
    a, b, c = (ssim(picture, picture + level * noise) for level in (0.1, 0.3, 1.0))
    assert (a > b).all() and (b > c).all() and (c > 0).all()


def test_plain_pictures_differ_by_their_luminance_alone():
    a, b = torch.full((1, 3, 11, 11), 0.5), torch.full((1, 3, 11, 11), -0.25)
    expected = (2 * 0.5 * -0.25 + C1) / (0.5**2 + 0.25**2 + C1)
    torch.testing.assert_close(ssim(a, b), torch.tensor([expected]), atol=1e-5, rtol=0)


def test_a_picture_against_its_negative_is_about_minus_one():
    torch.manual_seed(0)
    picture = torch.rand(1, 1, 11, 11) * 2 - 1
    at = torch.arange(11.0) - 5
    weight = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weight = weight / weight.sum()
    mean = (weight * picture).sum()
    variance = (weight * picture**2).sum() - mean**2
    expected = (C1 - 2 * mean**2) / (C1 + 2 * mean**2) * (C2 - 2 * variance) / (C2 + 2 * variance)
    torch.testing.assert_close(ssim(picture, -picture)[0], expected, atol=1e-5, rtol=1e-4)


def test_pictures_of_different_or_tiny_sizes_are_named():
    with pytest.raises(InputError, match="expected two"):
        ssim(torch.zeros(1, 3, 8, 20), torch.zeros(1, 3, 8, 20))
