"""Publishing and fetching, by the real hub library, against a server on loopback."""

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
from helpers.hub_client import Client
from helpers.hub_server import READ_TOKEN, TOKEN, HubServer
from helpers.models import save_model
from helpers.paths import ROOT, SHIPPED_MODEL
from huggingface_hub import HfApi, ModelCard
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, pipeline

from hf_smoothing import MixedNoiseViTForCountPrediction
from hf_smoothing.hub.push import HubError, pull, push
from hf_smoothing.runs.records import SCHEMA

RUN = SHIPPED_MODEL / "results" / "cifar10"
CODE = {
    "active_images.py", "bounds.py", "calibration.py", "certificates.py", "configuration_mixed_noise_vit.py",
    "count_predictor.py", "data.py", "forward_pass.py", "loading.py", "modeling_count_prediction.py",
    "modeling_mixed_noise_vit.py", "noise.py", "pipeline_certified_image_classification.py", "preprocessing.py", "rules.py",
    "sequential.py", "smoothing.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A user who has a token; in the end, none of it is in any output, file or repository that the tests left."""
    found = Client(hub.endpoint, tmp_path_factory.mktemp("home"), TOKEN)
    yield found
    left = list(contents(found.home).items())
    left += [file for repo in hub.repos.values() for files in repo.commits.values() for file in files.items()]
    for path, content in left:
        content = content if isinstance(content, bytes) else content.content
        assert TOKEN.encode() not in content, path
        assert READ_TOKEN.encode() not in content, path


@pytest.fixture(autouse=True)
def nothing_goes_wrong(request):
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").reset()


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
    """A count head on a model, untrained."""
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


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()
    }


def test_a_model_comes_back_as_it_went_and_brings_its_code(hub, client, trained):
    before = contents(trained)
    listed = client("push", trained, "user/model", "--dry-run", token=None)
    assert (listed.code, hub.requests) == (0, [])
    assert "Left out: hf-smoothing/, notes.txt, step_3/, training_log.jsonl" in listed.out
    pushed = client("push", trained, "user/model", "--private")
    assert pushed.code == 0, pushed.err
    assert pushed.out.startswith(f"Published: {hub.endpoint}/user/model/commit/")
    published = hub.repos["model", "user/model"]
    assert published.private
    sizes = {path: len(blob.content) for path, blob in published.files().items() if path != ".gitattributes"}
    assert sizes.keys() == CODE | {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "results/training.json",
    }
    rows = [line.split() for line in listed.out.splitlines()]
    assert sizes == {row[1]: int(row[0].replace(",", "")) for row in rows if row[1] in sizes and len(row) == 2}
    assert client("pull", "user/model", "here/model").out == "Wrote here/model.\n"
    pulled = contents(client.folder / "here" / "model")
    assert pulled == {path: blob.content for path, blob in published.files().items() if path != ".gitattributes"}
    assert contents(trained) == before
    for name in ("model.safetensors", "preprocessor_config.json"):
        assert pulled[name] == before[name]
    for name in CODE:
        assert pulled[name] == (ROOT / "hf_smoothing" / name).read_bytes()
    again = client("push", client.folder / "here" / "model", "user/again")
    assert again.code == 0
    assert hub.repos["model", "user/again"].files() == published.files()


def test_a_pushed_model_needs_no_remote_code_where_the_package_is(client, trained, pictures):
    """Also from a folder, which is the same code path; the pipeline by the name of its task."""
    client("push", trained, "user/local")
    client("pull", "user/local")
    folder = str(client.folder / "local")
    assert type(AutoModelForImageClassification.from_pretrained(folder)).__module__.startswith("hf_smoothing.")
    assert "custom_pipelines" not in AutoConfig.from_pretrained(folder).to_dict()
    local, there = (
        pipeline("certified-image-classification", model=str(one), sigma=0.25) for one in (trained, folder)
    )
    assert local(pictures, max_draws=60) == there(pictures, max_draws=60)


