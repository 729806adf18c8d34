"""Files on the Hugging Face Hub: addresses, what is on this machine already, and fetching only what is needed.

What the local cache holds is used as it is, without a question to the network. Downloads are huggingface_hub's:
resumable, with a progress bar, into its cache; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean here what they mean there.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from slotmemory.checkpoints.files import INDEX, SUFFIXES
from slotmemory.errors import InputError, need_extra, shorten

logger = logging.getLogger(__name__)

NEEDED_FOR = "a model of the Hugging Face Hub"
ANNOUNCED = 10**9  # downloads above this many bytes are announced with size and licence
_ADDRESS = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)((?:/[\w. +-]+)+)?(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Address:
    """A repository of the Hub, or one file in it: `org/name`, `org/name/path/file.pt`, each also with `@revision`."""

    repo: str
    file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address | None:
        """Read an address; None for what cannot be one, such as ./folder or file.pt."""
        found = _ADDRESS.fullmatch(text)
        if found is None or text.startswith((".", "/", "~")):
            return None
        repo, file, revision = found.groups()
        if file is None and repo.endswith(SUFFIXES):  # folder/file.pt
            return None
        return cls(repo, file.removeprefix("/") if file else None, revision)

    def __str__(self) -> str:
        return self.repo + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Repository:
    """What a repository holds: bytes by file (None: not told), and its licence."""

    files: dict[str, int | None]
    licence: str


def _library() -> ModuleType:
    need_extra("huggingface_hub.constants", "wan", NEEDED_FOR)  # is no part of the library until it is imported
    return need_extra("huggingface_hub", "wan", NEEDED_FOR)


def cached(address: Address) -> Path | None:
    """Where a file is in the local cache, or None."""
    hub = _library()
    with _explained(address):
        found = hub.try_to_load_from_cache(address.repo, address.file, revision=address.revision)
    return Path(found) if isinstance(found, str) else None


def listing(address: Address) -> Repository:
    """Ask what a repository holds; offline, what of it the local cache holds."""
    hub = _library()
    with _explained(address):
        if hub.constants.HF_HUB_OFFLINE:
            folder = Path(hub.snapshot_download(address.repo, revision=address.revision, local_files_only=True))
            files = [path for path in folder.rglob("*") if path.is_file()]
            return Repository({path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, "not told")
        info = hub.HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
        tagged = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
        licence = getattr(info.card_data, "license", None) or next(iter(tagged), "no licence stated")
        return Repository({file.rfilename: file.size for file in info.siblings or []}, str(licence))


def fetch(addresses: Iterable[Address]) -> dict[Address, Path]:
    """Bring files to this machine -> where each is. More than 1 GB is announced with its licence before it starts.

    Shards that an index names come with it. Raises InputError where the Hub cannot be reached, a file is not there, the
    disk is too small, or HF_HUB_OFFLINE forbids what would be needed.
    """
    wanted = list(dict.fromkeys(addresses))
    found = {address: path for address in wanted if (path := cached(address))}
    missing = [address for address in wanted if address not in found]
    if missing:
        hub = _library()
        if hub.constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{missing[0]} is not on this machine and HF_HUB_OFFLINE is set; unset it, or on a machine with a "
                f"network run: hf download {missing[0].repo} {missing[0].file}"
            )
        _announce(missing)
        for address in missing:
            with _explained(address):
                found[address] = Path(hub.hf_hub_download(address.repo, address.file, revision=address.revision))
    more = [part for address in wanted if address.file.endswith(INDEX) for part in _shards(address, found[address])]
    return found | (fetch(more) if more else {})


def _shards(address: Address, index: Path) -> Iterator[Address]:
    from slotmemory.checkpoints.files import shards

    folder = address.file.rpartition("/")[0]
    for name in shards(index):
        yield replace(address, file=f"{folder}/{name}" if folder else name)


def _announce(missing: Sequence[Address]) -> None:
    """Say how much is going to be fetched and under which licences; check that it exists and fits on the disk."""
    total, parts = 0, []
    for source in dict.fromkeys(replace(address, file=None) for address in missing):
        repository = listing(source)
        here = [address for address in missing if replace(address, file=None) == source]
        for address in here:
            if address.file not in repository.files:
                near = ", ".join(name for name in repository.files if name.endswith((*SUFFIXES, INDEX)))
                raise InputError(
                    f"{source} has no file '{address.file}'; it holds {shorten(near or 'no weights', 200)}"
                )
        size = sum(repository.files[address.file] or 0 for address in here)
        total += size
        parts.append(f"{source} ({size / 1e9:.2f} GB, licence {repository.licence})")
    free = _free_bytes()
    if free is not None and total > free:
        raise InputError(
            f"{total / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB of disk are free; free some space or set "
            "HF_HOME to another disk"
        )
    if total > ANNOUNCED:
        logger.warning("fetching %.2f GB from the Hugging Face Hub: %s", total / 1e9, "; ".join(parts))


def _free_bytes() -> int | None:
    """Free space where the Hub's cache is."""
    hub = _library()
    folder = Path(hub.constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
    errors = need_extra("huggingface_hub.errors", "wan", NEEDED_FOR)
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{address.repo} asks for consent: accept its terms at https://huggingface.co/{address.repo}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the Hugging Face Hub has no model '{address.repo}' (or it is private: `hf auth login`)"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{address.repo} has no revision '{address.revision}'") from None
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{address} is not on this machine and the Hub cannot be reached ({_first(error)})") from None
    except errors.EntryNotFoundError:
        raise InputError(f"{address.repo} has no file '{address.file}'") from None
    except errors.HFValidationError as error:
        raise InputError(f"'{address}' is no address of the Hub ({_first(error)})") from None
    except (OSError, errors.HTTPError) as error:  # no network, a server that fails, a disk that is full
        raise InputError(f"cannot fetch {address} from the Hugging Face Hub ({_first(error)})") from None


def _first(error: Exception) -> str:
    return shorten(str(error).strip().split("\n")[0] or type(error).__name__, 160)
