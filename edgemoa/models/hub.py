"""The Hugging Face hub: what a repository holds, and where its files are.

``huggingface_hub`` knows the hub: its address (``HF_ENDPOINT``), the user's token, its errors, and
whether to stay offline (``HF_HUB_OFFLINE``). Files are not fetched by it: since version 2 it begins
a file anew after every interruption, and it prints progress bars of its own. It is imported when a
model is pulled, not before.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from edgemoa import __version__
from edgemoa.errors import (
    EdgemoaError,
    HashMismatchError,
    ModelNotFoundError,
    NetworkError,
    UserError,
)
from edgemoa.models.fetch import TransientError, Wanted, public, retry
from edgemoa.models.library import hash_file
from edgemoa.models.progress import Progress

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings show signed addresses

METADATA_TIMEOUT_S: Final = 30.0
_SHA256: Final = re.compile("[0-9a-f]{64}")
_SHA1: Final = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. Large ones have a ``sha256``, the others git's own hash."""

    path: str
    size: int
    sha256: str | None
    git_id: str | None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit."""

    name: str
    revision: str
    files: tuple[HubFile, ...]

    def wanted(self, file: HubFile, folder: Path, check_room: Callable[[int, int], None]) -> Wanted:
        """The file, to be fetched into ``folder`` under its own name. It is not checked there."""
        return Wanted(
            url=hf_hub_url(self.name, file.path, revision=self.revision, endpoint=endpoint()),
            folder=folder,
            name=file.name,
            size=file.size,
            immutable=True,
            headers=_headers(),
            check_room=check_room,
            explain=lambda status, headers: _refusal(self.name, status, headers),
        )


def endpoint() -> str:
    """The hub's address."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _page(path: str = "") -> str:
    """A page of the hub, for a person."""
    return public(f"{endpoint()}/{path}").rstrip("/")


def look_up(name: str, revision: str | None, progress: Progress) -> Repository:
    """What the repository ``OWNER/NAME`` holds at a revision, by default the newest.

    Raises :class:`ModelNotFoundError`, :class:`UserError` where it is not given out to everybody,
    and :class:`NetworkError`.
    """
    progress(f"ask {_page()} for {name}", 0, 0)
    return retry(lambda: _look_up(name, revision), progress)


def _look_up(name: str, revision: str | None) -> Repository:
    try:
        info = HfApi(
            endpoint=endpoint(), library_name="edgemoa", library_version=__version__
        ).model_info(name, revision=revision, files_metadata=True, timeout=METADATA_TIMEOUT_S)
        files = tuple(
            HubFile(
                path=found.rfilename,
                size=found.size,
                sha256=_hash(_SHA256, found.lfs.sha256 if found.lfs else None),
                git_id=_hash(_SHA1, found.blob_id),
            )
            for found in info.siblings or ()
            if isinstance(found.size, int) and found.size >= 0 and found.rfilename.isprintable()
        )
        commit = _hash(_SHA1, info.sha)
    except OfflineModeIsEnabled:
        raise NetworkError(
            "HF_HUB_OFFLINE is set: nothing is fetched from the hub",
            hint="unset it",
        ) from None
    except GatedRepoError:
        raise _gated(name) from None
    except RepositoryNotFoundError:
        raise _not_found(name) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(
            f"{name} has no revision {revision}",
            hint=f"look at {_page(name)}/commits/main",
        ) from None
    except HFValidationError:
        raise UserError(f"{name!r} is no repository of the hub", hint="use OWNER/NAME") from None
    except HfHubHTTPError as error:
        raise _status(name, error) from None
    except httpx2.HTTPError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        commit = None
    if commit is None:
        raise NetworkError(
            f"{_page()} does not answer as the hub does",
            hint="check HF_ENDPOINT and the network: does a login page answer in its place?",
        )
    return Repository(name, commit, files)


def _hash(pattern: re.Pattern[str], text: object) -> str | None:
    return text if isinstance(text, str) and pattern.fullmatch(text) else None


def _status(name: str, error: HfHubHTTPError) -> Exception:
    status = error.response.status_code
    if (known := _refusal(name, status, error.response.headers)) is not None:
        return known
    if status in (408, 425, 429) or status >= 500:
        after = error.response.headers.get("Retry-After", "")
        return TransientError(
            f"the hub answers {status}", float(after) if re.fullmatch(r"\d{1,6}", after) else 0.0
        )
    return NetworkError(f"the hub answers {status} when asked for {name}")


def _refusal(name: str, status: int, headers: Mapping[str, str]) -> EdgemoaError | None:
    """What a refusal of the hub means, if it says."""
    if headers.get("X-Error-Code") == "GatedRepo":
        return _gated(name)
    if status == 401 and "authorization" in {key.lower() for key in _headers()}:
        return UserError(
            "the hub does not know this board's token",
            hint=f"make a new one at {_page('settings/tokens')} and put it into HF_TOKEN",
        )
    if status == 401 or headers.get("X-Error-Code") == "RepoNotFound":
        return _not_found(name)
    if headers.get("X-Error-Code") == "EntryNotFound":
        return ModelNotFoundError(f"{name} no longer has that file")
    return None


def _gated(name: str) -> EdgemoaError:
    return UserError(
        f"{name} is given only to those who accepted its licence",
        hint=f"accept it at {_page(name)}, make a token for reading at "
        f"{_page('settings/tokens')}, and run this again with HF_TOKEN=... in the environment",
    )


def _not_found(name: str) -> EdgemoaError:
    return ModelNotFoundError(
        f"the hub has no repository {name}, or does not show it to everybody",
        hint="check its name; for a private one put a token into HF_TOKEN",
    )


def _headers() -> dict[str, str]:
    """What the hub is told with each request: this program's name, and the user's token."""
    headers: dict[str, str] = build_hf_headers(library_name="edgemoa", library_version=__version__)
    return headers


def check(path: Path, file: HubFile, progress: Progress) -> str:
    """The SHA-256 of what arrived; raises :class:`HashMismatchError` if it is not ``file``."""
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    sha256 = hash_file(path, lambda done: progress("check", done, file.size), git)
    given, found = (file.sha256, sha256) if file.sha256 else (file.git_id, git.hexdigest())
    if given is not None and given != found:
        raise HashMismatchError(
            f"{file.name} arrived with the hash {found}, not {given}",
            hint="try again; if that does not help, from another network",
        )
    return sha256
