import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.training.training_images import ImageSettings, TrainingBatches, find_class_names


def opened(path, size=8, **kwargs):
    images = LabelledImages(str(path), split="train", **kwargs)
    processor = ViTImageProcessor(size={"height": size, "width": size})
    return images.bind(find_class_names(images), Preprocessing.from_image_processor(processor))


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """30 images, each of its own grey and class, so that pixels tell the image."""
    path = tmp_path_factory.mktemp("grey") / "grey.parquet"
    pictures = [Image.new("RGB", (8, 8), (8 * i, 8 * i, 8 * i)) for i in range(30)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"g{i}" for i in range(30)])}
    )
    datasets.Dataset.from_dict({"image": pictures, "label": list(range(30))}, features=features).to_parquet(path)
    return path


def labels_of(batches, epoch, first=0):
    return [labels.tolist() for _, labels in batches.epoch(epoch, first)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_processes_share_an_epoch_and_each_image_keeps_its_label(grey, streaming, workers):
    settings = ImageSettings(str(grey), streaming=streaming, dataloader_num_workers=workers)
    images = opened(grey, streaming=streaming)
    seen = []
    for process in range(2):
        batches = TrainingBatches(
            images, settings, 8, 4, seed=0, process_index=process, num_processes=2, show_progress=False
        )
        for pixels, labels in batches.epoch(0):
            assert pixels.dtype == torch.uint8
            assert pixels.shape == (4, 3, 8, 8)
            assert (pixels.amax((1, 2, 3)) == 8 * labels).all()  # crops bring in a black margin only
            seen += labels.tolist()
    assert len(seen) == 24  # three batches of each; six images are left for another epoch
    assert len(set(seen)) == 24


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_can_start_at_any_batch(demo_parquet, streaming):
    settings = ImageSettings(str(demo_parquet), streaming=streaming, auto_augment="rand-m9-mstd0.5")
    batches = TrainingBatches(
        opened(demo_parquet, 32, streaming=streaming), settings, 32, 25, seed=3, show_progress=False
    )
    all_batches = list(batches.epoch(2))
    torch.rand(5)
    last_batches = list(batches.epoch(2, first=5))
    assert len(all_batches) == 8
    assert len(last_batches) == 3
    for (pixels, labels), (pixels_again, labels_again) in zip(all_batches[5:], last_batches):
        assert torch.equal(labels, labels_again)
        assert torch.equal(pixels, pixels_again)
    other = next(iter(batches.epoch(3)))
    assert not torch.equal(other[1], all_batches[0][1])


@pytest.fixture(scope="module")
def demo_parquet(demo_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.parquet"
    demo_images.to_parquet(path)
    return path


def test_augmentation_differs_between_images_and_epochs(grey):
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, 0] = 255
    rows = {"image": [Image.fromarray(stripes)] * 16, "label": [0] * 16}
    path = grey.parent / "stripes.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["one"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    batches = TrainingBatches(opened(path), ImageSettings(str(path)), 8, 16, seed=0, show_progress=False)
    (first, _), (second, _) = next(batches.epoch(0)), next(batches.epoch(1))
    assert len({picture.numpy().tobytes() for picture in first}) > 3
    assert not torch.equal(first, second)
    upright = TrainingBatches(opened(path), ImageSettings(str(path), hflip=0), 8, 16, seed=0, show_progress=False)
    pixels, _ = next(upright.epoch(0))
    assert (pixels[..., 4:] == 0).all()  # never flipped: the stripe stays at the left


def test_large_images_are_read_for_each_batch(demo_parquet):
    images = opened(demo_parquet, 96)
    batches = TrainingBatches(images, ImageSettings(str(demo_parquet)), 96, 4, seed=0, show_progress=False)
    pixels, _ = next(batches.epoch(0))
    assert pixels.shape == (4, 3, 96, 96)


def test_small_images_are_resized_as_for_certification(demo_parquet):
    images = opened(demo_parquet, 16)
    settings = ImageSettings(str(demo_parquet), hflip=0)
    batches = TrainingBatches(images, settings, 16, 200, seed=0, show_progress=False)
    pixels, labels = next(batches.epoch(0))
    index, label = 6, 6
    expected = (images[index][0] * 255).round().byte()
    core = expected[:, 4:12, 4:12]  # crops keep the middle, moved by at most two pixels
    matching = [
        picture
        for picture in pixels[labels == label]
        if any(
            torch.equal(picture[:, 4 + i : 12 + i, 4 + j : 12 + j], core) for i in range(-2, 3) for j in range(-2, 3)
        )
    ]
    assert len(matching) == 1


def test_broken_pictures_and_labels_are_named_before_training(tmp_path):
    rows = [{"image": {"bytes": b"no picture", "path": None}, "label": 0}] * 3
    path = tmp_path / "broken.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    with pytest.raises(ValueError, match=r"Image 0 of the split cannot be trained on.*leave it out"):
        TrainingBatches(opened(path), ImageSettings(str(path)), 8, 2, seed=0, show_progress=False)


def test_a_missing_file_is_named(tmp_path):
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "gone.png")}, "label": 0}] * 3
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    pq.write_table(datasets.Dataset.from_list(rows, features=features).data.table, tmp_path / "away.parquet")
    with pytest.raises(ValueError, match=r"Image 0 of the split cannot be trained on.*gone\.png"):
        TrainingBatches(
            opened(tmp_path / "away.parquet"),
            ImageSettings(str(tmp_path / "away.parquet")),
            8,
            2,
            seed=0,
            show_progress=False,
        )