def test_without_the_package_remote_code_gives_the_same_certificates(hub, client, pictures, tmp_path):
    """The reference model, in a process with an empty cache and no package."""
    head = save_head(SHIPPED_MODEL, tmp_path / "head")
    assert client("push", SHIPPED_MODEL, "user/remote").code == client("push", head, "user/head").code == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {**client.environment, "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    script = ROOT / "tests" / "helpers" / "remote_code.py"
    done = subprocess.run(
        [sys.executable, "-I", script, "user/remote", "user/head", *pictures],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["task"] == "certified-image-classification"
    assert found["module"].startswith("transformers_modules.user.remote.")
    certify = pipeline("certified-image-classification", model=str(SHIPPED_MODEL), sigma=0.25)
    assert {one["label"] for one in found["certificates"]} <= set(certify.model.config.id2label.values())
    assert found["certificates"] == certify(pictures, max_draws=60, radius=0.1)
    assert found["with_count_head"] == certify(pictures, max_draws=60, radius=0.1, count_head=str(head))
    size = certify.model.config.image_size
    with torch.inference_mode():
        model = MixedNoiseViTForCountPrediction.from_pretrained(head).eval()
        counts = model(torch.linspace(0, 1, 3 * size**2).view(1, 3, size, size), sigma=0.25).probabilities
    assert torch.allclose(torch.tensor(found["counts"]), counts, atol=1e-6)


def load_by_name(model, run):
    """In a process of the client's: what the package and `datasets` make of repositories by their names."""
    config = AutoConfig.from_pretrained(model)
    classifier = AutoModelForImageClassification.from_pretrained(model)
    certify = pipeline("certified-image-classification", model=model, sigma=0.25)
    rows = datasets.load_dataset(run)
    (split,) = rows
    rows[split].to_parquet("rows.parquet")
    classes = [type(one).__module__ for one in (config, classifier, certify)]
    print(json.dumps({"classes": classes, "features": {k: str(v) for k, v in rows[split].features.items()}}))


def test_with_the_package_names_load_without_remote_code_and_a_run_is_a_dataset(hub, client, trained):
    assert client("push", trained, "user/named", "--private").code == 0
    assert client("push", RUN, "user/run").code == 0
    published = hub.repos["dataset", "user/run"].files()
    assert {"certificates.parquet", "run.json", "README.md", "report/report.md"} < published.keys()
    done = client.call(load_by_name, "user/named", "user/run", token=TOKEN)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert all(one.startswith("hf_smoothing.") for one in found["classes"])
    ours = datasets.Features.from_arrow_schema(pq.read_schema(RUN / "certificates.parquet"))
    assert found["features"] == {name: str(kind) for name, kind in ours.items()}
    assert set(found["features"]) <= set(SCHEMA.names)
    rows = pq.read_table(client.folder / "rows.parquet").to_pylist()
    assert rows == pq.read_table(RUN / "certificates.parquet").to_pylist()
    assert client("pull", "user/run", "run").code == 0
    assert (
        contents(client.folder / "run").items()
        >= {name: content for name, content in contents(RUN).items() if name != "README.md"}.items()
    )


def upload_cards(*cards):
    """In a process of the client's, whose library has each card's metadata validated before it is uploaded."""
    api = HfApi()
    api.create_repo("user/cards")
    for text in cards:
        try:
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="user/cards")
            print("valid")
        except ValueError as error:
            print(" ".join(str(error).split()))


def test_the_hub_takes_the_metadata_of_every_card(hub, client):
    cards = [path.read_text() for path in sorted(ROOT.glob("model_cards/*/README.md"))]
    broken = cards[0].replace("value: 0.", "valu: 0.", 1)
    assert broken != cards[0]
    said = client.call(upload_cards, *cards, broken, token=TOKEN).out.splitlines()
    assert said[:-1] == ["valid"] * len(cards)
    assert said[-1].startswith("Invalid metadata in README.md.")
    assert "value" in said[-1]


def upload_as_it_is(folder, repo_id):
    """What `hf upload REPO FOLDER` does, in a process of the client's."""
    api = HfApi()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)


def test_a_shipped_folder_uploaded_as_it_is_is_what_push_publishes(hub, client):
    assert client.call(upload_as_it_is, str(SHIPPED_MODEL), "user/plain", token=TOKEN).code == 0
    assert client("push", SHIPPED_MODEL, "user/pushed").code == 0
    plain, pushed = (hub.repos["model", name].files() for name in ("user/plain", "user/pushed"))
    assert plain.keys() > CODE
    assert plain == pushed


