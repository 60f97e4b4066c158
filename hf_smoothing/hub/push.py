"""To the Hub and back by the hub library's own functions: what is added is what to send, and what to say when it fails.

Tokens come from where the hub library keeps them (`hf auth login`, or the variable HF_TOKEN), and go nowhere else.
"""

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from transformers.hf_argparser import HfArg

from ..utils.processes import on_main_first
from .publication import publication_of

KINDS = ("model", "dataset")


class HubError(OSError):
    """What went wrong on the Hub or on the way there, in one line, and what to do about it."""


@dataclass(frozen=True)
class Listing:
    """
    What a push uploads.

    Attributes:
        kind: of the repository.
        sizes: bytes by path in the repository.
        left_out: names in the folder of which nothing is uploaded.
    """

    kind: str
    sizes: dict[str, int]
    left_out: list[str]


def list_push(folder: str | Path, repo_id: str) -> Listing:
    """
    What [`push`] would upload; nothing is sent or asked, and it takes no token.

    Raises:
        ValueError: see [`push`].
    """
    validate_repo_id(repo_id)
    publication = publication_of(folder)
    with TemporaryDirectory() as stage:
        publication.stage(Path(stage))
        files = sorted(file for file in Path(stage).rglob("*") if file.is_file())
        sizes = {file.relative_to(stage).as_posix(): file.stat().st_size for file in files}
    # a folder that has the code already gets the installed package's: that is not left out
    return Listing(publication.kind, sizes, [name for name in publication.left_out if name not in sizes])


def push(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """
    Publish a model, a count head or a finished run.

    A model goes with the code that loads it where this package is not installed. A run becomes a dataset repository. What
    was uploaded before is not sent again, so that a push cut short is mended by the same call.

    Args:
        folder: a model's, a count head's or a run's.
        repo_id: `user/name`; a name alone is one of the user's own. It is created where it is not there.
        private: create it as a private one.
        revision: a branch; created where it is not there.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder that is none of these or not complete, or a malformed `repo_id`.
        HubError: without a token, for one that may not write, and where the Hub or the connection fails.
    """
    publication = publication_of(folder)
    name = create_repository(repo_id, publication.kind, private)
    api = HfApi()
    with TemporaryDirectory() as stage, _explained(f"{name} cannot be pushed", revision):
        publication.stage(Path(stage))
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=publication.kind, exist_ok=True)
        with warnings.catch_warnings():
            # results of a model are Parquet files, and belong to it
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            commit = api.upload_folder(
                repo_id=name,
                repo_type=publication.kind,
                folder_path=stage,
                revision=revision,
                commit_message=f"Publish with hf-smoothing {version('hf-smoothing')}",
            )
    return commit.commit_url


def create_repository(repo_id: str, kind: str, private: bool = False) -> str:
    """
    Make sure that there is a repository to write to, before any long work.

    Args:
        repo_id: `user/name`, or a name alone.
        kind: `model` or `dataset`.
        private: create it as a private one.

    Returns:
        Its full name.

    Raises:
        ValueError: for a malformed name; for a public repository that is there already, where a private one is asked for.
        HubError: without a token, or where the Hub refuses it.
    """
    validate_repo_id(repo_id)
    if get_token() is None:
        raise HubError(f"{repo_id} cannot be pushed: there is no token. Log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    with _explained(f"{repo_id} cannot be pushed"):
        name = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True).repo_id
        public = private and not api.repo_info(name, repo_type=kind).private  # `create_repo` leaves what is there
    if public:
        raise ValueError(f"{name} is there already, and public: make it private on its page, or choose another name.")
    return name


