"""Tiny checkpoints of every layout with their companions, written once."""

import pytest

from slotmemory.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Embeddings are kept in a folder of the test run."""
    monkeypatch.setenv("SLOTMEMORY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def no_hub(monkeypatch):
    """Whoever asks the Hub for a file is told so."""

    def asked(addresses):
        raise InputError(f"the Hub was asked for {', '.join(map(str, addresses))}")

    monkeypatch.setattr("slotmemory.checkpoints.hub.fetch", asked)
