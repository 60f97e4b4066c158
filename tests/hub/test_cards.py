"""Cards hold what results files say, and nothing else."""

import json
import re
import shutil
from dataclasses import fields

import pytest
import yaml
from helpers.finished_runs import write_run
from helpers.paths import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from hf_smoothing.cli.app import app
from hf_smoothing.core.weights import weights_digest
from hf_smoothing.hub.model_cards import Page, Picture, Words, create_card, read_card

CARDS = sorted(path.parent for path in ROOT.glob("model_cards/*/card.yaml"))


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a report, as small as it can be."""
    folder = tmp_path / "my-model"
    (folder / "results").mkdir(parents=True)
    share = {"radius": 0.5, "right": 306, "share": 0.612, "interval_95": [0.568, 0.655], "standing": "counted"}
    settings = {"dataset_name": "uoft-cs/cifar10", "split": "test", "every": 20, "method": "sequential", "n": None}
    entry = {
        "run": "run",
        "title": "run, sigma = 0.25",
        "is_log": False,
        "model": "somewhere/my-model",
        "sigma": 0.25,
        "alpha": 0.001,
        "decided_radii": None,
        "radii_out_of_reach": [],
        "num_images": 500,
        "num_failed": 0,
        "certified_accuracy": [share, {**share, "radius": 1.0, "share": 0.0, "standing": "out of reach"}],
        "abstention_rate": 0.1,
        "mean_certified_radius": 0.2,
        "guarantee": "per_input",
        "median_num_samples": 100,
        "mean_seconds": 1.5,
        "made_by": {"command": "certify.py", "settings": {**settings, "max_draws": 500, "dtype": "float32"}},
    }
    report = {
        "guarantee": "per_input",
        "norm": "l2",
        "results": [entry],
        "envelope": None,
        "command": "hf-smoothing report",
    }
    training = {
        "command": "scripts/finetune.py",
        "settings": {
            "seed": 0,
            "num_train_epochs": 1,
            "max_train_steps": None,
            "sigmas": [0.0, 0.25],
            "dataset_name": "data/cifar10",
        },
        "num_images": 1280,
        "steps": 10,
        "images_seen": 1280,
        "final_loss": 1.25,
        "seconds": 60.0,
        "device": "cpu:0",
        "num_processes": 2,
        "num_threads": 1,
        "parameters": 1000,
        "versions": {"torch": "2.15.0"},
    }
    (folder / "results" / "report.json").write_text(json.dumps(report))
    (folder / "results" / "training.json").write_text(json.dumps(training))
    (folder / "config.json").write_text(json.dumps({"model_type": "mixed_noise_vit", "image_size": 32}))
    description = {
        "summary": "A model.",
        "datasets": ["uoft-cs/cifar10"],
        "base_model": "someone/foundation",
        "sources": ["A paper"],
        "accuracy": {"CIFAR-10": "results/report.json"},
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(description))
    return folder


def test_a_run_of_another_name_counts_if_it_had_the_same_weights(folder):
    model = nn.Linear(3, 2).half()  # as weights may be stored
    save_file(model.state_dict(), folder / "model.safetensors")
    path = folder / "results" / "report.json"
    report = json.loads(path.read_text())
    report["results"][0]["model"] = "runs/before-it-was-renamed"
    for weights, radii in ((weights_digest(nn.Linear(3, 2)), []), (weights_digest(model.float()), [0.5])):
        report["results"][0]["made_by"]["settings"]["model_weights"] = weights
        path.write_text(json.dumps(report))
        assert [point["radius"] for point in read_card(folder).points] == radii
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert not read_card(folder).points


def call(*arguments):
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


def body(folder):
    """The text of a card without its front matter."""
    return (folder / "README.md").read_text().split("---\n", 2)[2]


@pytest.mark.parametrize("card", CARDS, ids=lambda folder: folder.name)
def test_shipped_cards_are_what_their_results_give_and_fail_with_a_digit_changed(card, tmp_path):
    assert call("--check", card).exit_code == 0
    copy = tmp_path / card.name
    shutil.copytree(card, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    text = (copy / "README.md").read_text()
    position = text.index("final training loss | ") + len("final training loss | ")
    (copy / "README.md").write_text(text[:position] + str((int(text[position]) + 1) % 10) + text[position + 1 :])
    done = call("--check", copy)
    assert done.exit_code == 1
    assert f"line {text[:position].count(chr(10)) + 1}: not what card.yaml and the results files give" in done.stderr


@pytest.mark.parametrize("card", CARDS, ids=lambda folder: folder.name)
def test_shipped_cards_are_short_and_their_links_lead_somewhere(card):
    assert len(body(card).splitlines()) <= 150
    pages = [card / "README.md", *card.glob("results/**/*.md")]
    links = {(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())}
    assert [
        link for page, link in links if not link.startswith("https://") and not (page.parent / link).is_file()
    ] == []
    assert len({link for page, link in links if link.endswith(".png")}) >= 1
    unlinked = set(pages[1:]) - {(page.parent / link).resolve() for page, link in links}
    assert not unlinked
    data = ModelCard((card / "README.md").read_text()).data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "image-classification")
    assert "](https://arxiv.org/abs/1902.02918)" in body(card)  # the Hub lists the model on the paper's page


def test_the_metadata_of_a_classifier_name_the_best_noise_level_at_few_radii(tmp_path):
    (shipped,) = [folder for folder in CARDS if folder.name == "mixed-noise-vit-nano-cifar10"]
    folder = tmp_path / shipped.name
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "results" / "cifar10" / "report" / "report.json"
    assert ModelCard((folder / "README.md").read_text()).data.eval_results is None  # measured on a local file
    path.write_text(path.read_text().replace('"data/cifar10-every-20th.parquet"', '"uoft-cs/cifar10"'))
    assert call(folder).exit_code == 0
    best = {}
    for entry in json.loads(path.read_text())["results"]:
        for share in entry["certified_accuracy"]:
            if not share["out_of_reach"]:
                best[share["radius"]] = max(best.get(share["radius"], (0, 0)), (share["share"], entry["sigma"]))
    results = ModelCard((folder / "README.md").read_text()).data.eval_results
    found = {result.metric_args["radius"]: (result.metric_value, result.metric_args["sigma"]) for result in results}
    assert found == {radius: best[radius] for radius in (0.0, 0.25, 0.5, 1.0)}


def test_a_card_is_written_from_its_results(folder):
    assert "README.md" in call(folder).output
    assert call("--check", folder).exit_code == 0
    text = (folder / "README.md").read_text()
    assert "| 0.5 | 61.2% | 56.8% to 65.5% | 0.25 |" in text
    assert "torchrun --nproc_per_node 2 scripts/finetune.py" in text
    assert 'pipeline("certified-image-classification", model="my-model"' in text
    (result,) = ModelCard(text).data.eval_results  # radii out of reach are left out
    assert result.metric_value == 0.612
    expected = {"radius": 0.5, "sigma": 0.25, "alpha": 0.001, "n": 500, "dtype": "float32", "guarantee": "per_input"}
    assert expected.items() <= result.metric_args.items()
    assert (result.dataset_type, ModelCard(text).data.base_model) == ("uoft-cs/cifar10", "someone/foundation")
    assert call(folder).output == ""  # nothing to change


@pytest.mark.parametrize("alone", [False, True])
def test_a_count_head_whose_classifier_is_elsewhere_only_estimates(folder, alone):
    config = {"model_type": "mixed_noise_vit", "image_size": 32, "count_sigmas": [0.25]}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"accuracy": {}, "estimates_only": alone}))
    assert call(folder).exit_code == 0
    text = body(folder)
    assert ("pipeline(" in text, "After calibration" in text) == (not alone, not alone)
    assert ("no pipeline can turn them into certificates" in text) == alone


def test_a_page_of_results_is_written_and_linked(folder):
    path = folder / "card.yaml"
    page = {"title": "How it was trained", "file": "results/more/training.md", "template": "training"}
    words = yaml.safe_load(path.read_text()) | {"pages": [{**page, "results": "results/training.json"}]}
    path.write_text(yaml.safe_dump(words))
    call(folder)
    assert "- [How it was trained](results/more/training.md)" in body(folder)
    text = (folder / "results" / "more" / "training.md").read_text()
    assert "| 1.250 |" in text
    assert "[../training.json](../training.json) of [my-model](../../README.md)" in text
    training = json.loads((folder / "results" / "training.json").read_text())
    (folder / "results" / "training.json").write_text(json.dumps({**training, "final_loss": 1.5}))
    assert "results/more/training.md, line" in "".join(call("--check", folder).stderr.split("\n"))
    del training["steps"]
    (folder / "results" / "training.json").write_text(json.dumps(training))
    assert "steps" in call("--check", folder).stderr


def test_estimates_are_not_certificates_in_the_metadata(folder):
    path = folder / "results" / "report.json"
    report = json.loads(path.read_text())
    report["results"][0]["guarantee"] = report["guarantee"] = "none"
    path.write_text(json.dumps(report))
    call(folder)
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    assert "estimated accuracy (not certified)" in text
    assert "## Certified accuracy" not in text


@pytest.mark.parametrize("digit", ["61.2%", "0.612"])
def test_a_changed_digit_is_found_in_text_and_metadata(folder, digit):
    call(folder)
    path = folder / "README.md"
    path.write_text(path.read_text().replace(digit, digit.replace("2", "3", 1), 1))
    done = call("--check", folder)
    assert done.exit_code == 1
    assert digit.replace("2", "3", 1) in done.stderr


def test_a_card_without_its_results_fails(folder):
    call(folder)
    (folder / "results" / "report.json").unlink()
    done = call("--check", folder)
    assert done.exit_code == 2
    assert "report.json cannot be read".replace(" ", "") in "".join(done.stderr.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 1}, "unknown"),
        ({"pages": [{"title": "A", "template": "training"}]}, "missing 2 required positional arguments"),
        (
            {"pages": [{"title": "A", "file": "a.md", "template": "guess", "results": "results/report.json"}]},
            "'guess' is unknown",
        ),
        ({"picture": {"file": "not/there.png", "caption": "what"}}, "there is no picture 'not/there.png'"),
    ],
)
def test_words_that_make_no_card(folder, change, message):
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    done = call(folder)
    assert done.exit_code == 2
    assert "".join(message.split()) in "".join(done.stderr.split())


def test_the_documented_keys_are_those_of_a_card():
    documented = (ROOT / "model_cards" / "README.md").read_text()
    example = yaml.safe_load(documented.split("```yaml\n")[1].split("```")[0])
    assert example.keys() == {field.name for field in fields(Words)}
    assert example["pages"][0].keys() == {field.name for field in fields(Page)}
    assert example["picture"].keys() == {field.name for field in fields(Picture)}


def test_a_trained_model_gets_a_first_card(folder):
    (folder / "card.yaml").unlink()
    create_card(folder, dataset=str(folder), base_model="someone/foundation")
    assert "Finetuned from `someone/foundation` on 1,280 images of `cifar10`, with Gaussian noise" in body(folder)
    (folder / "card.yaml").unlink()
    create_card(folder, summary="A model.", dataset="uoft-cs/cifar10", base_model="someone/foundation")
    data = ModelCard((folder / "README.md").read_text()).data
    assert (data.datasets, data.base_model, data.eval_results) == (["uoft-cs/cifar10"], "someone/foundation", None)
    (folder / "card.yaml").write_text((folder / "card.yaml").read_text().replace("A model.", "My model."))
    create_card(folder, summary="A model.", dataset=str(folder), base_model=str(folder))  # trained on
    assert "My model." in (folder / "README.md").read_text()
    (folder / "card.yaml").unlink()
    create_card(folder, summary="A model.", dataset=str(folder), base_model=str(folder), finetune_first=True)
    data = ModelCard((folder / "README.md").read_text()).data
    assert data.datasets is data.base_model is None  # names of folders mean nothing elsewhere
    assert "scripts/finetune.py --model_name_or_path my-model" in body(folder)


def test_a_card_tells_accuracies_of_the_model_not_of_its_pretraining(folder):
    path = folder / "results" / "training.json"
    training = json.loads(path.read_text())
    settings = {**training["settings"], "eval_split": "valid", "eval_samples": 500, "eval_draws": 1}
    settings |= {"dataset_name": ".data/photos", "learning_rate": 0.01}
    earlier = {**training, "settings": settings, "evaluation": {"majority_accuracy_sigma_0": 0.3}}
    path.write_text(json.dumps({**training, "evaluation": None, "continues": earlier}))
    assert call(folder).exit_code == 0
    assert "30.0%" not in body(folder)
    assert "| dataset_name | photos | data/cifar10 |" in body(folder)
    assert not re.search("eval_|learning_rate", body(folder))
    page = (folder / "results" / "training.md").read_text()
    assert "| learning_rate | 0.01 |" in page
    assert "The accuracies of 1. " in page
    assert "the majority over 1 noisy copy, on at most 500 images of the split `valid`" in page


@pytest.mark.parametrize("names", [{"0": "cat", "1": "dog"}, {"0": "felix", "1": "rex"}])
def test_the_example_shows_a_picture_that_the_model_knows(folder, names):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    assert call(folder).exit_code == 0
    assert ("load_demo_images" in body(folder)) == ("cat" in names.values())
    assert ('image = "picture.jpg"' in body(folder)) == ("felix" in names.values())


def test_a_folder_without_words(folder):
    (folder / "card.yaml").unlink()
    assert "has no card.yaml" in " ".join(call(folder).stderr.split())


def write_run_of(folder, run, dataset="somewhere/signs", **options):
    """A finished run of the model in `folder`."""
    write_run(run, model=f"somewhere/{folder.name}", **options)
    content = json.loads((run / "run.json").read_text())
    content["settings"] |= {"dataset_name": dataset, "split": "test", "every": 1, "n": None, "max_draws": 500}
    content["settings"] |= {"dtype": "float32", "method": "fixed"}
    (run / "run.json").write_text(json.dumps(content))
    return run


def test_a_run_is_added_to_a_card_without_writing_yaml(folder, tmp_path):
    done = call(folder, "--add-run", write_run_of(folder, tmp_path / "on-signs"))
    assert done.exit_code == 0, done.output
    assert "| signs | 0.25 |" in body(folder)
    assert "(results/on-signs/report/report.md)" in body(folder)
    assert (folder / "results" / "on-signs" / "certificates.parquet").is_file()
    assert call("--check", folder).exit_code == 0
    # what lies in the folder already is not copied, nor named twice
    words = (folder / "card.yaml").read_text()
    assert call(folder, "--add-run", folder / "results" / "on-signs").exit_code == 0
    assert (folder / "card.yaml").read_text() == words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "somewhere/other"}, "certified the model 'somewhere/other', not 'my-model'"),
        ({"alpha": 0.01}, "do not make one table"),
    ],
)
def test_a_run_that_does_not_belong_to_a_card_leaves_it_as_it_is(folder, tmp_path, options, said):
    before = (folder / "card.yaml").read_text()
    if "model" in options:
        run = write_run(tmp_path / "on-signs", **options)
    else:
        run = write_run_of(folder, tmp_path / "on-signs", **options)
    done = call(folder, "--add-run", run)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert (folder / "card.yaml").read_text() == before
    assert "one model" in call(folder, folder, "--add-run", run).stderr


def test_a_number_of_steps_hides_that_of_epochs(folder):
    """The epochs say nothing where the number of steps was given."""
    path = folder / "results" / "training.json"
    training = json.loads(path.read_text())
    earlier = {**training, "settings": {"seed": 1, "num_train_epochs": 3, "max_train_steps": None}}
    training["settings"] = {"seed": 0, "num_train_epochs": 10, "max_train_steps": 500}
    path.write_text(json.dumps({**training, "continues": earlier}))
    assert call(folder).exit_code == 0
    page = (folder / "results" / "training.md").read_text()
    assert "| num_train_epochs | 3 | - |" in page
    assert "| max_train_steps | - | 500 |" in page


@pytest.mark.parametrize(("seconds", "minutes"), [(22, "0.4"), (84, "1"), (1354, "23")])
def test_minutes_of_a_training_are_rounded_but_never_to_0(folder, seconds, minutes):
    path = folder / "results" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))
    call(folder)
    assert f"| minutes | {minutes} |" in body(folder)
