"""What folders become on the Hub, without one."""

import shutil
import warnings
from pathlib import Path

import pytest
from helpers.paths import ROOT, SHIPPED_MODEL

from hf_smoothing.hub.publication import publication_of
from hf_smoothing.hub.push import plan_push

RUN = SHIPPED_MODEL / "results" / "cifar10" / "sigma-0.25"


def test_a_run_keeps_the_card_that_it_has(tmp_path):
    for name in ("certificates.parquet", "run.json"):
        (tmp_path / name).write_bytes((RUN / name).read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Mine\n")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "records-rank00000.jsonl").write_text("{}\n")
    stage = tmp_path / "stage"
    stage.mkdir()
    publication = publication_of(tmp_path)
    publication.stage(stage, "user/mine")
    assert publication.left_out == ["shards/", "stage/"]
    card = (stage / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\nconfigs:\n")
    assert card.endswith("# Mine\n")
    assert (tmp_path / "README.md").read_text() == "---\nlicense: cc0-1.0\n---\n# Mine\n"


@pytest.mark.parametrize("folder", sorted(ROOT.glob("model_cards/*/")), ids=lambda folder: folder.name)
def test_a_shipped_folder_is_what_would_be_published(folder, tmp_path):
    """So that `hf upload` of the folder is the whole publication."""
    publication_of(folder).stage(tmp_path, f"user/{folder.name}")
    staged = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    there = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert staged.keys() == there.keys()
    card = Path("README.md")  # its examples load the folder, those of the published one the repository
    assert staged.pop(card).decode() == there.pop(card).decode().replace(
        f'"model_cards/{folder.name}"', f'"user/{folder.name}"'
    )
    assert staged == there


def test_a_published_card_names_the_repository(tmp_path):
    folder, stage = tmp_path / "my-model", tmp_path / "stage"
    shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("results"))
    metadata = "---\nlicense: mit\nmodel_name: {}\n---\n\n"
    (folder / "README.md").write_text(
        metadata.format("my-model") + '# my-model\n\npipeline(model="user/my-model")\nload("my-model", "my-model-2")\n'
    )
    stage.mkdir()
    publication_of(folder).stage(stage, "user/digits")
    card = (stage / "README.md").read_text()
    text = '# digits\n\npipeline(model="user/digits")\nload("user/digits", "my-model-2")\n'
    assert card == metadata.format("digits") + text
    assert "my-model" in (folder / "README.md").read_text()


def test_a_card_without_a_license_is_published_with_a_warning(tmp_path):
    folder = tmp_path / "my-model"
    shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("results"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_push(folder, "user/my-model")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# my-model\n")
    with pytest.warns(UserWarning, match=r"my-model names no license, .*`license: \.\.\.` in card\.yaml"):
        plan_push(folder, "user/my-model")
