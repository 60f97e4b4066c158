"""The page: certify a picture live, try to break the claim, look at runs. Only this file and `app.py` know of gradio."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image

from ..core.noise import GaussianNoise
from ..core.preprocessing import to_pixels
from ..core.smoothing import SmoothedClassifier
from ..core.weights import loading
from ..data.demo_images import load_demo_images
from ..reporting.results import Result, read_results
from . import markup
from .breaking import try_to_break
from .live_claims import ALPHA, MAX_DRAWS, make_live_rule, watch_claims
from .runs_shown import EXAMPLE_RUN, draw_curves, group_images
from .uploads import MAX_FILE_BYTES, PICTURE_FORMATS, read_dropped_runs, read_picture

SIGMAS = (0.12, 0.25, 0.5, 1.0)
_PICTURES = range(20)
"""The demo images that can be chosen: two of each class."""
_FIRST_CHOICE = 6
_SECONDS_PER_UPDATE = 0.25
_SECONDS_PER_COPIES = 1.0
"""How often the claim is shown anew, and the noisy copies, which would flicker."""
_AT_ONCE, _WAITING = 2, 24
"""Visitors whose draws are made at the same time, and who wait for their turn."""
_SESSIONS = 200
_HOUR = 3600

_TITLE = """
<header class="hs-title"><h1>How far does this answer hold?</h1>
<p>The model classifies many noisy copies of a picture. From their votes follows a radius: no change of the picture smaller
than it changes the answer, not even one that an attacker chose. Watch the proof grow, stop it when you like, then try to
break it.</p></header>
"""
_VALID = f"""
<p class="hs-valid"><b>Valid whenever you stop.</b> Every claim is backed by bets that win nothing on average while it is
false (e-processes). By Ville's inequality, the chance that any claim you see here is ever wrong is at most
alpha = {ALPHA:g}.</p>
"""
_BREAK = """
<h2>Try to break it</h2>
<p>Attack the claim with gradients: no change inside the radius may change the answer. Beyond it, some do.</p>
"""
_NOT_DRAWN = "Draw first: what is there to break?"


@dataclass(frozen=True)
class PageSettings:
    """
    What the page offers.

    Args:
        models: image classifiers, names on the Hub or local folders; visitors choose among them.
        runs: folders of finished runs to show besides the example run.
        device: where to compute, such as `cuda`.
        batch_size: the most noisy copies per forward pass.
    """

    models: tuple[str, ...]
    runs: tuple[Path, ...] = ()
    device: str | None = None
    batch_size: int = 64
    load: Callable[[str], SmoothedClassifier] = field(init=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("The page needs a model: give a name on the Hub or a folder.")
        object.__setattr__(self, "load", lru_cache(maxsize=4)(self._load))

    def _load(self, model: str) -> SmoothedClassifier:
        options: dict[str, Any] = {"device": self.device, "batch_size": self.batch_size}
        with loading(model):
            return SmoothedClassifier.from_pretrained(model, GaussianNoise(SIGMAS[1]), **options)

    def classifier(self, model: str, sigma: float) -> SmoothedClassifier:
        """A model of the page under noise. Raises a `ValueError` for a model or a noise level that it does not offer."""
        if model not in self.models or sigma not in SIGMAS:
            raise ValueError(f"This page offers no model {model!r} at sigma={sigma!r}.")
        return self.load(model).with_noise(GaussianNoise(sigma))


def build_page(settings: PageSettings) -> gr.Blocks:
    """Build the page, and load its first model, so that the first claim comes soon after the click."""
    settings.load(settings.models[0])
    results = read_results([path for path in (EXAMPLE_RUN, *settings.runs) if path.is_dir()])
    with gr.Blocks(title="How far does it hold?", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
        gr.HTML(_TITLE, js_on_load=None)
        with gr.Tab("Certify a picture"):
            _certify_tab(settings)
        with gr.Tab("Images of a run") as images_tab:
            _images_tab(results, images_tab)
        with gr.Tab("Certified accuracy") as curves_tab:
            _curves_tab(results, curves_tab)
    return page.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE)


def launch_page(page: gr.Blocks, **options: Any) -> None:
    """Serve the page. Uploads are limited, and no file of the server is served besides them."""
    uploads = Path(get_upload_folder())
    folders = {Path.cwd(), Path.home(), Path(__file__).parents[2]}
    page.launch(
        theme=gr.themes.Base(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="lg",
            font=("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"),
            font_mono=("ui-monospace", "Consolas", "monospace"),
        ).set(
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_background_fill_dark="*primary_700",
            button_primary_background_fill_hover_dark="*primary_800",
            color_accent="*primary_700",
        ),
        css_paths=[Path(__file__).parent / "style.css"],
        max_file_size=MAX_FILE_BYTES,
        allowed_paths=[],
        blocked_paths=[str(folder) for folder in folders if not uploads.is_relative_to(folder)],
        state_session_capacity=_SESSIONS,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["settings"],
        **options,
    )


_PICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  element.querySelectorAll('button').forEach(other => other.setAttribute('aria-pressed', String(other === button)));
  trigger('click', {number: button.dataset.number});
});
"""

