"""What studies of count heads came to, as text for cards."""

import math
from typing import Any

_NEAR = 0.015
"""Gaps of the estimate's accuracy to Monte-Carlo's that are not named."""

_FAR = 0.03
"""Gaps of a calibrated claim's accuracy that are."""


def count_head(results: dict[str, Any]) -> str:
    """How far a count head is off, and what it is good for."""
    radii = [row["radius"] for row in results["errors"][0]["accuracy"]["monte_carlo"]]
    n, images = results["errors"][0]["n"], results["errors"][0]["images"]

    def shares(rows: list[dict[str, float]]) -> list[str]:
        return [f"{row['share']:.1%}" for row in rows]

    def claimed(rows: list[dict[str, Any]]) -> list[str]:
        return [
            next((f"{share:.1%}" for row in rows if (share := _at(row, radius)) is not None), "-") for radius in radii
        ]

    def length(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = [
        f"Over all {images} images, beside Monte-Carlo with n = {n:,} (alpha = {results['alpha']:g}). An estimate is too "
        "large where it exceeds the radius that Monte-Carlo proves for the same class:",
        "",
        "| sigma | another class | too large | by, on average | too small | by, on average |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["errors"]:
        lines.append(
            f"| {row['sigma']:g} | {row['disagreement']:.1%} | {row['overestimated']:.1%} | {length(row['mean_excess'])} | "
            f"{row['underestimated']:.1%} | {length(row['mean_shortfall'])} |"
        )
    lines += [
        "",
        "The same by the radius that Monte-Carlo proves, of whatever class. Where all of its draws agree no estimate can be "
        "too large:",
        "",
        "| sigma | above | up to | images | too large | estimate less measured, on average |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['sigma']:g} | {_bound(one['above'])} | {_bound(one['up_to'])} | {one['images']} | "
        f"{one['overestimated']:.1%} | {one['mean_error']:+.3f} |"
        for row in results["errors"]
        for one in row["by_radius"]
    ]
    lines += [
        "",
        "Accuracy at each radius; Monte-Carlo's and the sequential rule's hold for each image, the calibrated ones for "
        "images on average (all but a share delta; where its class is right, a claim of more than Monte-Carlo proves counts "
        "as accurate here too), the estimate not at all:",
        "",
        "| sigma | radii from | " + " | ".join(f"r = {radius:g}" for radius in radii) + " |",
        "|---" * (2 + len(radii)) + "|",
    ]
    for row in results["errors"]:
        kinds = [
            (f"Monte-Carlo, n = {n:,}", shares(row["accuracy"]["monte_carlo"])),
            ("estimate", shares(row["accuracy"]["estimate"])),
        ]
        kinds += [
            (name.format(one["n"]), shares(one[which]))
            for one in results["expected"]
            if one["sigma"] == row["sigma"]
            for name, which in (
                ("Monte-Carlo expected at n = {:,}", "monte_carlo"),
                ("estimate at n = {:,}", "estimate"),
            )
        ]
        kinds += [
            (f"{claims} by {by}, delta = {delta:g}", claimed(ones))
            for by, which in (("random halves", "conformal"), ("its calibration", "calibrated"))
            for delta in dict.fromkeys(one["delta"] for one in results[which])
            for claims in _CLAIMS
            if (
                ones := [
                    one
                    for one in results[which]
                    if (one["sigma"], one["delta"], _claims(one)) == (row["sigma"], delta, claims)
                ]
            )
        ]
        kinds += [
            (
                f"sequential{' with the head' * one['with_head']}, {one['draws']:,.0f} draws an image, at most "
                f"{one['budget']:,}",
                shares(one["accuracy"]),
            )
            for one in results["sequential"]
            if one["sigma"] == row["sigma"]
        ]
        lines += [f"| {row['sigma']:g} | {name} | " + " | ".join(found) + " |" for name, found in kinds]
    lines += [
        "",
        f"What can be expected at n = {results['expected'][0]['n']:,} is reckoned from the {n:,} draws, by Jeffreys' "
        "posterior of the true class's probability in each image; its standard deviation is at most "
        f"{max(found['deviation'] for one in results['expected'] for found in one['monte_carlo']) * 100:.1f} points. "
        f"Above radius 0 the estimate's accuracy is within {_NEAR * 100:g} points of Monte-Carlo's:",
        "",
    ]
    for at, rows in (
        (n, [(row["sigma"], row["accuracy"]) for row in results["errors"]]),
        (results["expected"][0]["n"], [(row["sigma"], row) for row in results["expected"]]),
    ):
        far = [
            f"sigma {sigma:g}, r = {proved['radius']:g} ({gap * 100:+.1f})"
            for sigma, found in rows
            for proved, estimated in zip(found["monte_carlo"], found["estimate"])
            if proved["radius"] > 0 and abs(gap := estimated["share"] - proved["share"]) > _NEAR
        ]
        lines.append(f"- at n = {at:,} " + (f"but for {', '.join(far)}" if far else "everywhere"))
    lines += [
        "",
        "A calibrated head claims each image's own radius, or decides radii that are named in advance: of those, it "
        "claims the largest that it can. Here these are all above 0 of this table together, or each of them by itself. "
        "Images of which more is claimed than Monte-Carlo proves, over "
        f"{results['conformal'][0]['splits']} random halves to calibrate on and to judge (in brackets, the standard error "
        "of one half), and what share this is of the images that get a radius"
        + (
            f"; and by the head's own calibration ({results['calibrated'][0]['calibrated_on']}):"
            if results["calibrated"]
            else ":"
        ),
        "",
        *_misses(results),
    ]
    if results["calibrated"]:
        over = sum(one["miss_rate"] > one["delta"] for one in results["calibrated"])
        lines += ["", f"By the head's own calibration {over} of {len(results['calibrated'])} are above delta."]
    smallest = min(one["delta"] for one in results["conformal"])
    for claims, words in _CLAIMS.items():
        for counted, of_what in (
            ("accuracy", "the accuracy"),
            ("proved_accuracy", "the part that Monte-Carlo proves too"),
        ):
            gaps = [
                ((kept - proved["share"]) * 100, f"sigma {one['sigma']:g}, r = {proved['radius']:g}")
                for one in results["conformal"]
                if one["delta"] == smallest and _claims(one) == claims
                for row in results["errors"]
                if row["sigma"] == one["sigma"]
                for proved in row["accuracy"]["monte_carlo"]
                if proved["share"] > 0 and proved["radius"] in (one["decided"] or radii)
                if (kept := _at(one, proved["radius"], counted)) is not None
            ]
            if gaps:
                far = [f"{where} ({gap:+.1f})" for gap, where in gaps if gap < -_FAR * 100]
                lines += ["", f"{words} by random halves at the smallest delta:", ""] * (counted == "accuracy")
                lines.append(
                    f"- {of_what} less Monte-Carlo's is {min(gaps)[0]:+.1f} to {max(gaps)[0]:+.1f} points, where that "
                    f"proves anything; more than {_FAR * 100:g} points below it: {', '.join(far) or 'nowhere'}."
                )
    names = {
        "without": "without",
        "ranking": "the head's ranking",
        "with": "with the head",
        "knowing": "p known",
        "permuted": "classes permuted",
        "permuted_and_sure": "permuted, p = .999",
    }
    lines += [
        "",
        "Mean draws of the sequential rule to decide a radius (simulated from the measured frequencies; images that a "
        "quarter of the budget of 100,000 can decide by Wald's bound; the rest of them were given up): without the head, "
        "where the classifier's answer to the clean image ranks the classes; with the head's ranking alone, and with its "
        "expectation of p too; and with heads made wrong on purpose. In brackets, the "
        "standard error of the simulation. Wald's bound is that of a test that sees hits and misses; the "
        "rule bounds the runner-up too:",
        "",
        "| sigma | radius | images | Wald's bound | "
        + " | ".join(names.values())
        + " | with, over Wald's | decided |",
        "|---" * (6 + len(names)) + "|",
    ]
    for row in results["draws_to_decide"]:
        cells = [f"{row['draws'][name]:,.0f} ({row['errors'][name]:,.0f})" for name in names]
        lines.append(
            f"| {row['sigma']:g} | {row['radius']:g} | {row['images']} | {row['wald']:,.0f} | "
            + " | ".join(cells)
            + f" | {row['draws']['with'] / row['wald']:.2f} | {row['claimed']['with']:.1%} |"
        )
    dearer = [
        f"sigma {row['sigma']:g}, r = {row['radius']:g} ({row['draws']['with'] / row['draws']['without'] - 1:+.1%})"
        for row in results["draws_to_decide"]
        if row["draws"]["with"] > row["draws"]["without"]
    ]
    unclear = [
        f"sigma {row['sigma']:g}, r = {row['radius']:g}"
        for row in results["draws_to_decide"]
        if abs(row["draws"]["with"] - row["draws"]["without"])
        < 2 * math.hypot(row["errors"]["with"], row["errors"]["without"])
    ]
    saved = [1 - row["draws"]["with"] / row["draws"]["without"] for row in results["draws_to_decide"]]
    if saved:
        lines += [
            "",
            f"The head saves {min(saved):.0%} to {max(saved):.0%} of the draws. It costs draws instead of saving them at: "
            f"{', '.join(dearer) or 'none of these'}. Less than two standard errors of the simulation lie between with and "
            f"without at: {', '.join(unclear) or 'none of these'}.",
        ]
    times, payback = results["seconds_an_image"], results["payback"]
    threads = f"{results['num_threads']} thread{'' if results['num_threads'] == 1 else 's'}"
    lines += [
        "",
        f"An estimate takes {times['estimate'] * 1000:.1f} ms an image in batches, {results['device']}, "
        f"{threads}; the usual protocol (100,100 draws, at the rate of {times['timed_draws']:,} "
        f"timed ones) {times['usual']:,.0f} s with the same model on the same machine: {times['ratio']:,.0f} times as long."
        + (
            f" The sequential rule without the head, with the draws an image that the runs of the table of accuracy took: "
            f"{times['sequential']:,.1f} s, {times['ratio_of_sequential']:,.0f} times as long."
            if "sequential" in times
            else ""
        )
        + ("" if payback is None else _payback(payback))
        + f" Command: `{results['command']}` (seed {results['seed']}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ").",
    ]
    return "\n".join(lines)


_CLAIMS = {
    "own radius": "Claiming each image's own radius",
    "radii decided together": "Deciding the radii together",
    "each radius decided by itself": "Deciding each radius by itself",
}
"""What a calibrated head may be asked, and how a sentence about it begins."""


def _claims(calibrated: dict[str, Any]) -> str:
    own, together, alone = _CLAIMS
    return own if calibrated["decided"] is None else together if len(calibrated["decided"]) > 1 else alone


def _named(calibrated: dict[str, Any]) -> str:
    decided = calibrated["decided"]
    return _claims(calibrated) if decided is None or len(decided) > 1 else f"r = {decided[0]:g} decided"


def _misses(results: dict[str, Any]) -> list[str]:
    """The table of how often more is claimed than Monte-Carlo proves."""
    deltas = list(dict.fromkeys(one["delta"] for one in results["conformal"]))
    heads = [f"delta = {delta:g}, {by}" for delta in deltas for by in ("random halves", "own calibration")]
    rows: dict[tuple[float, str], dict[str, str]] = {}
    for one in results["conformal"]:
        row = rows.setdefault((one["sigma"], _named(one)), dict.fromkeys(heads, "-"))
        row[f"delta = {one['delta']:g}, random halves"] = (
            f"{one['miss_rate']:.1%} ({one['binomial_error']:.1%}), {_of_claims(one)}"
        )
    for one in results["calibrated"]:
        rows[one["sigma"], _named(one)][f"delta = {one['delta']:g}, own calibration"] = (
            f"{one['miss_rate']:.1%}, {_of_claims(one)}"
        )
    return [
        f"| sigma | claimed | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
        *(f"| {sigma:g} | {named} | {' | '.join(row.values())} |" for (sigma, named), row in rows.items()),
    ]


def _of_claims(calibrated: dict[str, Any]) -> str:
    return f"{calibrated['miss_rate'] / calibrated['claim_rate']:.0%}" if calibrated["claim_rate"] else "-"


def _at(calibrated: dict[str, Any], radius: float, counted: str = "accuracy") -> float | None:
    """
    The accuracy of what is claimed at a radius. Below the smallest radius decided nothing is claimed; one decided by itself
    says nothing of others.
    """
    decided = calibrated["decided"]
    known = decided is None or radius in decided or (len(decided) > 1 and radius > decided[0])
    return next(row["share"] for row in calibrated[counted] if row["radius"] == radius) if known else None


def _bound(radius: float | None) -> str:
    return "-" if radius is None else f"{radius:g}"


def _payback(payback: dict[str, float]) -> str:
    def images(count: float) -> str:
        return f"{math.ceil(count):,} image{'' if count <= 1 else 's'}"

    text = (
        f" Counting and training took {payback['seconds'] / 60:.0f} minutes; estimates in place of certificates pay them "
        f"back after {images(payback['images'])}"
    )
    if "images_of_sequential" in payback:
        text += f" of the usual protocol, or {images(payback['images_of_sequential'])} of the sequential rule"
    return text + "."


def count_head_arms(results: dict[str, Any]) -> str:
    """The arms of the study of how to train a count head."""
    judged = results["judged"]
    lines = [
        f"Judged on every {judged['every']}th image of `{judged['dataset_name']}`, {judged['split']}, with Monte-Carlo at "
        f"n = {judged['n']:,}: Jensen-Shannon divergence (nats; the noise of the measured counts is in it), share of images "
        "given another class, share of radii too large, and the largest gap to Monte-Carlo's certified accuracy at "
        + ", ".join(f"{radius:g}" for radius in results["radii"])
        + ".",
        "",
        "| trained | images x draws | steps | sigma | divergence | another class | too large | largest gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in results["arms"]:
        for row in arm["errors"]:
            lines.append(
                f"| {arm['arm']} | {arm['images']:,} x {arm['draws_an_image']} | {arm['steps']:,} | {row['sigma']:g} | "
                f"{row['jensen_shannon']:.4f} | {row['disagreement']:.1%} | {row['overestimated']:.1%} | "
                f"{row['accuracy_gap'] * 100:.1f} points |"
            )
    return "\n".join(
        [
            *lines,
            "",
            f"Command: `{results['command']}` (seed {results['settings']['seed']}, "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
            + ").",
        ]
    )
