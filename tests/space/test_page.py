"""The page in a real Chromium: every control once, light and dark, phone width, keyboard; and what it refuses to serve."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, which

import pytest
from helpers.paths import ROOT, SHIPPED_MODEL

from hf_smoothing.space.runs_shown import EXAMPLE_RUN

CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ([] if CHROMIUM else ["chromium"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"not installed: {', '.join(MISSING)} (pip install '.[space,dev]'; apt-get install chromium)",
    ),
]
PATIENCE = 120_000
"""Milliseconds for what takes draws, on a machine that does other work too."""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a page that runs as a Space does: a copy of the folder, the model named by the variable."""
    folder = tmp_path_factory.mktemp("space")
    for name in ("app.py", "README.md", "requirements.txt"):
        copy(EXAMPLE_RUN.parent / name, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    foundation = SHIPPED_MODEL.parent / "mixed-noise-vit-nano-tiny-imagenet"
    environment = {
        **os.environ,
        "HF_SMOOTHING_MODELS": f"{SHIPPED_MODEL}, {foundation}",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads")),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()
            with suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(address, timeout=10).close()
                break
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, url):
    """Opens the page; in the end no script may have failed on it, and nothing may have been asked of another host."""
    pages, problems = [], []

    def call(theme="light", width=1240, height=900):
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: problems.append(request.url) if not _is_own(request.url, url) else None)
        page.goto(f"{url}/?__theme={theme}")
        page.wait_for_selector("#start:enabled")
        pages.append(page)
        return page

    yield call
    for page in pages:
        page.close()
    assert problems == []


def _is_own(address, url):
    return address.startswith((url, "data:", "blob:"))


def draw(page):
    page.click("#start:enabled")
    page.wait_for_selector(".hs-number")


def radius(page):
    return float(page.inner_text(".hs-number"))


def stop(page):
    if page.is_enabled("#stop"):
        page.click("#stop")
    page.wait_for_selector("#start:enabled")


def test_a_claim_grows_is_stopped_and_attacked(open_page):
    page = open_page()
    clicked = time.monotonic()
    draw(page)
    assert time.monotonic() - clicked < 15
    page.wait_for_function("Number(document.querySelector('.hs-number').innerText) > 0.1")
    first = radius(page)
    assert page.locator("#copies figure").count() > 0
    assert page.inner_text("#votes li >> nth=0").startswith("frog")
    page.wait_for_function(f"Number(document.querySelector('.hs-number').innerText) > {max(first, 0.35)}")
    stop(page)
    assert radius(page) > first
    assert "frog" in page.inner_text("[role=status]")
    stopped = radius(page)
    time.sleep(1.5)
    assert radius(page) == stopped
    page.click("#attack:enabled")
    page.wait_for_selector("#broken figure", timeout=3 * PATIENCE)
    assert "The claim stands" in page.inner_text("#broken")
    assert page.locator("#broken figure img[alt]").count() in (1, 4)


def test_choices_end_the_drawing_and_take_effect(open_page):
    page = open_page()
    draw(page)
    page.click("#picker button >> nth=8")
    page.wait_for_selector("#claim .hs-muted")
    assert page.get_attribute("#picker button >> nth=8", "aria-pressed") == "true"
    page.click("#sigma label >> nth=2")
    page.wait_for_selector("#start:enabled")
    draw(page)
    page.wait_for_function("Number(document.querySelector('.hs-number').innerText) > 0")
    assert page.inner_text(".hs-answer") == "ship"
    page.click("#model input")
    page.get_by_role("option", name="mixed-noise-vit-nano-tiny-imagenet").click()
    page.wait_for_selector("#claim .hs-muted")
    assert "202 classes" in page.inner_text("#claim")
    page.wait_for_selector("#start:enabled")
    draw(page)
    stop(page)


def test_a_dropped_picture_is_certified_and_removed(open_page, demo_images, tmp_path):
    page = open_page()
    demo_images[1]["image"].resize((300, 200)).save(tmp_path / "car ${1+1} {{x}}.png")
    page.set_input_files("#file input[type=file]", tmp_path / "car ${1+1} {{x}}.png")
    page.wait_for_selector("#picker:not(:has([aria-pressed=true]))", state="attached")
    page.wait_for_selector("#start:enabled")
    draw(page)
    page.wait_for_function("Number(document.querySelector('.hs-number').innerText) > 0")
    assert page.inner_text(".hs-answer") == "automobile"
    stop(page)
    page.click("#file [aria-label='Clear'], #file [aria-label='Remove this file'] >> nth=0")
    page.wait_for_selector("#picker [aria-pressed=true]")