_DISABLE = """
() => [{interactive: false, __type__: 'update'}, {interactive: false, __type__: 'update'}]
"""

Source = int | str
"""The picture of a visitor: the number of one that ships, or the path of an upload."""


@dataclass
class Turn:
    """The number of a visitor's current drawing. One object per visitor, which all events share."""

    number: int = 0
    is_stopped: bool = False

    def begin(self) -> int:
        """End the current drawing, and return the number of the next one."""
        self.number += 1
        self.is_stopped = False
        return self.number


@lru_cache
def _shipped() -> tuple[list[Image.Image], list[str]]:
    images = load_demo_images()
    rows = [images[number] for number in _PICTURES]
    return [row["image"] for row in rows], [images.features["label"].int2str(row["label"]) for row in rows]


def _read_source(source: Source) -> Image.Image:
    if isinstance(source, int):
        return _shipped()[0][source]
    if not Path(source).is_file():
        raise ValueError("The picture is no longer on the server: drop it again.")
    return read_picture(source)


def _certify_tab(settings: PageSettings) -> None:
    pictures, names = _shipped()
    source = gr.State(_FIRST_CHOICE)
    watched = gr.State(None, time_to_live=_HOUR)
    turn = gr.State(Turn())
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picker = gr.HTML(markup.picker(pictures, names, _FIRST_CHOICE), js_on_load=_PICK, elem_id="picker")
            endings = [f".{name.lower()}" for name in (*PICTURE_FORMATS, "jpg")]
            file = gr.File(label="or drop your own picture", file_types=endings, height=120, elem_id="file")
            labels = [(Path(model).name, model) for model in settings.models]
            model = gr.Dropdown(labels, value=settings.models[0], label="Model", elem_id="model")
            levels = [(f"{sigma:g}", sigma) for sigma in SIGMAS]
            sigma = gr.Radio(
                levels,
                value=SIGMAS[1],
                label="Noise level (sigma)",
                info="More noise: larger radii, fewer of them.",
                elem_id="sigma",
            )
            with gr.Row():
                start = gr.Button("Draw", variant="primary", min_width=120, elem_id="start")
                stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="stop")
        with gr.Column(scale=3, min_width=320):
            smoothed = settings.load(settings.models[0])
            first = to_pixels(pictures[_FIRST_CHOICE], smoothed.preprocessing)
            card = gr.HTML(markup.ready(first, smoothed.class_names or ()), js_on_load=None, elem_id="claim")
            gr.HTML(_VALID, js_on_load=None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            votes = gr.HTML(js_on_load=None, elem_id="votes")
        with gr.Column(scale=3, min_width=320):
            copies = gr.HTML(js_on_load=None, elem_id="copies")
    with gr.Row(equal_height=True, elem_id="break"):
        gr.HTML(_BREAK, js_on_load=None, min_width=280)
        attack = gr.Button("Attack the claim", interactive=False, scale=0, min_width=200, elem_id="attack")
    broken = gr.HTML(js_on_load=None, elem_id="broken")
    status = gr.HTML("", js_on_load=None, html_template='<p class="hs-hidden" role="status">${value}</p>')

    shown = [card, votes, copies, watched, start, stop, attack, broken, status]
    chosen = [turn, source, model, sigma]
    together: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": _AT_ONCE}
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    patient: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
    start.click(partial(_draw, settings), chosen, shown, show_progress_on=card, **patient, **together)
    stop.click(_stop, turn, stop, **quiet)
    attack.click(_wait_for_attack, None, [attack, broken, status], **quiet).then(
        partial(_attack, settings), watched, [attack, broken, status], show_progress_on=broken, **patient, **together
    )
    # a new choice ends the drawing; until the server has it, no new one may start
    triggers = [picker.click, file.upload, file.clear, file.delete, model.change, sigma.change]
    gr.on(triggers, None, None, [start, stop], js=_DISABLE, **quiet)
    prepare: dict[str, Any] = {"fn": partial(_prepare, settings), "inputs": chosen, "outputs": shown, **quiet}
    picker.click(_pick, None, [source, file], **quiet).then(**prepare)
    file.upload(_upload, file, [source, picker], **quiet).then(**prepare)
    gr.on([file.clear, file.delete], _clear, None, [source, picker], **quiet).then(**prepare)
    gr.on([model.change, sigma.change], **prepare)


def _pick(event: gr.EventData) -> tuple[int, None]:
    number = int(event.number)
    if not 0 <= number < len(_PICTURES):
        raise gr.Error(f"There is no picture {number}.")
    return number, None


def _upload(path: str) -> tuple[Source, str]:
    pictures, names = _shipped()
    try:
        read_picture(path)
    except ValueError as error:
        gr.Warning(str(error))
        return _clear()
    return str(path), markup.picker(pictures, names, None)


def _clear() -> tuple[Source, str]:
    return _FIRST_CHOICE, markup.picker(*_shipped(), _FIRST_CHOICE)


def _prepare(settings: PageSettings, turn: Turn, source: Source, model: str, sigma: float) -> tuple[Any, ...]:
    """The page before drawing: the picture, and no claim."""
    turn.begin()
    try:
        smoothed = settings.classifier(model, sigma)
        card = markup.ready(to_pixels(_read_source(source), smoothed.preprocessing), smoothed.class_names or ())
    except ValueError as error:
        card = markup.notice(str(error))
    return (card, "", "", None, *_buttons(False, False), "", "")


def _buttons(is_drawing: bool, can_attack: bool) -> tuple[gr.Button, gr.Button, gr.Button]:
    return (
        gr.Button(interactive=not is_drawing),
        gr.Button(interactive=is_drawing),
        gr.Button(interactive=can_attack),
    )


def _draw(settings: PageSettings, turn: Turn, source: Source, model: str, sigma: float) -> Iterator[tuple[Any, ...]]:
    """Show claims while copies are drawn, until the visitor stops it or chooses something else."""
    number = turn.begin()
    yield (gr.skip(), "", "", None, *_buttons(True, False), "", "Drawing has started.")
    try:
        smoothed = settings.classifier(model, sigma)
        pixels = to_pixels(_read_source(source), smoothed.preprocessing)
        rule = make_live_rule(smoothed.noise)
        history: list[tuple[int, float]] = []
        newest: list[tuple[torch.Tensor, int]] = []
        last_shown = last_copies = 0.0
        for claim in watch_claims(smoothed, pixels, rule):
            history.append((claim.draws, claim.radius))
            newest = [*zip(claim.copies, claim.classes.tolist()), *newest][: markup.COPIES_SHOWN]
            now, ends = time.monotonic(), claim.is_final or turn.is_stopped
            if turn.number != number:
                return
            if now - last_shown < _SECONDS_PER_UPDATE and not ends:
                continue
            names = smoothed.class_names or [str(index) for index in range(len(claim.counts))]
            settings_shown = (model, sigma, ALPHA, MAX_DRAWS, names, pixels)
            watched = markup.Watched(*settings_shown, claim, tuple(history), tuple(newest))
            copies: Any = gr.skip()
            if now - last_copies >= _SECONDS_PER_COPIES or ends:
                copies, last_copies = markup.copies_strip(watched), now
            last_shown = now
            state = "drawing ..."
            if ends:
                state = "more are unlikely to enlarge it" if claim.is_final else "stopped by you"
            card, bars = markup.claim_card(watched, state), markup.votes(watched)
            buttons = _buttons(not ends, ends and claim.radius > 0)
            yield (card, bars, copies, watched, *buttons, "", _say(watched) if ends else gr.skip())
            if ends:
                return
    except (OSError, ValueError) as error:
        yield (markup.notice(str(error)), "", "", None, *_buttons(False, False), "", str(error))


def _say(watched: markup.Watched) -> str:
    """The claim in one line, for screen readers."""
    claim = watched.claim
    answer = "No answer" if claim.abstains else watched.name(claim.prediction)
    return f"{answer}, radius {markup.format_radius(claim.radius)} after {claim.draws:,} noisy copies."


def _stop(turn: Turn) -> gr.Button:
    turn.is_stopped = True
    return gr.Button(interactive=False)


def _wait_for_attack() -> tuple[Any, ...]:
    text = "Searching for a change that alters the answer, inside the radius and beyond. This takes some seconds ..."
    return gr.Button(interactive=False), f'<p class="hs-verdict">{text}</p>', text


def _attack(settings: PageSettings, watched: markup.Watched | None) -> tuple[Any, ...]:
    if watched is None or not watched.claim.radius > 0:
        return gr.Button(interactive=False), markup.notice(_NOT_DRAWN), _NOT_DRAWN
    smoothed = settings.classifier(watched.model, watched.sigma)
    attempt = try_to_break(smoothed, watched.pixels, watched.claim.prediction, watched.claim.radius)
    return gr.Button(interactive=True), markup.broken(attempt, watched.names), "The attack has ended."


def _images_tab(results: Sequence[Result], tab: gr.Tab) -> None:
    choices = [(result.title, number) for number, result in enumerate(results)]
    run = gr.Dropdown(choices, value=0 if choices else None, label="Finished run", elem_id="run")
    images = gr.HTML(js_on_load=None, elem_id="run-images")

    @lru_cache(maxsize=16)
    def show(number: int | None) -> str:
        if number is None or not 0 <= number < len(results):
            return markup.notice("There is no run: start the page with --run FOLDER.")
        try:
            return markup.image_groups(group_images(results[number]))
        except (OSError, ValueError) as error:
            return markup.notice(str(error))

    gr.on([tab.select, run.change], show, run, images, api_visibility="private", show_progress="minimal")


def _curves_tab(results: Sequence[Result], tab: gr.Tab) -> None:
    file = gr.File(
        label="Drop runs: the certificates.parquet of each, and its run.json",
        file_count="multiple",
        height=140,
        file_types=[".parquet", ".json"],
        elem_id="runs",
    )
    curves = gr.HTML(js_on_load=None, elem_id="curves")

    def show(paths: list[str] | None) -> str:
        try:
            chosen = read_dropped_runs(paths) if paths else results
            return markup.curves(draw_curves(chosen)) if chosen else ""
        except (ImportError, OSError, ValueError) as error:
            return markup.notice(str(error))

    gr.on([tab.select, file.change], show, file, curves, api_visibility="private", show_progress="minimal")
