"""Publishing and fetching, by the real hub library, against a server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHIPPED_MODEL, save_model
from hub_client import Client
from hub_server import TOKEN, HubServer
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, pipeline

from hf_smoothing import MixedNoiseViTForCountPrediction

RUN = SHIPPED_MODEL / "results" / "cifar10"
CODE = {
    "active_images.py", "bounds.py", "calibration.py", "certificates.py", "configuration_mixed_noise_vit.py",
    "count_predictor.py", "data.py", "loading.py", "modeling_count_prediction.py", "modeling_mixed_noise_vit.py",
    "noise.py", "pipeline_certified_image_classification.py", "rules.py", "sequential.py", "smoothing.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    return Client(hub.endpoint, tmp_path_factory.mktemp("home"), TOKEN)


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


@pytest.fixture(scope="module")
def head(trained, tmp_path_factory):
    """The folder of a count head on that model."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    torch.manual_seed(1)
    model = MixedNoiseViTForCountPrediction.from_pretrained(trained, count_sigmas=[0.25, 0.5])
    model.config.image_mean = [0.3, 0.4, 0.5]  # what is not in the checkpoint must come from the config
    model.save_pretrained(folder)
    ViTImageProcessor.from_pretrained(trained).save_pretrained(folder)
    return folder


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
    assert local(pictures, max_samples=60) == there(pictures, max_samples=60)


def test_without_the_package_remote_code_gives_the_same_certificates(hub, client, trained, head, pictures, tmp_path):
    assert client("push", trained, "user/remote").code == client("push", head, "user/head").code == 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    environment |= {**client.environment, "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    script = Path(__file__).parent / "remote_code.py"
    done = subprocess.run(
        [sys.executable, "-I", script, "user/remote", "user/head", *pictures],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["task"] == "certified-image-classification"
    assert found["module"].startswith("transformers_modules.user.remote.")
    certify = pipeline("certified-image-classification", model=str(trained), sigma=0.25)
    assert found["certificates"] == certify(pictures, max_samples=60, radius=0.1)
    assert found["with_count_head"] == certify(pictures, max_samples=60, radius=0.1, count_head=str(head))
    size = certify.model.config.image_size
    with torch.inference_mode():
        model = MixedNoiseViTForCountPrediction.from_pretrained(head).eval()
        counts = model(torch.linspace(0, 1, 3 * size**2).view(1, 3, size, size), sigma=0.25).probabilities
    assert torch.allclose(torch.tensor(found["counts"]), counts, atol=1e-6)
