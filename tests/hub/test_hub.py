"""Publishing by the real hub library, against a server on loopback: `helpers/hub_server.py`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from helpers.hub_client import HubClient, assert_no_token, error_lines, read_files
from helpers.hub_server import READ_TOKEN, TOKEN, HubServer
from helpers.models import save_model
from helpers.paths import ROOT, SHIPPED_MODEL
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, pipeline

from hf_smoothing import MixedNoiseViTForCountPrediction
from hf_smoothing.hub.errors import HubError
from hf_smoothing.hub.push import push
from hf_smoothing.runs.records import SCHEMA

RUN = SHIPPED_MODEL / "results" / "cifar10" / "sigma-0.25"
CODE = {path.name for path in (ROOT / "hf_smoothing" / "core").glob("[!_]*.py")} - {"registration.py"}


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def module_client(server, tmp_path_factory):
    client = HubClient(server.endpoint, tmp_path_factory.mktemp("home"))
    yield client
    client.processes.close()


@pytest.fixture
def hub(server):
    """An empty Hub. When a test ends, no token is in any file of a repository."""
    server.reset()
    yield server
    for repo in server.repos.values():
        for files in repo.commits.values():
            assert_no_token({path: blob.content for path, blob in files.items()})


@pytest.fixture
def client(module_client, hub):
    """A user with an empty home. When a test ends, no token is in any file that its commands left."""
    module_client.reset()
    yield module_client
    assert_no_token(read_files(module_client.home))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model's folder as a training leaves it."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    save_model(folder, ["cat", "dog", "frog"])
    for name in ("step_3/model.safetensors", "hf-smoothing/events.out", "results/run/shards/records-rank00000.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of this training alone")
    (folder / "training_log.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    (folder / "results" / "training.json").write_text("{}\n")
    return folder


def save_head(base, folder):
    """An untrained count head on a model."""
    torch.manual_seed(1)
    model = MixedNoiseViTForCountPrediction.from_pretrained(base, count_sigmas=[0.25, 0.5])
    model.config.image_mean = [0.3, 0.4, 0.5]  # what is not in the checkpoint must come from the config
    model.save_pretrained(folder)
    ViTImageProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(trained, tmp_path_factory):
    """The folder of a count head on that model."""
    return save_head(trained, tmp_path_factory.mktemp("heads") / "head")


@pytest.fixture(scope="module")
def pictures(demo_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    names = [str(folder / f"{number}.png") for number in (6, 8)]
    for name in names:
        demo_images[int(Path(name).stem)]["image"].save(name)
    return names


def write_files(files, folder):
    """Write a repository's files to a folder, as a download does."""
    for path, blob in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(blob.content)
    return folder


def test_a_pushed_model_has_the_files_of_its_folder_and_the_code_of_the_package(hub, client, trained):
    before = read_files(trained)
    listed = client("push", trained, "user/model", "--dry-run", token=None)
    assert (listed.returncode, hub.requests) == (0, [])
    assert "Not uploaded: hf-smoothing/, notes.txt, step_3/, training_log.jsonl" in listed.stdout
    pushed = client("push", trained, "user/model", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"Published: {hub.endpoint}/user/model/commit/")
    published = hub.repos["model", "user/model"]
    assert published.private
    files = {path: blob.content for path, blob in published.files().items() if path != ".gitattributes"}
    own = {"model.safetensors", "preprocessor_config.json", "results/training.json"}
    assert files.keys() == CODE | own | {"config.json"}
    rows = [line.split() for line in listed.stdout.splitlines()]
    sizes = {row[1]: int(row[0].replace(",", "")) for row in rows if len(row) == 2 and row[1] in files}
    assert sizes == {path: len(content) for path, content in files.items()}
    assert all(files[name] == before[name] for name in own)
    assert all(files[name] == (ROOT / "hf_smoothing" / "core" / name).read_bytes() for name in CODE)
    assert read_files(trained) == before
    # what was published can be published again
    assert client("push", write_files(published.files(), client.folder / "again"), "user/again").returncode == 0
    assert hub.repos["model", "user/again"].files() == published.files()


def test_a_pushed_folder_loads_without_remote_code_where_the_package_is(hub, client, trained, pictures, tmp_path):
    assert client("push", trained, "user/local").returncode == 0
    folder = str(write_files(hub.repos["model", "user/local"].files(), tmp_path / "local"))
    assert type(AutoModelForImageClassification.from_pretrained(folder)).__module__.startswith("hf_smoothing.")
    assert "custom_pipelines" not in AutoConfig.from_pretrained(folder).to_dict()
    certify, certify_published = (
        pipeline("certified-image-classification", model=str(model), sigma=0.25) for model in (trained, folder)
    )
    assert certify(pictures, max_draws=60, seed=0) == certify_published(pictures, max_draws=60, seed=0)


