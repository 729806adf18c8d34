"""Addresses of the Hub, what the local cache holds, and what is said before something large is fetched. No network."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from slotmemory.checkpoints import hub, presets
from slotmemory.checkpoints.hub import Address
from slotmemory.errors import InputError

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'slotmemory[wan]'")
constants = pytest.importorskip("huggingface_hub.constants")
REPO, COMMIT = "gdhe17/Self-Forcing", "0" * 40
GB = 10**9


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """An empty cache, and a Hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)


def keep(tmp_path, repo, file, content="x"):
    """Put a file into the cache as huggingface_hub lays it out."""
    folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
    path = folder / "snapshots" / COMMIT / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return path


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A Hub that holds the given repositories: {repo: {file: bytes}} -> log of what was downloaded."""

    def serve(files, licence="apache-2.0", content="x"):
        fetched = []

        def model_info(self, repo, revision=None, files_metadata=False):
            assert files_metadata
            siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files[repo].items()]
            return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license=licence), tags=[])

        def download(repo, file, revision=None):
            fetched.append((repo, file, revision))
            return str(keep(tmp_path, repo, file, content))

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return fetched

    return serve


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Wan-AI/Wan2.1-T2V-1.3B", Address("Wan-AI/Wan2.1-T2V-1.3B")),
        ("hf://org/name@v1", Address("org/name", None, "v1")),
        ("org/name/checkpoints/a b.pt@refs/pr/1", Address("org/name", "checkpoints/a b.pt", "refs/pr/1")),
        ("./org/name", None),
        ("/org/name/x.pt", None),
        ("~/org/name", None),
        ("longlive", None),
        ("checkpoints/self_forcing_dmd.pt", None),
    ],
)
def test_addresses_are_told_from_paths(text, expected):
    assert Address.parse(text) == expected
    if expected is not None:
        assert Address.parse(str(expected)) == expected


def test_every_preset_names_files_of_the_hub():
    for name in presets.names():
        preset = presets.find(name)
        places = [preset.transformer, preset.codec, preset.text, preset.tokenizer, *(a.file for a in preset.lora)]
        assert all(Address.parse(place).file for place in places)


def test_a_cached_file_is_used_without_a_question(tmp_path):
    kept = keep(tmp_path, REPO, "checkpoints/self_forcing_dmd.pt")
    address = Address(REPO, "checkpoints/self_forcing_dmd.pt")
    assert hub.fetch([address]) == {address: kept}


def test_only_what_is_missing_is_fetched(tmp_path, serving):
    keep(tmp_path, REPO, "a.pt")
    fetched = serving({REPO: {"a.pt": 10, "b.pt": 20, "c.pt": 30}})
    found = hub.fetch([Address(REPO, "a.pt"), Address(REPO, "b.pt", "v2")])
    assert fetched == [(REPO, "b.pt", "v2")] and {path.name for path in found.values()} == {"a.pt", "b.pt"}


def test_more_than_a_gigabyte_is_announced_with_size_and_licence(serving, caplog):
    serving({REPO: {"a.pt": 6 * GB}, "Wan-AI/W": {"t5.pth": 11 * GB}}, licence="cc-by-nc-sa-4.0")
    hub.fetch([Address(REPO, "a.pt"), Address("Wan-AI/W", "t5.pth")])
    (said,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert said.getMessage() == (
        "fetching 17.00 GB from the Hugging Face Hub: gdhe17/Self-Forcing (6.00 GB, licence cc-by-nc-sa-4.0); "
        "Wan-AI/W (11.00 GB, licence cc-by-nc-sa-4.0)"
    )


def test_less_is_fetched_quietly_and_a_licence_may_be_missing(serving, caplog):
    serving({REPO: {"a.pt": 9 * GB // 10}}, licence=None)
    hub.fetch([Address(REPO, "a.pt")])
    assert not caplog.records
    assert hub.listing(Address(REPO)).licence == "no licence stated"


def test_shards_come_with_their_index(serving):
    table = '{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}'
    files = {"t/m.safetensors.index.json": 9, "t/m-1.safetensors": 5, "t/m-2.safetensors": 5}
    fetched = serving({REPO: files}, content=table)
    hub.fetch([Address(REPO, "t/m.safetensors.index.json")])
    assert [file for _, file, _ in fetched] == list(files)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(serving, monkeypatch):
    fetched = serving({REPO: {"a.pt": 60 * GB}})
    monkeypatch.setattr(hub, "_free_bytes", lambda: 3 * GB)
    with pytest.raises(InputError, match="60.0 GB are to be fetched and 3.0 GB of disk are free.*HF_HOME"):
        hub.fetch([Address(REPO, "a.pt")])
    assert not fetched


def test_a_file_that_the_repository_lacks_is_named_with_those_it_has(serving):
    serving({REPO: {"checkpoints/self_forcing_dmd.pt": 1, "README.md": 1}})
    with pytest.raises(InputError, match="has no file 'dmd.pt'; it holds checkpoints/self_forcing_dmd.pt"):
        hub.fetch([Address(REPO, "dmd.pt")])


def test_offline_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = keep(tmp_path, REPO, "a.pt")
    assert hub.fetch([Address(REPO, "a.pt")])[Address(REPO, "a.pt")] == kept
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; .*hf download gdhe17/Self-Forcing b.pt"):
        hub.fetch([Address(REPO, "b.pt")])


def response(status):
    request = SimpleNamespace(url="https://huggingface.co", method="GET")
    return SimpleNamespace(headers={}, request=request, status_code=status)


@pytest.mark.parametrize(
    "error, expected",
    [
        (lambda e: e.RepositoryNotFoundError("404", response=response(404)), "the Hugging Face Hub has no model 'a/b'"),
        (lambda e: e.GatedRepoError("403", response=response(403)), "accept its terms at https://huggingface.co/a/b"),
        (lambda e: e.RevisionNotFoundError("404", response=response(404)), "a/b has no revision 'v9'"),
        (lambda e: ConnectionError("Name or service not known"), "cannot fetch a/b@v9 .*Name or service not known"),
        (lambda e: e.HTTPError("connection refused"), "cannot fetch a/b@v9 .*connection refused"),
    ],
)
def test_what_goes_wrong_with_the_hub_is_one_line(monkeypatch, error, expected):
    def fails(*_, **__):
        raise error(huggingface_hub.errors)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    with pytest.raises(InputError, match=expected):
        hub.fetch([Address("a/b", "x.pt", "v9")])


def test_a_missing_extra_is_named(monkeypatch):
    import importlib

    from slotmemory import errors

    real = importlib.import_module

    def absent(name, *rest):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(f"No module named '{name}'", name="huggingface_hub")
        return real(name, *rest)

    monkeypatch.setattr(errors.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'slotmemory\[wan\]'"):
        hub.fetch([Address(REPO, "a.pt")])


def test_the_real_cache_layout_is_the_one_tested_here(tmp_path):
    path = keep(tmp_path, REPO, "a.pt")
    assert Path(huggingface_hub.try_to_load_from_cache(REPO, "a.pt")) == path