def test_large_images_are_read_by_their_position_in_the_sample(tmp_path):
    rows = [{"image": Image.new("RGB", (72, 72), (8 * i,) * 3), "label": i} for i in range(30)]
    rows[29]["image"] = {"bytes": b"no picture", "path": None}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"g{i}" for i in range(30)])}
    )
    path = tmp_path / "large.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    inputs = opened(path, 72, max_samples=8)
    indices = inputs.images.indices
    assert max(indices) > 8
    batches = TrainingBatches(inputs, ImageSettings(str(path)), 72, 4, seed=0, show_progress=False)
    seen = [label for batch in labels_of(batches, 0) for label in batch]
    assert sorted(seen) == indices

    broken = TrainingBatches(opened(path, 72), ImageSettings(str(path)), 72, 30, seed=0, show_progress=False)
    with pytest.raises(ValueError, match="Image 29 of the split cannot be trained on"):
        next(broken.epoch(0))
    stream = TrainingBatches(
        opened(path, 72, streaming=True), ImageSettings(str(path)), 72, 30, seed=0, show_progress=False
    )
    with pytest.raises(ValueError, match=r"Image \d+ in the shuffled order of the split cannot be trained on"):
        next(stream.epoch(0))


def test_batches_shrink_to_few_images(grey, capfd):
    """30 images, more in one batch than there are."""
    for processes, size, said in [
        (1, 30, "30 images do not fill a batch of 128: training takes batches of 30."),
        (2, 14, "30 images do not fill a batch of 128 on each of 2 processes: training takes batches of 14."),
    ]:
        batches = [
            TrainingBatches(
                opened(grey), ImageSettings(str(grey)), 8, 128, seed=0, process_index=index, num_processes=processes
            )
            for index in range(processes)
        ]
        assert [(len(shares), shares.batch_size) for shares in batches] == [(1, size)] * processes
        assert [len(labels) for shares in batches for _, labels in shares.epoch(0)] == [size] * processes
        assert [line for line in capfd.readouterr().err.splitlines() if "fill" in line] == [said]
    with pytest.raises(ValueError, match="30 images are fewer than the 31 processes: start fewer processes"):
        TrainingBatches(opened(grey), ImageSettings(str(grey)), 8, 16, seed=0, num_processes=31)


@pytest.mark.parametrize(("labels", "names"), [([0, 2, 2], ["0", "1", "2"]), (["cat", "ant", "cat"], ["ant", "cat"])])
def test_datasets_without_class_names(tmp_path, labels, names):
    path = tmp_path / "plain.parquet"
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "label": labels}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    images = LabelledImages(str(path), split="train")
    assert find_class_names(images) == names
    inputs = images.bind(names, None)
    assert [inputs.label(i, images.source[i]) for i in range(3)] == [names.index(str(label)) for label in labels]
    with pytest.raises(ValueError, match="cast it to ClassLabel"):
        find_class_names(LabelledImages(str(path), split="train", streaming=True))


def test_labels_that_are_no_classes(tmp_path):
    path = tmp_path / "wrong.parquet"
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0.5, 1.5]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    with pytest.raises(ValueError, match="class numbers from 0 on, or names"):
        find_class_names(LabelledImages(str(path), split="train"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hflip": 1.5},
        {"label_smoothing": 1.0},
        {"mixup_alpha": -1.0},
        {"consistency_weight": -1.0, "sigmas": [0.5]},
        {"consistency_weight": 10.0},
        {"consistency_weight": 10.0, "sigmas": [0.5], "cutmix_alpha": 1.0},
        {"max_train_samples": 0},
        {"sigmas": [-0.1]},
        {"auto_augment": "nonsense"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageSettings("somewhere", **wrong)


def test_fewer_images_are_a_sample_of_the_split(tmp_path):
    """Because many splits are sorted by class."""
    path = tmp_path / "sorted.parquet"
    rows = {"image": [Image.new("RGB", (8, 8))] * 40, "label": sorted([0, 1, 2, 3] * 10)}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    images = ImageSettings(str(path), max_train_samples=20).open()
    chosen = [index for index, _ in images.rows()]
    assert images.total == len(set(chosen)) == 20
    assert chosen == sorted(chosen)
    assert {index // 10 for index in chosen} == {0, 1, 2, 3}
    assert chosen == [index for index, _ in ImageSettings(str(path), max_train_samples=20).open().rows()]


def test_mixing_keeps_labels_a_distribution():
    mixing = ImageSettings("somewhere", mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1).mixing(5)
    _, labels = mixing(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert labels.shape == (4, 5)
    torch.testing.assert_close(labels.sum(1), torch.ones(4))
    assert ImageSettings("somewhere").mixing(5) is None
