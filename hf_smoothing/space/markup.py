"""The page's HTML: claims, copies, votes, broken claims, images and curves of runs. Everything from outside is escaped."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image

from ..core.certificates import ABSTAIN, format_radius
from .breaking import BreakAttempt
from .live_claims import LiveClaim
from .runs_shown import Curves, ImageGroup

LARGEST_SIDE = 128
"""Pixels a side of the pictures on the page; larger ones are made smaller."""
_VOTES_SHOWN = 4
COPIES_SHOWN = 10
_VOTE_SCALES = (32, 128, 512, 2048)
"""Votes that fill a bar; the next one once there are more."""
_FIRST_TICK = 8


@dataclass(frozen=True)
class Watched:
    """
    What the page knows of one drawing.

    Attributes:
        model, sigma, alpha, max_draws: the settings.
        names: of the classes.
        pixels: the picture `(channels, height, width)`.
        claim: the last one, and `history`, draws and radius of each.
        copies: the newest noisy copies, and what each is taken for.
    """

    model: str
    sigma: float
    alpha: float
    max_draws: int
    names: Sequence[str]
    pixels: torch.Tensor
    claim: LiveClaim
    history: tuple[tuple[int, float], ...]
    copies: tuple[tuple[torch.Tensor, int], ...]

    def name(self, index: int) -> str:
        return self.names[index]


def to_data_uri(pixels: torch.Tensor | Image.Image) -> str:
    """A PNG of pixels `(channels, height, width)` (clipped to `[0, 1]`) or of a picture, as the address of an image."""
    if isinstance(pixels, torch.Tensor):
        levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(levels if levels.shape[2] == 3 else np.repeat(levels, 3, axis=2))
    else:
        picture = pixels
    if max(picture.size) > LARGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure(pixels: torch.Tensor | Image.Image, alt: str, caption: str, kind: str = "") -> str:
    """One picture with a caption; `caption` is HTML, `alt` is text."""
    image = f'<img src="{to_data_uri(pixels)}" alt="{escape(alt)}">'
    return f'<figure class="hs-figure {kind}">{image}<figcaption>{caption}</figcaption></figure>'


def picker(pictures: Sequence[Image.Image], names: Sequence[str], chosen: int | None) -> str:
    """Buttons with the pictures that ship; a click on one triggers the event with its number."""
    buttons = "".join(
        f'<button type="button" data-number="{number}" aria-pressed="{str(number == chosen).lower()}" '
        f'aria-label="{escape(name)}, picture {number + 1}"><img src="{to_data_uri(picture)}" alt=""></button>'
        for number, (picture, name) in enumerate(zip(pictures, names))
    )
    return f'<div class="hs-picker" role="group" aria-label="Pictures that ship">{buttons}</div>'


def ready(pixels: torch.Tensor, names: Sequence[str]) -> str:
    """The card before drawing starts."""
    _, height, width = pixels.shape
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return _card(
        pixels,
        f'<p class="hs-answer hs-muted">Nothing drawn yet</p><p class="hs-meta">The model sees this picture at {width} x '
        f"{height} pixels. It gives every picture one of {len(names)} classes: {escape(shown)}.</p>",
    )


def claim_card(watched: Watched, state: str) -> str:
    """The claim as it stands; `state` says in words whether it has ended."""
    claim = watched.claim
    copies = f"{claim.draws:,} noisy copies"
    if claim.abstains:
        answer = '<p class="hs-answer hs-muted">No answer proved yet</p>'
        most = escape(watched.name(claim.leader))
        meaning = f"The noisy copies do not prove yet which class leads; most are taken for {most}."
        if claim.is_final:
            answer = '<p class="hs-answer hs-muted">Abstains</p>'
            meaning = (
                f"The noisy copies do not prove which class leads (most: {most}), and more of "
                "them are unlikely to. Try less noise, or a picture that this model knows better."
            )
    else:
        answer = f'<p class="hs-answer">{escape(watched.name(claim.prediction))}</p>'
        levels = 255 * claim.radius / math.sqrt(watched.pixels.numel())
        meaning = (
            f"No change of this picture with an l2 norm below {format_radius(claim.radius)} changes this answer. Spread "
            f"evenly, that is {levels:.1f} of 255 levels in each of its {watched.pixels.numel():,} values."
        )
        if claim.radius == 0:
            meaning = "This class is proved to lead among noisy copies, but no radius is yet."
    number = "0.000" if claim.abstains else format_radius(claim.radius)
    card = _card(
        watched.pixels,
        f'{answer}<p class="hs-radius"><span class="hs-number">{number}</span> '
        f'<span class="hs-unit">certified radius</span></p><p class="hs-meta">{copies} · {escape(state)}</p>',
    )
    return f'{card}{_chart(watched)}<p class="hs-meaning">{meaning}</p>'


def _card(pixels: torch.Tensor, content: str) -> str:
    picture = f'<img class="hs-picture" src="{to_data_uri(pixels)}" alt="The picture as the model sees it">'
    return f'<div class="hs-card">{picture}<div>{content}</div></div>'


def _chart(watched: Watched) -> str:
    """The radius against the number of draws, on a logarithmic axis."""
    last = math.log(watched.max_draws / _FIRST_TICK)
    ceiling = _round_up(max(radius for _, radius in watched.history))
    points = [
        (100 * math.log(max(draws, _FIRST_TICK) / _FIRST_TICK) / last, 100 - 100 * radius / ceiling)
        for draws, radius in watched.history
    ]
    # a step: a claim holds until the next one
    path = "".join(f"H{x:.2f}V{y:.2f}" for x, y in points)
    end = points[-1][0]
    grid = "".join(f'<line x1="0" x2="100" y1="{y}" y2="{y}"/>' for y in (0, 50, 100))
    labels = "".join(
        f'<span class="hs-y" style="bottom:{share:.0%}">{ceiling * share:.2g}</span>' for share in (0, 0.5, 1)
    )
    ticks = [10**power for power in range(1, 9) if _FIRST_TICK < 10**power <= watched.max_draws]
    labels += "".join(
        f'<span class="hs-x" style="left:{100 * math.log(tick / _FIRST_TICK) / last:.1f}%">{tick:,}</span>'
        for tick in ticks
    )
    draws, radius = watched.history[-1]
    text = f"Certified radius against the number of noisy copies: {format_radius(radius)} after {draws:,}."
    return (
        f'<div class="hs-chart" role="img" aria-label="{text}"><svg viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'aria-hidden="true"><g class="hs-grid">{grid}</g><path class="hs-area" d="M0 100{path}V100Z"/>'
        f'<path class="hs-line" d="M0 100{path}"/></svg><i class="hs-dot" style="left:{end:.2f}%;top:{points[-1][1]:.2f}%">'
        f'</i>{labels}</div><p class="hs-axis">noisy copies drawn</p>'
    )


def _round_up(value: float) -> float:
    """The next of 0.1, 0.2, 0.4, 0.6, 0.8, 1, ... above a value, as the end of an axis."""
    return 0.1 if value <= 0.1 else 0.2 * math.ceil(value / 0.2)


def copies_strip(watched: Watched) -> str:
    """The newest noisy copies, and what each is taken for."""
    figures = []
    for copy, index in watched.copies:
        name, same = watched.name(index), index == watched.claim.leader
        caption = f"{'' if same else '<b>≠</b> '}{escape(name)}"
        figures.append(figure(copy, f"Noisy copy, taken for {name}", caption, "" if same else "hs-other"))
    heading = '<h3 class="hs-heading">The newest noisy copies, and what the model takes each for</h3>'
    return f'{heading}<div class="hs-strip hs-five">{"".join(figures)}</div>'


def votes(watched: Watched) -> str:
    """Bars of the votes of all copies, for the classes with most votes."""
    counts = watched.claim.counts
    scale = next((scale for scale in _VOTE_SCALES if scale >= watched.claim.draws), watched.max_draws)
    order = np.argsort(-counts, kind="stable")
    shown = [(watched.name(index), int(counts[index])) for index in order[:_VOTES_SHOWN].tolist()]
    if rest := order[_VOTES_SHOWN:].tolist():
        label = watched.name(rest[0]) if len(rest) == 1 else f"{len(rest)} others"
        shown.append((label, int(counts[rest].sum())))
    bars = "".join(
        f'<li class="{"hs-first" if not at else ""}"><span class="hs-label">{escape(name)}</span><span class="hs-track"><i '
        f'style="width:{number / scale:.2%}"></i></span><span class="hs-count">{number:,} '
        f"<small>{number / watched.claim.draws:.0%}</small></span></li>"
        for at, (name, number) in enumerate(shown)
    )
    heading = f'<h3 class="hs-heading">Votes of all noisy copies <small>(a full bar: {scale:,})</small></h3>'
    return f'{heading}<ol class="hs-votes">{bars}</ol>'


def broken(attempt: BreakAttempt, names: Sequence[str]) -> str:
    """What attacks on the claim found, with the pictures side by side."""
    radius = format_radius(attempt.radius)
    effort = f"{attempt.tried} changes from {attempt.steps} gradient steps and random directions"
    answer = names[attempt.prediction]
    original = figure(attempt.original, "The original picture", f"original: <b>{escape(answer)}</b>")
    if attempt.changed is None:
        return (
            f'<p class="hs-verdict hs-good">The claim stands: {effort}, inside the radius and up to {attempt.reach:.2f}, '
            f'and none changes the answer.</p><div class="hs-strip hs-wide">{original}</div>'
        )
    to = names[attempt.changed_to]
    pictures = [original]
    if attempt.is_broken:
        verdict = (
            f'<p class="hs-verdict hs-bad">The claim is wrong: a change of norm {attempt.norm:.3f}, smaller than {radius}, '
            f"makes it {escape(to)}. This may happen to at most alpha of the claims. Please draw again.</p>"
        )
    else:
        verdict = (
            f'<p class="hs-verdict hs-good">The claim stands: {effort}, and none smaller than {radius} changes the answer. '
            f"The smallest change found that does has norm {attempt.norm:.3f}, {attempt.norm / attempt.radius:.2f} times "
            f"the radius, and makes it {escape(to)}.</p>"
        )
        assert attempt.inside is not None
        inside = "undecided" if attempt.inside_answer == ABSTAIN else names[attempt.inside_answer]
        caption = f"same change, inside the radius: <b>{escape(inside)}</b>"
        pictures.append(figure(attempt.inside, f"The change inside the radius: {inside}", caption))
    change = attempt.changed - attempt.original
    factor = max(1, round(0.5 / max(float(change.abs().max()), 1e-6)))
    caption = f"change of {attempt.norm:.3f}: <b>{escape(to)}</b>"
    pictures.append(figure(attempt.changed, f"The changed picture: {to}", caption, "hs-other"))
    amplified = f"The change, {factor} times amplified, on grey"
    pictures.append(figure(0.5 + change * factor, amplified, f"the change, {factor} x amplified"))
    return f'{verdict}<div class="hs-strip hs-wide">{"".join(pictures)}</div>'


def image_groups(groups: Sequence[ImageGroup]) -> str:
    """Images of a run."""
    parts = []
    for group in groups:
        figures = []
        for row, picture in zip(group.rows, group.pictures):
            label, prediction = (str(row.get(f"{kind}_name") or row[kind]) for kind in ("label", "prediction"))
            if row["prediction"] == ABSTAIN:
                figures.append(figure(picture, f"{label}: abstains", f"{escape(label)}?", "hs-abstains"))
                continue
            right, radius = row["prediction"] == row["label"], format_radius(row["radius"])
            text = escape(prediction) if right else f"<b>✗</b> {escape(prediction)}, not {escape(label)}"
            alt = f"{label}, taken for {prediction}, radius {radius}"
            figures.append(figure(picture, alt, f"{text}<br>{radius}", "" if right else "hs-other"))
        shown = f"{len(group.rows)} of {group.total}" if group.total else "none"
        heading = f'<h3 class="hs-heading">{group.title} <small>({shown})</small></h3>'
        parts.append(f'{heading}<div class="hs-strip">{"".join(figures)}</div>')
    return "".join(parts)


def curves(drawn: Curves) -> str:
    """Curves of certified accuracy, for a light and a dark page, with a table of the same figures."""
    best = "; ".join(f"{title}: {shares[0]} at radius {drawn.radii[0]:g}" for title, shares in drawn.shares)
    images = "".join(
        f'<img class="hs-curves hs-{theme}" alt="{escape(drawn.name)} against radius. {escape(best)}." '
        f'src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'
        for theme, svg in drawn.pictures.items()
    )
    head = "".join(f'<th scope="col">r = {radius:g}</th>' for radius in drawn.radii)
    body = "".join(
        f'<tr><th scope="row">{escape(title)}</th>{"".join(f"<td>{escape(share)}</td>" for share in shares)}</tr>'
        for title, shares in drawn.shares
    )
    caption = (
        f"<caption>{escape(drawn.name)}: the share of all images with the right answer and at least this radius "
        f"({escape(drawn.norm)}, [0, 1] pixels).</caption>"
    )
    table = f'<table class="hs-table">{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    note = f"<p>{escape(drawn.note)}</p>" if drawn.note else ""
    return f'{images}<div class="hs-scroll" tabindex="0" role="region" aria-label="Table of the curves">{table}</div>{note}'


def notice(text: str) -> str:
    """A problem in words, in place of a result."""
    return f'<p class="hs-verdict hs-bad" role="alert">{escape(text)}</p>'