def pull(
    repo_id: str, folder: str | Path | None = None, *, kind: str | None = None, revision: str | None = None
) -> Path:
    """
    Fetch a repository, look whether every file is what the Hub says it is, and only then put it in its place.

    Args:
        repo_id: `user/name`.
        folder: a new or empty one; by default the repository's name.
        kind: `model` or `dataset`; by default a model, or a dataset where there is no such model.
        revision: a branch, tag or commit.

    Returns:
        The folder.

    Raises:
        ValueError: for a folder that holds something, a malformed `repo_id` or unknown kind.
        HubError: where there is no such repository, the Hub or the connection fails, or files came broken. What was
            downloaded stays in the hub library's cache, and the folder is not there.
    """
    validate_repo_id(repo_id)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: use {' or '.join(KINDS)}.")
    target = Path(repo_id.split("/")[-1] if folder is None else folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{str(target)!r} is there already: name a new folder.")
    with _explained(f"{repo_id} cannot be pulled", revision):
        try:
            snapshot = _download(repo_id, kind or KINDS[0], revision)
        except RepositoryNotFoundError as error:
            if kind is not None or isinstance(error, GatedRepoError):
                raise
            snapshot = _download(repo_id, KINDS[1], revision)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as part:
        whole = shutil.copytree(snapshot, Path(part) / "whole", ignore=shutil.ignore_patterns(".gitattributes"))
        whole.replace(target)
    return target


def _download(repo_id: str, kind: str, revision: str | None) -> Path:
    """A repository in the hub library's cache, checked: the library compares sizes, which a garbled file may have."""
    snapshot = Path(snapshot_download(repo_id, repo_type=kind, revision=revision))
    found = HfApi().verify_repo_checksums(repo_id, repo_type=kind, revision=snapshot.name)
    for one in found.mismatches:  # or they would be taken from the cache next time, here and by `from_pretrained`
        broken = snapshot / one["path"]
        broken.resolve().unlink(missing_ok=True)
        broken.unlink(missing_ok=True)
    if found.mismatches:
        names = ", ".join(one["path"] for one in found.mismatches)
        raise HubError(f"{names} came with another checksum than the Hub lists, and was thrown away. Pull again.")
    return snapshot


@dataclass
class HubSettings:
    """
    Whether and where a training publishes its model.

    Raises:
        ValueError: for a malformed name, or a name without `push_to_hub`.
    """

    push_to_hub: bool = HfArg(default=False, help="publish the finished model on the Hub")
    hub_model_id: str | None = HfArg(default=None, help="as this; by default, the name of output_dir")
    hub_private_repo: bool = HfArg(default=False, help="create the repository as a private one")

    def __post_init__(self) -> None:
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("hub_model_id and hub_private_repo have no meaning without --push_to_hub.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)

    def prepare(self, output_dir: str, accelerator: Accelerator) -> None:
        """
        Create the repository where there is to be one: a token that is missing or may not write should not cost a training.

        Raises:
            ValueError, HubError: see [`create_repository`]; on all processes.
        """

        def create() -> str:
            return create_repository(
                self.hub_model_id or Path(output_dir).absolute().name, "model", self.hub_private_repo
            )

        if self.push_to_hub:
            self.hub_model_id = on_main_first(accelerator, create)

    def publish(self, output_dir: str, accelerator: Accelerator) -> None:
        """
        Push the trained model, from the main process, after [`prepare`].

        Raises:
            HubError: where it fails; the message says how to do it later.
        """
        if self.push_to_hub and self.hub_model_id is not None and accelerator.is_main_process:
            try:
                accelerator.print(f"Published: {push(output_dir, self.hub_model_id, private=self.hub_private_repo)}")
            except (OSError, ValueError) as error:
                later = f"hf-smoothing push {output_dir} {self.hub_model_id}"
                raise HubError(f"{error} The model is in {output_dir}; `{later}` publishes it.") from error


@contextmanager
def _explained(what: str, revision: str | None = None) -> Iterator[None]:
    """One [`HubError`] for whatever the hub library raises, on a line of its own; progress bars where someone looks."""
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # the bars of an upload that fails leave the cursor behind them
        raise HubError(f"{what}: {_reason(error, revision)}") from error
    finally:
        if quiet:
            enable_progress_bars()


def _reason(error: BaseException, revision: str | None) -> str:
    if isinstance(error, HubError):
        return str(error)
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    answer = next((one for one in causes if isinstance(one, HfHubHTTPError)), None)
    if answer is None:
        if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
            return "HF_HUB_OFFLINE is set. Unset it."
        lost = next((one for one in causes if isinstance(one, HTTPError)), None)
        said = next((line.strip() for line in str(lost or error).splitlines() if line.strip()), type(error).__name__)
        if lost is not None:
            said = f"the connection failed ({said.rstrip('.')}). Start it again; what arrived is not sent twice."
        return said
    status = answer.response.status_code
    if isinstance(answer, RevisionNotFoundError):
        return f"there is no revision {revision!r}. Name a branch, tag or commit that is there."
    if isinstance(answer, GatedRepoError):
        return "its owner grants access by request. Ask for it on its page."
    if status == 401 and get_token() is not None:
        return "the Hub does not accept the token (401). Log in anew with `hf auth login`, or set another HF_TOKEN."
    if status in (401, 404):
        return (
            f"there is no such repository, or it is private and the token may not see it ({status}). Log in with "
            "`hf auth login`, or mend the name."
        )
    if status == 403:
        return "the token may not do this (403). Take one with write access to it, or a name of your own."
    if status == 429:
        wait = answer.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"the Hub had too many requests (429). Start it again {when}; what arrived is not sent twice."
    if status >= 500:
        return f"the Hub failed ({status}). Start it again later; what arrived is not sent twice."
    said = " ".join((answer.server_message or str(answer)).split())
    return f"the Hub refused it ({status}): {said}"
