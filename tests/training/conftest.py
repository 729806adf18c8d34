"""A model of milliseconds for every stage that trains a student."""

import pytest

from tests.models_for_tests import write_model


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> str:
    """The folder of a random model: 24 tokens per latent frame, two layers, two denoising steps."""
    return str(write_model(tmp_path_factory.mktemp("micro") / "model"))


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """The same with other weights: what a teacher would be."""
    return str(write_model(tmp_path_factory.mktemp("other") / "model", seed=1))
