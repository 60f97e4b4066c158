import io
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from hf_smoothing.core.image_loading import load_image


@pytest.fixture
def colours(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "colours.png")
    return tmp_path / "colours.png", pixels


def test_paths_and_pil_images(colours):
    path, pixels = colours
    for source in (path, str(path), Image.open(path)):
        picture = load_image(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_an_address(colours):
    path, pixels = colours

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/colours.png" else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(np.asarray(load_image(f"{address}/colours.png")), pixels)
        with pytest.raises(ValueError, match=r"missing\.png' cannot be read.*404"):
            load_image(f"{address}/missing.png")
    finally:
        server.shutdown()
        server.server_close()


def test_greys_of_all_depths_come_out_as_their_viewer_shows_them():
    grey = np.array([[0, 64], [128, 255]], np.uint8)
    for image in (
        Image.fromarray(grey),
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.int32) * 257),
        Image.fromarray((grey / 255).astype(np.float32)),
        Image.fromarray(grey.astype(np.float32)),
    ):
        np.testing.assert_array_equal(np.asarray(load_image(image)), np.stack([grey] * 3, -1), err_msg=image.mode)


def test_a_16_bit_file(tmp_path):
    grey = np.array([[0, 30000], [40000, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], np.rint(grey / 257))


def test_transparent_pixels_are_put_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert list(np.asarray(load_image(image))[0].tolist()) == [[10, 20, 30], [255, 255, 255]]
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert np.asarray(load_image(palette)).tolist() == [[[255, 255, 255]]]


def test_the_orientation_of_a_photo_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(tmp_path / "photo.jpg").size == (2, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path, FileNotFoundError, "There is no image at"),
        (lambda path: path.write_text("no picture") and path, ValueError, "is not a picture"),
        (lambda path: path.write_bytes(_png()[:-30]) and path, ValueError, "cannot be read as a picture"),
        (lambda path: path.parent, ValueError, "cannot be read as a picture"),
        (lambda path: 5, TypeError, "not int"),
        (lambda path: Image.fromarray(np.full((1, 1), np.nan, np.float32)), ValueError, "pixels from nan"),
    ],
)
def test_sources_that_are_no_picture(tmp_path, make, error, message):
    with pytest.raises(error, match=message) as caught:
        load_image(make(tmp_path / "broken.png"))
    if message.startswith(("There", "is not")):
        assert "broken.png" in str(caught.value)


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_the_images_that_ship(demo_images):
    assert len(demo_images) == 200
    assert set(Counter(demo_images["label"]).values()) == {20}
    assert demo_images.features["label"].names[6] == "frog"
    assert {image.size for image in demo_images["image"]} == {(32, 32)}