def test_a_file_that_is_no_picture_is_refused(open_page, tmp_path):
    page = open_page()
    (tmp_path / "bad.png").write_bytes(b"<svg/>")
    page.set_input_files("#file input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector("text=bad.png is no picture")
    page.wait_for_selector("#start:enabled")
    assert page.locator("#picker [aria-pressed=true]").count() == 1


def test_images_and_curves_of_runs(open_page):
    page = open_page()
    page.get_by_role("tab", name="Images of a run").click()
    page.wait_for_selector("#run-images figure")
    assert [heading.split(" (")[0] for heading in page.locator("#run-images h3").all_inner_texts()] == [
        "Largest radii",
        "Smallest radii",
        "Abstentions",
    ]
    page.click("#run input")
    page.get_by_role("option", name="sigma = 0.5").click()
    page.wait_for_function("document.querySelector('#run-images figcaption').innerText.includes('1.0')")
    page.get_by_role("tab", name="Certified accuracy").click()
    page.wait_for_selector("#curves tbody tr")
    assert page.locator("#curves tbody tr").count() == 2
    page.set_input_files("#runs input[type=file]", [EXAMPLE_RUN / "certificates.parquet", EXAMPLE_RUN / "run.json"])
    page.wait_for_selector("#curves th:has-text('mixed-noise-vit-nano-cifar10, sigma = 0.5')")
    page.click("#runs [aria-label='Clear'], #runs [aria-label='Remove this file'] >> nth=0")


def test_a_bad_run_is_an_error_in_words(open_page, tmp_path):
    page = open_page()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    page.get_by_role("tab", name="Certified accuracy").click()
    page.wait_for_selector("#curves tbody tr")
    page.set_input_files("#runs input[type=file]", tmp_path / "bad.parquet")
    page.wait_for_selector("#curves [role=alert]:has-text('bad.parquet is no table of certificates')")


CONTRAST = """
() => {
  const luminance = color => {
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const part = color.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      const alpha = color.startsWith('rgba') ? Number(color.match(/[\\d.]+/g)[3]) : 1;
      if (alpha > 0.5) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = '.hs-title p, .hs-answer, .hs-number, .hs-meta, .hs-valid, .hs-heading, .hs-label, #start, .hs-x';
  return [...document.querySelectorAll(texts)].map(e => {
    const pair = [luminance(getComputedStyle(e).color), luminance(background(e))].sort((a, b) => b - a);
    return [e.className || e.id, (pair[0] + 0.05) / (pair[1] + 0.05)];
  });
}
"""


@pytest.mark.parametrize(("theme", "width"), [("light", 375), ("dark", 1240)])
def test_the_page_is_legible_in_light_and_dark_and_fits_a_phone(theme, width, open_page):
    page = open_page(theme, width)
    draw(page)
    stop(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    low = [(name, ratio) for name, ratio in page.evaluate(CONTRAST) if ratio < 4.5]
    assert low == []
    images = page.evaluate("[...document.images].filter(i => !i.closest('button')).map(i => i.alt)")
    assert images
    assert all(images)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")


def test_the_keyboard_does_what_the_mouse_does(open_page):
    page = open_page()
    page.focus("#picker button >> nth=7")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.number") == "8"
    page.keyboard.press("Enter")
    page.wait_for_selector("#picker button[data-number='8'][aria-pressed=true]")
    page.wait_for_selector("#start:enabled")
    page.focus("#start")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hs-number")
    page.focus("#stop")
    page.keyboard.press("Space")
    page.wait_for_selector("#start:enabled")


def status_of(url, **options):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        f"{ROOT}/pyproject.toml",
        f"{SHIPPED_MODEL}/config.json",
        f"{EXAMPLE_RUN}/run.json",
        "app.py",
        "README.md",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/secret",
    ],
)
def test_no_file_of_the_server_is_served(path, url):
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
        status, content = status_of(f"{url}/{route}{path}")
        assert status in (307, 400, 403, 404, 405, 422), (route, status, content[:80])
        assert b"root:" not in content
        assert b"architectures" not in content


def test_a_path_of_the_server_is_no_upload(url):
    """A client that names a file of the server in place of an upload is refused before any function of the page sees it."""
    functions = json.loads(status_of(f"{url}/config")[1])["dependencies"]
    (upload,) = [
        number
        for number, function in enumerate(functions)
        if ["upload"] in [t[1:] for t in function["targets"]]
        and function["backend_fn"]
        and len(function["inputs"]) == 1
    ]
    secret = {"path": f"{ROOT}/hf_smoothing/space/page.png", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [secret], "fn_index": upload, "session_hash": "secret"}).encode()
    status, _ = status_of(f"{url}/gradio_api/queue/join", data=body, headers={"Content-Type": "application/json"})
    assert status == 200
    _, events = status_of(f"{url}/gradio_api/queue/data?session_hash=secret")
    finished = [json.loads(line[6:]) for line in events.decode().splitlines() if "process_completed" in line]
    assert [event["success"] for event in finished] == [False]


def test_a_large_upload_is_refused(url, tmp_path):
    border = "xxx"
    head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body = head + b"\0" * (11 * 2**20) + f"\r\n--{border}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={border}"}
    status, _ = status_of(f"{url}/gradio_api/upload", data=body, headers=headers)
    assert status == 413


def test_a_space_without_a_model_says_which_variable_is_missing():
    environment = {name: value for name, value in os.environ.items() if name != "HF_SMOOTHING_MODELS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    app = Path(EXAMPLE_RUN.parent / "app.py")
    ended = subprocess.run([sys.executable, app], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "set the variable HF_SMOOTHING_MODELS" in ended.stderr
