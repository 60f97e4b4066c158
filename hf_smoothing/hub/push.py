"""Publish models, count heads and finished runs on the Hub.

Tokens come from where the hub library keeps them (`hf auth login`, or the variable HF_TOKEN), and go nowhere else.
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from ..utils.processes import on_main_first
from .errors import HubError, translate_hub_errors
from .publication import Publication, publication_of


@dataclass(frozen=True)
class UploadPlan:
    """
    What [`push`] uploads.

    Attributes:
        repo_type: `model` or `dataset`.
        sizes: bytes of each file, by its path in the repository.
        skipped: names in the folder that are not uploaded.
    """

    repo_type: str
    sizes: dict[str, int]
    skipped: list[str]


def plan_push(folder: str | Path, repo_id: str, *, allow_unfinished: bool = False) -> UploadPlan:
    """
    List what [`push`] would upload, without a token and without a request to the Hub.

    Raises:
        ValueError: see [`push`].
    """
    validate_repo_id(repo_id)
    publication = _check(publication_of(folder), allow_unfinished)
    with TemporaryDirectory() as stage:
        publication.stage(Path(stage), repo_id)
        files = sorted(file for file in Path(stage).rglob("*") if file.is_file())
        sizes = {file.relative_to(stage).as_posix(): file.stat().st_size for file in files}
    # code files that the folder already has are not skipped: the installed package's are uploaded in their place
    return UploadPlan(publication.kind, sizes, [name for name in publication.left_out if name not in sizes])


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    allow_unfinished: bool = False,
) -> str:
    """
    Publish a model, a count head or a finished run.

    A model is uploaded with the code that loads it where this package is not installed. A run becomes a dataset
    repository. Call it again after an interruption: files that have arrived are not sent again.

    Args:
        folder: the folder of a model, a count head or a run.
        repo_id: `user/name`, or `name` for a repository of the token's user. It is created if it does not exist.
        private: create the repository as a private one.
        revision: the branch to push to. It is created if it does not exist.
        allow_unfinished: publish a model although its training was cut short.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the folder is none of these, incomplete, or holds a training cut short, or if `repo_id` is malformed.
        HubError: if there is no token, if the token may not write, or if the Hub or the connection fails.
    """
    publication = _check(publication_of(folder), allow_unfinished)
    name = create_repository(repo_id, publication.kind, private)
    api = HfApi()
    with TemporaryDirectory() as stage, translate_hub_errors(f"{name} cannot be pushed"):
        publication.stage(Path(stage), name)
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=publication.kind, exist_ok=True)
        with warnings.catch_warnings():
            # the results of a model are Parquet files and belong to it
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            commit = api.upload_folder(
                repo_id=name,
                repo_type=publication.kind,
                folder_path=stage,
                revision=revision,
                commit_message=f"Publish with hf-smoothing {version('hf-smoothing')}",
            )
    return commit.commit_url


def _check(publication: Publication, allow_unfinished: bool) -> Publication:
    """Refuse a model whose training was cut short, unless that is allowed; warn of one without a card."""
    folder = publication.folder
    if publication.is_unfinished and not allow_unfinished:
        raise ValueError(
            f"The training in {folder} was cut short: there is no results/training.json. Resume it "
            "(--resume_from_checkpoint latest), or publish what there is with --allow-unfinished."
        )
    if publication.kind == "model" and "README.md" not in publication.files:
        warnings.warn(
            f"{folder} has no card (README.md): nobody will know what the model is. `hf-smoothing card` writes one.",
            stacklevel=3,
        )
    elif publication.kind == "model" and not ModelCard.load(publication.files["README.md"]).data.get("license"):
        warnings.warn(
            f"The card of {folder} names no license, so others may not use the model. Choose one: `license: ...` in "
            "card.yaml, then `hf-smoothing card`.",
            stacklevel=3,
        )
    return publication


def create_repository(repo_id: str, repo_type: str, private: bool = False) -> str:
    """
    Create a repository if it does not exist, so that a missing permission is found before any long work.

    Args:
        repo_id: `user/name`, or `name` for a repository of the token's user.
        repo_type: `model` or `dataset`.
        private: create it as a private one.

    Returns:
        The full name of the repository.

    Raises:
        ValueError: if the name is malformed, or if `private` is set and the repository exists and is public.
        HubError: if there is no token, or if the Hub refuses the request.
    """
    validate_repo_id(repo_id)
    if get_token() is None:
        raise HubError(f"{repo_id} cannot be pushed: there is no token. Log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    with translate_hub_errors(f"{repo_id} cannot be pushed"):
        name = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        public = (
            private and not api.repo_info(name, repo_type=repo_type).private
        )  # `create_repo` changes no repository
    if public:
        raise ValueError(f"{name} exists and is public: make it private on its page, or choose another name.")
    return name


@dataclass
class HubSettings:
    """
    Whether and where a training publishes its model.

    Raises:
        ValueError: if the name is malformed, or if another setting is given without `push_to_hub`.
    """

    push_to_hub: bool = HfArg(default=False, help="publish the trained model on the Hub")
    hub_model_id: str | None = HfArg(
        default=None, help="repository to publish in, `user/name`; by default the name of output_dir"
    )
    hub_private_repo: bool = HfArg(default=False, help="create the repository as a private one")

    def __post_init__(self) -> None:
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise ValueError("hub_model_id and hub_private_repo have no meaning without --push_to_hub.")
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)

    def prepare(self, output_dir: str, accelerator: Accelerator) -> None:
        """
        Create the repository before the training, if the model will be published.

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
        Push the trained model from the main process; call [`prepare`] first.

        Raises:
            HubError: if the push fails; the message gives the command that publishes the model later.
        """
        if self.push_to_hub and self.hub_model_id is not None and accelerator.is_main_process:
            try:
                accelerator.print(f"Published: {push(output_dir, self.hub_model_id, private=self.hub_private_repo)}")
            except (OSError, ValueError) as error:
                later = f"hf-smoothing push {output_dir} {self.hub_model_id}"
                raise HubError(f"{error} The model is in {output_dir}; `{later}` publishes it.") from error
