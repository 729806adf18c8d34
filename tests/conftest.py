"""What holds for every test."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)  # before fixtures, whatever their scope
def pytest_runtest_setup():
    """Compute in one thread: sums of two have other last bits, and a test before may have set the number for good."""
    torch.set_num_threads(1)
