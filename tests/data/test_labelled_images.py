import pytest

from hf_smoothing.data.class_matching import match_classes
from hf_smoothing.data.columns import find_column
from hf_smoothing.data.labelled_images import LabelledImages


def test_columns():
    assert find_column(["img", "label"], ("img", "image"), None, "--image_column") == "img"
    assert find_column(["a", "image"], ("img", "image"), "a", "--image_column") == "a"
    with pytest.raises(
        ValueError, match=r"Several .*\(img, image\); .* img, image, b\. Choose one with --image_column"
    ):
        find_column(["img", "image", "b"], ("img", "image"), None, "--image_column")
    with pytest.raises(ValueError, match=r"No column has a usual name .* a, b"):
        find_column(["a", "b"], ("img", "image"), None, "--image_column")


def test_slices_of_a_parquet_file(demo_images, tmp_path):
    demo_images.select(range(10)).to_parquet(tmp_path / "images.parquet")
    for split, indices in (("test", range(10)), ("test[:3]", range(3)), ("test[:2]+test[7:]", (0, 1, 7, 8, 9))):
        images = LabelledImages(str(tmp_path / "images.parquet"), split=split)
        assert [row["label"] for row in images.source] == demo_images.select(indices)["label"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no Parquet file at '.*none\.parquet'"):
        LabelledImages(str(tmp_path / "none.parquet"))
    for name in (str(tmp_path / "none"), "none"):
        with pytest.raises(ValueError, match=f"There is no folder '{name}', and no dataset of this name"):
            LabelledImages(name)


def test_labels_are_matched_by_name():
    to_class = match_classes(["sea_lion", "Cat"], ["cat", "dog", "Sea Lion"])
    assert [to_class(0), to_class(1)] == [2, 0]
    with pytest.raises(ValueError, match="do not match: fish"):
        match_classes(["cat", "fish"], ["cat", "dog"])
    for label in (2, -1, None, "cat"):
        with pytest.raises(ValueError, match=f"label {label!r} is none of"):
            to_class(label)
    # ImageNet has two cranes: equal lists match by position, others that name them cannot
    assert match_classes(["crane", "dog", "crane"], ["crane", "dog", "crane"])(2) == 2
    with pytest.raises(ValueError, match="do not match: crane"):
        match_classes(["dog", "crane"], ["crane", "dog", "crane"])
    assert match_classes(["cat", "dog"], ["LABEL_0", "LABEL_1"])(1) == 1
    with pytest.raises(ValueError, match="do not match"):
        match_classes(["cat", "dog"], ["LABEL_0", "LABEL_1", "LABEL_2"])
    plain = match_classes(None, ["cat", "dog"])
    assert [plain(1), plain("Dog")] == [1, 1]