def test_revisions_are_branches_to_push_to_and_branches_and_commits_to_pull(hub, client, trained, head):
    assert client("push", trained, "user/revised").code == 0
    first = hub.repos["model", "user/revised"].branches["main"]
    assert client("push", head, "user/revised", "--revision", "heads/first").code == 0
    assert client("push", head, "user/revised").code == 0
    assert hub.repos["model", "user/revised"].branches.keys() == {"main", "heads/first"}
    for number, (revision, expected) in enumerate([(first, trained), ("heads/first", head), ("main", head)]):
        assert client("pull", "user/revised", f"revised-{number}", "--revision", revision).code == 0
        pulled = client.folder / f"revised-{number}" / "model.safetensors"
        assert pulled.read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (("POST", "/repos/create", 401), "does not accept the token (401). Log in anew"),
        (("POST", "/repos/create", 429, 1, {"Retry_After": "7"}), "Start it again in 7 seconds"),
        (("POST", "/repos/create", 500), "the Hub failed (500)"),
        (("POST", "/preupload/", 403), "the token may not do this (403)"),
        (("POST", "/preupload/", 404), "there is no such repository"),
        (("PUT", "/lfs/", "garble", 9), "(422): The uploaded object does not have the sha256"),
        (("PUT", "/lfs/", 403, 9), "the token may not do this (403)"),
        (("POST", "/commit/", 500), "the Hub failed (500)"),
    ],
)
def test_a_push_that_fails_says_why_in_a_line_and_the_next_one_succeeds(hub, client, head, fault, said, request):
    name = f"user/push-{abs(hash(request.node.name)) % 10**6}"
    hub.uploaded.clear()
    hub.fail(*fault[:4], **(fault[4] if len(fault) > 4 else {}))
    failed = client("push", head, name)
    assert (failed.code, failed.out) == (2, "")
    (line,) = failed.errors
    assert line.startswith(f"error: {name} cannot be pushed: ")
    assert said in line
    assert "config.json" not in hub.repos["model", name].files() if ("model", name) in hub.repos else True
    hub.reset()
    assert client("push", head, name).code == 0
    assert "model.safetensors" in hub.repos["model", name].files()


