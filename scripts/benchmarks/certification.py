"""Benchmark certification: how many draws rules need to find radii and to decide them.

Examples:
    python scripts/benchmarks/certification.py --quick        # under two minutes on two cores
    python scripts/benchmarks/certification.py --counts cohen-counts/test.parquet --output benchmark.json

Draws are simulated from class frequencies that stand for the truth. So every rule gets the same images, and many more draws
than there is time to make. The frequencies are those of a table of counts, or are measured on the shipped images.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from reference_rules import (
    BUDGET,
    SELECTION_DRAWS,
    Floats,
    decide_fixed,
    decide_in_stages,
    decide_uncut,
    find_fixed,
    limit,
)
from rich.console import Console

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier, TwoStageRule, load_demo_images
from hf_smoothing.core.certificates import ABSTAIN
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.diagnostics.simulation import joint_draws, simulate, wald_draws
from hf_smoothing.reporting.plots import require_matplotlib
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

FIXED_SIZES = (300, 1_000, 3_000, 10_000)
BUDGETS = (25, 50, 100, 200, 300, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000)
"""Mean draws that the two-stage rule plans for."""
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
DECIDED_SIGMA = 0.5
"""The noise level at which all radii are decided; at others, radius 0 is."""
DECIDABLE = BUDGET / 4
"""No rule can decide an image next to the boundary: tables leave out images whose bound exceeds this."""
HEAD_ERROR = 0.05
"""The largest error of the probability that a simulated count head predicts."""
CLEAN_SIGMAS = {0.25: 0.12, 0.5: 0.25, 1.0: 0.5}
"""The noise level of a table of counts whose ranking of the classes stands for that of the clean pass."""
RULES = {
    "fixed": "fixed n",
    "fixed_two_sided": "fixed n, two bounds",
    "two_stage": "two-stage",
    "two_stage_head": "two-stage, with a head",
}
LIMITS = {"limit": "limit", "limit_two_sided": "limit, two bounds"}


@dataclass(frozen=True)
class Truth:
    """Images whose class frequencies are taken for the true probabilities, and their classes' scores without noise."""

    name: str
    sigma: float
    probabilities: Floats = field(repr=False)
    clean_scores: Floats = field(repr=False)
    counted_draws: int

    @property
    def about(self) -> dict[str, Any]:
        """What results say of it. They never hold the counts."""
        numbers = {"images": len(self.probabilities), "counted_draws": self.counted_draws}
        return {"name": self.name, "sigma": self.sigma, **numbers}


def read_counts(path: Path, every: int, sigmas: list[float]) -> list[Truth]:
    """Truths from a table with the columns `original_index`, `sigma` and `counts`, such as that of arXiv 2402.07498."""
    table = pq.read_table(path).to_pandas()
    table = table[table.original_index % every == 0].sort_values("original_index")

    def counts_at(sigma: float) -> Floats:
        return np.array(table[np.isclose(table.sigma, sigma)].counts.tolist(), np.float64)

    truths = []
    for sigma in sigmas:
        counts = counts_at(sigma)
        frequencies = counts / counts.sum(1, keepdims=True)
        name = "CIFAR-10 classifier of Cohen et al."
        truths.append(Truth(name, sigma, frequencies, counts_at(CLEAN_SIGMAS[sigma]), int(counts[0].sum())))
    return truths


def measure_model(model: str, sigma: float, num_images: int, num_draws: int, seed: int) -> Truth:
    """The truth of a model on the shipped images, from a number of draws of each."""
    smoothed = SmoothedClassifier.from_pretrained(model, GaussianNoise(sigma))
    pictures = load_demo_images().select(range(num_images))["image"]
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in pictures]
    certificates = smoothed.certify(pixels, "fixed", n0=1, n=num_draws, seed=seed, progress=True)
    counts = np.array([certificate.counts for certificate in certificates], np.float64)
    # one more draw, spread over the classes: few draws do not show that a class never occurs
    frequencies = (counts + 1 / counts.shape[1]) / (num_draws + 1)
    with torch.inference_mode():
        logits = smoothed.base_classifier.classifier(torch.stack(pixels)).logits.double().numpy()
    return Truth(Path(model).name, sigma, frequencies, logits, num_draws)


def find(truth: Truth, alpha: float, repeats: int, budgets: tuple[int, ...], seed: int) -> dict[str, Any]:
    """What rules that find radii give for their draws: a row for each rule and setting, and draws at equal mean radius."""
    noise, generator = GaussianNoise(truth.sigma), np.random.default_rng(seed)
    p = np.repeat(truth.probabilities, repeats, axis=0)
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in RULES}
    for n in FIXED_SIZES:
        for name, radii in zip(RULES, find_fixed(p, n, noise, alpha, generator)):
            curves[name].append({"n": n} | _summarize(radii, np.full(len(p), SELECTION_DRAWS + n)))
    head = _predict_roughly(p, generator)
    for budget in budgets:
        rule = TwoStageRule(budget, alpha, BUDGET)
        for name, clean in (("two_stage", None), ("two_stage_head", head)):
            outcomes, draws = simulate(rule, noise, p, clean, generator)
            curves[name].append({"draws": budget} | _summarize(outcomes.radii, draws))
    for name, points in zip(LIMITS, limit(truth.probabilities, noise, alpha)):
        curves[name] = [{"mean_radius": radius, "mean_draws": draws} for radius, draws in points.tolist()]
    rows = [_compare_at_equal_radius(curves, *fixed) for fixed in zip(curves["fixed"], curves["fixed_two_sided"])]
    return truth.about | {"rules": curves, "equal_radius": rows}