def test_without_the_package_remote_code_gives_the_same_certificates(hub, client, pictures, tmp_path):
    """The reference model, in a process with an empty cache and no package."""
    head = save_head(SHIPPED_MODEL, tmp_path / "head")
    for folder, name in ((SHIPPED_MODEL, "user/remote"), (head, "user/head")):
        assert client("push", folder, name).returncode == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "tests/helpers/remote_code.py", "user/remote", "user/head", *pictures],
        env={**environment, **client.environment}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    remote = json.loads(done.stdout)
    assert remote["task"] == "certified-image-classification"
    assert remote["module"].startswith("transformers_modules.user.remote.")
    certify = pipeline("certified-image-classification", model=str(SHIPPED_MODEL), sigma=0.25)
    labels = {certificate["label"] for certificate in remote["certificates"]}
    assert labels <= set(certify.model.config.id2label.values())
    assert remote["certificates"] == certify(pictures, max_draws=60, radius=0.1, seed=0)
    guided = certify(pictures, max_draws=60, radius=0.1, seed=0, count_head=str(head))
    assert remote["with_count_head"] == guided
    size = certify.model.config.image_size
    with torch.inference_mode():
        model = MixedNoiseViTForCountPrediction.from_pretrained(head).eval()
        counts = model(torch.linspace(0, 1, 3 * size**2).view(1, 3, size, size), sigma=0.25).probabilities
    assert torch.allclose(torch.tensor(remote["counts"]), counts, atol=1e-6)


def test_names_load_without_remote_code_where_the_package_is_and_a_run_is_a_dataset(hub, client, trained):
    assert client("push", trained, "user/named", "--private").returncode == 0
    assert client("push", RUN, "user/run").returncode == 0
    published = {path: blob.content for path, blob in hub.repos["dataset", "user/run"].files().items()}
    run = {path: content for path, content in read_files(RUN).items() if path != "README.md"}
    assert published.items() >= run.items()
    assert "README.md" in published
    done = client.call("load", "user/named", "user/run")
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert all(module.startswith("hf_smoothing.") for module in loaded["modules"])
    features = datasets.Features.from_arrow_schema(pq.read_schema(RUN / "certificates.parquet"))
    assert loaded["features"] == {name: str(feature) for name, feature in features.items()}
    assert set(features) - {"routing"} <= set(SCHEMA.names)  # a column of an earlier version
    rows = pq.read_table(client.folder / "rows.parquet").to_pylist()
    assert rows == pq.read_table(RUN / "certificates.parquet").to_pylist()


def test_the_hub_takes_the_metadata_of_every_card(client, tmp_path):
    cards = sorted(ROOT.glob("model_cards/*-*/README.md"))
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": "a", "type": "a"},
        "metrics": [{"type": "b"}],
    }
    index = json.dumps([{"name": "model", "results": [result]}])  # a metric without its value
    broken = cards[0].read_text().replace("---\n", f"---\nmodel-index: {index}\n", 1)
    (tmp_path / "broken.md").write_text(broken)
    *answers, refusal = client.call("upload_cards", *cards, tmp_path / "broken.md").stdout.splitlines()
    assert answers == ["valid"] * len(cards)
    assert refusal.startswith("Invalid metadata in README.md.")
    assert "value" in refusal


def test_a_shipped_folder_uploaded_by_the_hub_library_is_what_push_publishes(hub, client):
    assert client.call("upload_folder", SHIPPED_MODEL, "user/plain").returncode == 0
    assert client("push", SHIPPED_MODEL, "user/pushed").returncode == 0
    plain, pushed = (hub.repos["model", name].files() for name in ("user/plain", "user/pushed"))
    assert plain.keys() == pushed.keys() > CODE
    # the examples in the card of `push` name the repository
    assert [path for path in plain if plain[path] != pushed[path]] == ["README.md"]


def test_revisions_are_branches(hub, client, trained, head):
    for folder, options in ((trained, []), (head, ["--revision", "heads/first"])):
        assert client("push", folder, "user/revised", *options).returncode == 0
    repo = hub.repos["model", "user/revised"]
    assert repo.branches.keys() == {"main", "heads/first"}
    for revision, folder in (("main", trained), ("heads/first", head)):
        assert repo.files(revision)["model.safetensors"].content == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("POST", "/repos/create", 401), "does not accept the token (401). Log in again"),
        (("POST", "/repos/create", 429, 1, {"Retry-After": "7"}), "Run it again in 7 seconds"),
        (("POST", "/repos/create", 500), "the Hub failed (500)"),
        (("POST", "/preupload/", 403), "the token may not do this (403)"),
        (("POST", "/preupload/", 404), "there is no such repository"),
        (("PUT", "/lfs/", "garble", 9), "(422): The uploaded object does not have the sha256"),
        (("PUT", "/lfs/", 403, 9), "the token may not do this (403)"),
        (("POST", "/commit/", 500), "the Hub failed (500)"),
    ],
)
def test_a_push_that_fails_names_the_cause_in_one_line_and_the_next_one_succeeds(hub, client, head, fault, message):
    hub.fail(*fault)
    failed = client("push", head, "user/model")
    assert (failed.returncode, failed.stdout) == (2, "")
    (line,) = error_lines(failed)
    assert line.startswith("error: user/model cannot be pushed: ")
    assert message in line
    repo = hub.repos.get(("model", "user/model"))
    assert repo is None or "config.json" not in repo.files()
    hub.faults.clear()
    assert client("push", head, "user/model").returncode == 0
    assert "model.safetensors" in hub.repos["model", "user/model"].files()


