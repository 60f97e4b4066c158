"""What users do with the libraries of the ecosystem alone: `python hub_user.py FUNCTION ARGUMENT ...`."""

import json
import sys
from pathlib import Path

import datasets
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

import hf_smoothing  # noqa: F401 (registers the classes and the task)


def load(model: str, run: str) -> None:
    """Load a model and a dataset by their names; print what they are, and write the dataset to rows.parquet."""
    loaded = [
        AutoConfig.from_pretrained(model),
        AutoModelForImageClassification.from_pretrained(model),
        pipeline("certified-image-classification", model=model, sigma=0.25),
    ]
    ((_, rows),) = datasets.load_dataset(run).items()
    rows.to_parquet("rows.parquet")
    features = {name: str(feature) for name, feature in rows.features.items()}
    print(json.dumps({"modules": [type(thing).__module__ for thing in loaded], "features": features}))


def upload_cards(*paths: str) -> None:
    """Upload model cards; the hub library has their metadata validated before."""
    api = HfApi()
    api.create_repo("user/cards")
    for path in paths:
        try:
            api.upload_file(path_or_fileobj=path, path_in_repo="README.md", repo_id="user/cards")
            print("valid")
        except ValueError as error:
            print(" ".join(str(error).split()))


def upload_folder(folder: str, repo_id: str) -> None:
    """What `hf upload REPO FOLDER` does."""
    api = HfApi()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=Path(folder))


if __name__ == "__main__":
    {"load": load, "upload_cards": upload_cards, "upload_folder": upload_folder}[sys.argv[1]](*sys.argv[2:])