def _predict_roughly(p: Floats, generator: np.random.Generator) -> CleanPass:
    """A count head that knows the class, and its probability to within `HEAD_ERROR`."""
    top, rows = p.argmax(1), np.arange(len(p))
    guess = np.clip(p[rows, top] + generator.uniform(-HEAD_ERROR, HEAD_ERROR, len(p)), 0, 1)
    scores = p * ((1 - guess) / np.maximum(1 - p[rows, top], 1e-12))[:, None]
    scores[rows, top] = guess
    return CleanPass(scores, frequencies=True)


def _summarize(radii: Floats, draws: Any) -> dict[str, float]:
    return {
        "mean_radius": float(radii.mean()),
        "mean_draws": float(draws.mean()),
        "median_draws": float(np.median(draws)),
        "certified": float((radii > 0).mean()),
    }


def _compare_at_equal_radius(
    curves: dict[str, list[dict[str, Any]]], fixed: dict[str, Any], fixed_two_sided: dict[str, Any]
) -> dict[str, Any]:
    """Mean draws for the mean radius of fixed n, as shares of its draws."""

    def draws_at(name: str, radius: float) -> float | None:
        radii, draws = np.array([(point["mean_radius"], point["mean_draws"]) for point in curves[name]]).T
        return float(np.exp(np.interp(radius, radii, np.log(draws)))) if radii[0] <= radius <= radii[-1] else None

    def ratio(draws: float | None, of: float | None) -> float | None:
        return draws / of if draws and of else None

    draws = {name: draws_at(name, fixed["mean_radius"]) for name in ("two_stage", "two_stage_head", *LIMITS)}
    without_selection = draws["limit"] and draws["limit"] - 32
    total = fixed["mean_draws"]
    return {
        "n": fixed["n"],
        "mean_radius": fixed["mean_radius"],
        **{f"{name}_share": ratio(value, total) for name, value in draws.items()},
        "two_stage_share_without_n0": ratio(draws["two_stage"], fixed["n"]),
        "two_stage_over_limit": ratio(draws["two_stage"], draws["limit"]),
        "two_stage_over_limit_two_sided": ratio(draws["two_stage"], draws["limit_two_sided"]),
        "head_over_limit_without_selection": ratio(draws["two_stage_head"], without_selection),
        "two_stage_share_of_fixed_two_sided": ratio(draws_at("two_stage", fixed_two_sided["mean_radius"]), total),
    }


def decide(truth: Truth, radius: float, alpha: float, repeats: int, seed: int) -> dict[str, Any]:
    """Draws of each rule to decide a radius, and how many images claim it."""
    noise, generator = GaussianNoise(truth.sigma), np.random.default_rng(seed)
    p = np.repeat(truth.probabilities, repeats, axis=0)
    rule = SequentialRule((radius,), alpha, BUDGET)
    outcomes, draws = simulate(rule, noise, p, CleanPass(np.repeat(truth.clean_scores, repeats, axis=0)), generator)
    decisions = {
        "sequential": (outcomes.predictions != ABSTAIN, draws + 1),  # the clean pass counts as a draw
        "staged": decide_in_stages(p, radius, noise, alpha, generator),
        "uncut": decide_uncut(p, radius, noise, alpha, generator),
        "fixed": decide_fixed(p, radius, noise, alpha, generator),
    }
    top = truth.probabilities.max(1)
    wald = wald_draws(top, float(noise.probability_needed(radius)), alpha)
    joint = joint_draws(truth.probabilities, noise, radius, alpha)
    clear = np.flatnonzero(wald <= DECIDABLE)
    joint_clear = np.flatnonzero(joint <= DECIDABLE)
    sequential = draws.reshape(-1, repeats).mean(1) + 1
    return truth.about | {
        "radius": radius,
        "clearing": int(np.isfinite(wald).sum()),
        "compared": len(clear),
        "rules": {
            name: {
                "mean": float(taken.mean()),
                "median": float(np.median(taken)),
                "mean_compared": _mean(taken.reshape(-1, repeats)[clear]),
                "median_compared": _median(taken.reshape(-1, repeats)[clear]),
                "claimed": float(claims.mean()),
            }
            for name, (claims, taken) in decisions.items()
        },
        "wald": {"mean_compared": _mean(wald[clear]), "median_compared": _median(wald[clear])},
        "joint": {"mean_compared": _mean(joint[clear]), "median_compared": _median(joint[clear])},
        "joint_clearing": int(np.isfinite(joint).sum()),
        "joint_compared": len(joint_clear),
        "sequential_over_joint": float(sequential[joint_clear].mean() / joint[joint_clear].mean())
        if len(joint_clear)
        else None,
    }