def test_a_hub_that_fails_once_is_asked_again(hub, client, head):
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/lfs/", 429, headers={"Retry-After": "0"})
    assert client("push", head, "user/model").returncode == 0


@pytest.mark.parametrize(
    ("folder", "repo_id", "token", "message"),
    [
        ("HEAD", "user/x", None, "there is no token. Log in with `hf auth login`, or set HF_TOKEN."),
        ("HEAD", "user/x", "hf_wrong", "does not accept the token (401)"),
        ("HEAD", "user/x", READ_TOKEN, "the token may not do this (403)"),
        ("HEAD", "other/x", TOKEN, "the token may not do this (403)"),
        ("HEAD", "user/public", TOKEN, "user/public exists and is public"),
        ("HEAD", "a/b/c", TOKEN, "a/b/c"),
        ("EMPTY", "user/x", TOKEN, "has neither config.json nor run.json"),
        ("UNFINISHED", "user/x", TOKEN, "holds no finished run"),
        ("OTHER", "user/x", TOKEN, "holds a vit model (ViTForImageClassification)"),
        ("BARE", "user/x", TOKEN, "lacks model.safetensors, preprocessor_config.json"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    hub, client, head, folder, repo_id, token, message, tmp_path
):
    for name, files in {
        "EMPTY": {},
        "UNFINISHED": {"run.json": {"settings": {}, "finished": None}, "certificates.parquet": ""},
        "OTHER": {"config.json": {"model_type": "vit", "architectures": ["ViTForImageClassification"]}},
        "BARE": {"config.json": json.loads((head / "config.json").read_text())},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(json.dumps(content))
    shutil.copytree(head, tmp_path / "HEAD")
    hub.add_repo("model", "user/public")
    done = client("push", tmp_path / folder, repo_id, "--private", token=token)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = error_lines(done)
    assert message in line
    assert list(client.folder.iterdir()) == []
    assert hub.repos.keys() == {("model", "user/public")}


def test_offline_is_named(head, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match=r"user/x cannot be pushed: HF_HUB_OFFLINE is set\. Unset it\.$"):
        push(head, "user/x")


def test_the_token_of_hf_auth_login_serves_as_well(client, head):
    (client.home / "token").write_text(TOKEN)
    assert client("push", head, "user/logged-in", token=None).returncode == 0
    (client.home / "token").unlink()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pretrain", ["--dataset_name", "gone"]),
        ("finetune", ["--dataset_name", "gone", "--model_name_or_path", "gone"]),
        ("train_count_head", ["--counts", "gone", "--model_name_or_path", "gone"]),
    ],
)
def test_a_training_that_could_not_publish_does_not_start(client, script, arguments):
    training = [ROOT / "scripts" / f"{script}.py", *arguments, "--output_dir", "mine"]
    for options, token, message in [
        (["--push_to_hub"], None, "mine cannot be pushed: there is no token."),
        (["--push_to_hub", "--hub_model_id", "other/mine"], TOKEN, "other/mine cannot be pushed: the token may not"),
        (["--push_to_hub", "--hub_model_id", "user/mi ne"], TOKEN, "'user/mi ne'"),
        (["--hub_model_id", "user/mine"], TOKEN, "no meaning without --push_to_hub"),
    ]:
        done = client(*training, *options, token=token)
        assert done.returncode == 1
        (line,) = error_lines(done)
        assert message in line
        assert not (client.folder / "mine").exists()


def test_a_training_publishes_its_model(hub, client, trained, parquet):
    training = [
        ROOT / "scripts" / "finetune.py", "--model_name_or_path", trained, "--dataset_name", parquet, "--output_dir",
        "mine", "--per_device_train_batch_size", "100", "--max_train_steps", "1",
    ]  # fmt: skip
    done = client(*training, "--push_to_hub", "--hub_private_repo")
    assert done.returncode == 0, done.stderr
    published = hub.repos["model", "user/mine"]
    assert published.private
    assert {"model.safetensors", "results/training.json", "smoothing.py", "card.yaml"} < published.files().keys()
    card = ModelCard(published.files()["README.md"].content.decode())
    assert (card.data.license, card.data.pipeline_tag) == (None, "image-classification")  # its owner chooses one
    assert "final training loss" in card.text
    assert not any(path.startswith(("step_", "training_log")) for path in published.files())
    hub.fail("POST", "/preupload/", 403)
    later = client(*training, "--push_to_hub", "--resume_from_checkpoint", "latest")
    assert later.returncode == 1
    assert "The model is in mine; `hf-smoothing push mine user/mine` publishes it." in later.stderr