@pytest.fixture(scope="module")
def to_pull(client, head):
    assert client("push", head, "user/pulled").code == 0
    return "user/pulled"


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([("GET", "/api/models/user/pulled/revision", 401)], "does not accept the token (401)"),
        ([("HEAD", "/config.json", 403)], "the token may not do this (403)"),
        ([("GET", "/api/models/user/pulled/revision", 429, 1, {"Retry_After": "7"})], "Start it again in 7 seconds"),
        ([("GET", "/api/models/user/pulled/revision", 500)], "the Hub failed (500)"),
        ([("GET", "/model.safetensors", "cut"), ("GET", "/model.safetensors", 500)], "the Hub failed (500)"),
        ([("GET", "/model.safetensors", "cut", 9)], "the connection failed (peer closed connection"),
        ([("GET", "/model.safetensors", "garble")], "model.safetensors came with another checksum"),
        ([("GET", "/config.json", "garble")], "config.json came with another checksum"),
    ],
)
def test_a_pull_that_fails_says_why_and_leaves_nothing_and_the_next_one_succeeds(
    hub, client, to_pull, head, faults, said, tmp_path
):
    shutil.rmtree(client.home / "hub")
    for fault in faults:
        hub.fail(*fault[:4], **(fault[4] if len(fault) > 4 else {}))
    failed = client("pull", to_pull, tmp_path / "pulled")
    assert (failed.code, failed.out) == (2, "")
    (line,) = failed.errors
    assert line.startswith(f"error: {to_pull} cannot be pulled: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []
    hub.reset()
    assert client("pull", to_pull, tmp_path / "pulled").code == 0
    assert (tmp_path / "pulled" / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()


def test_a_connection_cut_in_a_file_and_a_hub_that_is_busy_for_once_are_got_over(hub, client, to_pull, head):
    shutil.rmtree(client.home / "hub")
    hub.fail("GET", "/model.safetensors", "cut")
    hub.fail("GET", "/config.json", 429, Retry_After="0")
    assert client("pull", to_pull, "got-over").code == 0
    assert contents(client.folder / "got-over")["model.safetensors"] == contents(head)["model.safetensors"]
    weights = [path for method, path in hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    assert len(weights) == 2  # the second one asked for the rest
    hub.uploaded.clear()
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/lfs/", 429, Retry_After="0")
    assert client("push", head, "user/got-over").code == 0


@pytest.mark.parametrize(
    ("args", "token", "said"),
    [
        (["push", "HEAD", "user/x"], None, "there is no token. Log in with `hf auth login`, or set HF_TOKEN."),
        (["push", "HEAD", "user/x"], "hf_wrong", "does not accept the token (401)"),
        (["push", "HEAD", "user/x"], READ_TOKEN, "the token may not do this (403)"),
        (["push", "HEAD", "other/x"], TOKEN, "the token may not do this (403)"),
        (["push", "HEAD", "user/pulled", "--private"], TOKEN, "user/pulled is there already, and public"),
        (["push", "HEAD", "a/b/c"], TOKEN, "a/b/c"),
        (["push", "EMPTY", "user/x"], TOKEN, "has neither config.json nor run.json"),
        (["push", "GONE", "user/x"], TOKEN, "There is no folder"),
        (["push", "UNFINISHED", "user/x"], TOKEN, "holds no finished run"),
        (["push", "OTHER", "user/x"], TOKEN, "holds a vit model (ViTForImageClassification)"),
        (["push", "BARE", "user/x"], TOKEN, "lacks model.safetensors, preprocessor_config.json"),
        (["pull", "user/private"], None, "there is no such repository, or it is private"),
        (["pull", "user/gone"], TOKEN, "there is no such repository"),
        (["pull", "user/pulled", "x", "--revision", "gone"], TOKEN, "there is no revision 'gone'"),
        (["pull", "user/pulled", "x", "--repo-type", "dataset"], TOKEN, "there is no such repository"),
        (["pull", "user/pulled", "x", "--repo-type", "space"], TOKEN, "'space' is unknown: use model or dataset"),
        (["pull", "user/pulled", "FULL"], TOKEN, "is there already: name a new folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    hub, client, to_pull, head, args, token, said, tmp_path
):
    folders = {name: tmp_path / name for name in ("EMPTY", "GONE", "UNFINISHED", "OTHER", "BARE", "FULL")}
    for name, files in {
        "EMPTY": {},
        "UNFINISHED": {"run.json": {"settings": {}, "finished": None}, "certificates.parquet": ""},
        "OTHER": {"config.json": {"model_type": "vit", "architectures": ["ViTForImageClassification"]}},
        "BARE": {"config.json": json.loads((head / "config.json").read_text())},
        "FULL": {"mine.txt": "mine"},
    }.items():
        folders[name].mkdir()
        for file, content in files.items():
            (folders[name] / file).write_text(json.dumps(content))
    if "user/private" in args:
        assert client("push", head, "user/private", "--private").code == 0
    before, repos = contents(client.folder), len(hub.repos)
    ended = client(*({"HEAD": head, **folders}.get(one, one) for one in args), token=token)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.errors
    assert said in line
    assert "Traceback" not in ended.err
    assert (contents(client.folder), len(hub.repos)) == (before, repos)


def test_offline_says_so(head, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match=r"user/x cannot be pushed: HF_HUB_OFFLINE is set\. Unset it\.$"):
        push(head, "user/x")
    with pytest.raises(HubError, match=r"user/x cannot be pulled: HF_HUB_OFFLINE is set\. Unset it\.$"):
        pull("user/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_token_of_hf_auth_login_serves_as_well(hub, client, head):
    store = client.home / "token"
    store.write_text(TOKEN)
    try:
        assert client("push", head, "user/logged-in", token=None).code == 0
    finally:
        store.unlink()


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("pretrain", ["--dataset_name", "gone"]),
        ("finetune", ["--dataset_name", "gone", "--model_name_or_path", "gone"]),
        ("train_count_head", ["--counts", "gone", "--model_name_or_path", "gone"]),
    ],
)
def test_a_training_that_could_not_publish_does_not_begin(hub, client, script, args):
    training = [ROOT / "scripts" / f"{script}.py", *args, "--output_dir", "mine"]
    for more, token, said in [
        (["--push_to_hub"], None, "mine cannot be pushed: there is no token."),
        (["--push_to_hub", "--hub_model_id", "other/mine"], TOKEN, "other/mine cannot be pushed: the token may not"),
        (["--push_to_hub", "--hub_model_id", "user/mi ne"], TOKEN, "'user/mi ne'"),
        (["--hub_model_id", "user/mine"], TOKEN, "no meaning without --push_to_hub"),
    ]:
        ended = client(*training, *more, token=token)
        assert ended.code == 1
        (line,) = ended.errors
        assert said in line
        assert not (client.folder / "mine").exists()


def test_a_training_publishes_its_model(hub, client, trained, parquet, tmp_path):
    training = [
        ROOT / "scripts" / "finetune.py", "--model_name_or_path", trained, "--dataset_name", parquet, "--output_dir",
        "mine", "--per_device_train_batch_size", "100", "--max_train_steps", "1",
    ]  # fmt: skip
    done = client(*training, "--push_to_hub", "--hub_private_repo")
    assert done.code == 0, done.err
    published = hub.repos["model", "user/mine"]
    assert published.private
    assert {"model.safetensors", "results/training.json", "smoothing.py", "card.yaml"} < published.files().keys()
    card = ModelCard(published.files()["README.md"].content.decode())
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-classification")
    assert "final training loss" in card.text
    assert not any(path.startswith(("step_", "training_log")) for path in published.files())
    hub.fail("POST", "/preupload/", 403)
    later = client(*training, "--push_to_hub", "--resume_from_checkpoint", "latest")
    assert later.code == 1
    assert "The model is in mine; `hf-smoothing push mine user/mine` publishes it." in later.err