def _mean(values: Any) -> float | None:
    return float(values.mean()) if values.size else None


def _median(values: Any) -> float | None:
    return float(np.median(values)) if values.size else None


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean certified radius against mean draws, one curve for each rule and limit."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip([*RULES, *LIMITS], ("C0o-", "C1o-", "C2o-", "C3o-", "C0:", "C1:")))
    for name, label in (RULES | LIMITS).items():
        points = result["rules"][name]
        draws, radii = ([point[key] for point in points] for key in ("mean_draws", "mean_radius"))
        axes.plot(draws, radii, styles[name], ms=4, lw=1.4, label=label)
    axes.set(xscale="log", xlim=(30, 20_000), ylim=(0, None))
    axes.set(xlabel="mean draws per image", ylabel="mean certified radius (l2, [0, 1] pixels)")
    axes.set(title=f"{result['name']}, sigma = {result['sigma']:g}")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def show(results: dict[str, Any], console: Console) -> None:
    """The results on the terminal."""

    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    for result in results["find"]:
        title = f"{result['name']}, sigma = {result['sigma']:g}: share of fixed n's draws for the same mean radius"
        shares = {"two-stage": "two_stage", "with a head": "two_stage_head", **{LIMITS[name]: name for name in LIMITS}}
        rows = [
            {"n": number(row["n"]), "mean radius": number(row["mean_radius"], 3)}
            | {label: number(row[f"{name}_share"], 2) for label, name in shares.items()}
            | {
                "two-stage / limit": number(row["two_stage_over_limit"], 2),
                "/ fixed n with two bounds": number(row["two_stage_share_of_fixed_two_sided"], 2),
            }
            for row in result["equal_radius"]
        ]
        print_table(console, title, rows)
    rows = [
        {
            "classifier": row["name"].split()[0],
            "sigma": f"{row['sigma']:g}",
            "r": f"{row['radius']:g}",
            "images": f"{row['compared']} of {row['images']}",
            **{name: number(rule["mean_compared"]) for name, rule in row["rules"].items()},
            "Wald": number(row["wald"]["mean_compared"]),
            "joint": number(row["joint"]["mean_compared"]),
            "sequential, all": number(row["rules"]["sequential"]["mean"]),
            "median": number(row["rules"]["sequential"]["median"]),
        }
        for row in results["decide"]
    ]
    print_table(console, f"Mean draws to decide a radius (alpha = {results['alpha']:g})", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=Path, help="table of counts: Parquet with original_index, sigma and counts")
    parser.add_argument("--every", type=int, default=20, help="use every n-th image of the table (default: 20)")
    parser.add_argument("--model", help="folder of a model to measure; without --counts, the shipped one")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="noise levels of the table")
    parser.add_argument("--alpha", type=float, default=0.001, help="level of the rules (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: 0)")
    quick = "one noise level, fewer images and repeats: under two minutes on two cores"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, and a picture beside it")
    args = parser.parse_args()
    if args.output:
        require_matplotlib()
    runs, budgets = (1000, BUDGETS[2::2]) if args.quick else (4000, BUDGETS)
    console = Console()
    sigmas = [DECIDED_SIGMA] if args.quick else args.sigma
    truths = read_counts(args.counts, args.every, sigmas) if args.counts else []
    model = args.model or (None if args.counts else "model_cards/mixed-noise-vit-nano-cifar10")
    if model:
        console.print("Measuring class frequencies ...")
        num_images, num_draws = (40, 300) if args.quick else (200, 500)
        truths.append(measure_model(model, DECIDED_SIGMA, num_images, num_draws, args.seed))
    console.print("Simulating the rules ...")
    find_results, decide_results = [], []
    for truth in truths:
        console.print(f"{truth.name}, sigma = {truth.sigma:g} ...")
        repeats = max(1, runs // len(truth.probabilities))
        find_results.append(find(truth, args.alpha, repeats, budgets, args.seed))
        radii = RADII if truth.sigma == DECIDED_SIGMA else RADII[:1]
        decide_results += [decide(truth, radius, args.alpha, repeats, args.seed) for radius in radii]
    command = command_line()
    if args.counts:  # where the table lies says nothing about the results
        command = command.replace(str(args.counts), args.counts.name)
    results = {
        "command": command,
        "alpha": args.alpha,
        "budget": BUDGET,
        "head_error": HEAD_ERROR,
        "runs_per_setting": runs,
        "seed": args.seed,
        "every": args.every if args.counts else None,
        "find": find_results,
        "decide": decide_results,
        "versions": package_versions(),
    }
    show(results, console)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, args.output)
        plot(
            next((row for row in find_results if row["sigma"] == DECIDED_SIGMA), find_results[0]),
            args.output.with_suffix(".png"),
        )


if __name__ == "__main__":
    main()
