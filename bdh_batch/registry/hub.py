"""Looks up repositories of the Hugging Face Hub: which files a commit has, and their URLs.

That is done with the Hub's own library, which takes its address, token and offline mode from the environment. The files
themselves are downloaded as from any other URL: within bounds, and resumed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.registry.download import Download
from bdh_batch.registry.manifest import is_file_name
from bdh_batch.system.documents import TOKENIZER_FOLDER, brief

SECONDS = 30.0  # within which the Hub has to respond
REPOSITORY = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class Repository:
    """The top-level files of one commit of a repository, and those of its folder `tokenizer`.

    The values of `files` are their SHA-256 where the Hub reports it, as it does for large files.
    """

    name: str
    commit: str
    files: Mapping[str, str | None]
    top: frozenset[str]
    endpoint: str | None
    headers: Mapping[str, str]

    def wanted(self, file: str, sha256: str | None) -> Download:
        """Returns the download of a file, with its checksum where the caller or the Hub knows it."""
        from huggingface_hub import hf_hub_url

        path = file if file in self.top else f"{TOKENIZER_FOLDER}/{file}"
        url = hf_hub_url(self.name, path, revision=self.commit, endpoint=self.endpoint)
        return Download(httpx.URL(url), file, self.headers, sha256 or self.files[file])


def open_repository(source: str) -> Repository:
    """Looks up the commit and files of `hf:ORG/NAME[@REV]`.

    Raises:
        ConfigError: `source` is not of that form.
        CheckpointError: there is no such repository or revision, or the Hub cannot be reached.
    """
    match = REPOSITORY.fullmatch(source)
    if match is None or ".." in source:
        raise ConfigError(f"{brief(source)}: hf:ORG/NAME or hf:ORG/NAME@REVISION is expected")
    from huggingface_hub import HfApi, constants, get_token  # slow to import

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    try:
        api = HfApi(endpoint=endpoint, library_name="bdh-batch")
        info = api.model_info(match["name"], revision=match["revision"], timeout=SECONDS, files_metadata=True)
        files = {each.rfilename: each.lfs.sha256 if each.lfs else None for each in info.siblings or ()}
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    except Exception as error:  # the library's, its HTTP client's, and those of a Hub that speaks another protocol
        raise CheckpointError(f"{source}: {_reason(error)}") from error
    top = {name: sha256 for name, sha256 in files.items() if is_file_name(name)}
    nested = {name.removeprefix(f"{TOKENIZER_FOLDER}/"): sha256 for name, sha256 in files.items()}
    return Repository(
        match["name"],
        info.sha or match["revision"] or DEFAULT_REVISION,
        {name: sha256 for name, sha256 in nested.items() if is_file_name(name)} | top,
        frozenset(top),
        endpoint,
        {"authorization": f"Bearer {token}"} if token else {},
    )


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "the Hub asks for more rights; accept its terms there, and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or it is private; then HF_TOKEN has to be set"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    return f"the Hub cannot be asked ({type(error).__name__}: {brief(error)})"
