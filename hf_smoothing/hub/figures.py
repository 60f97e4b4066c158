"""Paragraphs of Markdown from results files: nothing in a card or README is typed in by hand that was measured."""

from collections.abc import Callable
from typing import Any

from ..reporting.report import render_report as markdown_table
from .count_head_figures import count_head, count_head_arms


def demo(results: dict[str, Any]) -> str:
    """The certified accuracy of a demo."""
    settings, (session,) = results["settings"], results["sessions"]
    lines = [
        f"Certified accuracy at sigma = {settings['sigmas'][0]:g}, alpha = {settings['alpha']:g}, over all "
        f"{results['num_records']} images (abstentions count as wrong; exact 95 % interval):",
        "",
        "| radius (l2, [0, 1] pixels) | certified accuracy | interval |",
        "|---|---|---|",
    ]
    for row in results["certified_accuracy"]:
        low, high = row["interval_95"]
        lines.append(f"| {row['radius']:g} | {row['share']:.1%} | {low:.1%} to {high:.1%} |")
    lines += [
        "",
        f"Forward passes an image, on average: {results['mean_draws']:.0f}"
        + (", steered by a count head" if settings["count_head"] else "")
        + ", where the usual protocol takes 100,100. "
        f"Time for everything, loading included: {results['seconds']:.0f} s ({session['device']}, "
        f"{session['num_threads']} threads, {settings['dtype']}). Guarantee: `{results['guarantee']}`. "
        f"Command: `{results['command']}` (seed {settings['seed']}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ").",
    ]
    return "\n".join(lines)


def training(results: dict[str, Any]) -> str:
    """How a model was trained, stage by stage."""
    before = training(results["continues"]) + "\n\nthen\n\n" if "continues" in results else ""
    after = (
        f"\n\nthen the mean of the last weights\n\n```bash\npython {results['averaged']}\n```"
        if "averaged" in results
        else ""
    )
    evaluation = _evaluation(results["settings"], results.get("evaluation"))
    return before + (
        f"{results['parameters']:,} parameters; {results['steps']:,} steps ({results['images_seen']:,} images) in "
        f"{results['seconds'] / 60:.0f} minutes on {results['device']} with {_workers(results)}; final "
        f"training loss {results['final_loss']:.3f}; seed {results['settings']['seed']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f".{evaluation}\n\n```bash\n{_launcher(results)} {results['command']}\n```{after}"
    )


def _evaluation(settings: dict[str, Any], found: dict[str, float] | None) -> str:
    if not found:
        return ""
    if "jensen_shannon" in found:  # of a count head
        return (
            f" On the {settings['eval_share']:.0%} of the images that were held out: Jensen-Shannon divergence "
            f"{found['jensen_shannon']:.4f} nats, another most frequent class for {found['top1_disagreement']:.1%}."
        )
    return (
        f" Accuracy on {settings['eval_samples']} images of `{settings['eval_split']}` by the majority of "
        f"{settings['eval_draws']} noisy copies (an estimate, no certificate): "
        + ", ".join(f"{share:.1%} at sigma {name.rpartition('_')[2]}" for name, share in found.items())
        + "."
    )


def _launcher(results: dict[str, Any]) -> str:
    processes = results.get("num_processes", 1)
    # `accelerate launch --cpu` starts one process, whatever it is told
    on_cpus = processes > 1 and results["device"].startswith("cpu")
    return f"torchrun --nproc_per_node {processes}" if on_cpus else "accelerate launch"


def _workers(results: dict[str, Any]) -> str:
    processes, threads = results.get("num_processes", 1), results["num_threads"]
    each = f"{threads} thread{'' if threads == 1 else 's'}"
    return each if processes == 1 else f"{processes} processes of {each}"


def benchmark(results: dict[str, Any]) -> str:
    """What a certificate costs."""

    def draws(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    rows = results["draws_to_decide"]
    lines = [
        f"Mean draws to decide a radius at sigma = {results['sigma']:g}, alpha = {results['alpha']:g}, for the "
        f"{rows[0]['images']} shipped images (budget {results['budget']:,} an image; simulated from class frequencies "
        f"measured with {results['measured_draws_an_image']:,} draws each):",
        "",
        "| radius | images that clear it | Wald's bound | sequential | over Wald's | uncut prior, n0 = 100 | "
        "Clopper-Pearson in stages | usual | sequential, all images |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['ours_clearing'] / row['wald']:.2f}" if row["wald"] else "-"
        wald, ours, uncut, staged, everything = (
            draws(row[name]) for name in ("wald", "ours_clearing", "uncut_clearing", "staged_clearing", "ours_all")
        )
        lines.append(
            f"| {row['radius']:g} | {row['of_them_decidable']} of {row['images_that_clear']} | {wald} | {ours} | {ratio} | "
            f"{uncut} | {staged} | {row['fixed']:,} | {everything} |"
        )
    engine = results["engine"]
    lines += [
        "",
        "Means are over the images that a quarter of the budget can decide by Wald's bound (the second column says how many "
        "of those that clear the radius); the last column is over all images, hopeless ones included. "
        "Wald's bound is that of a test which sees no more of a draw than whether it hit the top class; the sequential rule "
        "bounds the runner-up too, and can pass below it. "
        f"The engine makes {engine['engine_draws_per_second']:,.0f} draws/s, {engine['ratio']:.3f} of the bare forward pass "
        f"(median of {len(engine['ratios'])}); exact lattice noise changes its time by "
        f"{engine['seconds_with_lattice_over_floats'] - 1:+.1%}. {results['device']}, {results['num_threads']} threads, "
        f"{results['dtype']}. Command: `{results['command']}`"
        + (f", then `{engine['command']}`" if "command" in engine else "")
        + f" (seed {results['seed']}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ").",
    ]
    return "\n".join(lines)


def study(results: dict[str, Any]) -> str:
    """The arms of the transfer study."""

    def shown(one: dict[str, Any]) -> str:
        low, high = one["interval_95"]
        return f"{one['share']:.1%} ({low:.0%} to {high:.0%})"

    settings, arms = results["settings"], results["arms"]
    levels, certified = list(arms[0]["accuracy"]), list(arms[0]["certified_accuracy"])
    names = {"layernorm": "LayerNorm", "batchnorm": "BatchNorm"}
    lines = [
        f"Accuracy by the majority of {settings['eval_draws']} noisy copies on {settings['eval_samples']} test images "
        f"(exact 95 % interval), and certified accuracy at radius sigma/2 on {settings['certify_samples']} of them (alpha = "
        f"{settings['alpha']:g}, at most {settings['max_draws']} draws an image):",
        "",
        "| pretrained on | norm | finetuned on | "
        + " | ".join([*(f"sigma {level}" for level in levels), *(f"certified, sigma {level}" for level in certified)])
        + " |",
        "|---" * (3 + len(levels) + len(certified)) + "|",
    ]
    for arm in arms:
        cells = [arm["pretraining"], names[arm["norm"]], arm["finetuning"]]
        cells += [shown(arm["accuracy"][level]) for level in levels]
        cells += [f"{arm['certified_accuracy'][level][f'{float(level) / 2:g}']['share']:.0%}" for level in certified]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Differences on the same images, with 95 % intervals of the paired differences:", ""]
    for name, one in results["comparisons"].items():
        low, high = one["interval_95"]
        lines.append(f"- {name}: {one['difference']:+.1%} ({low:+.1%} to {high:+.1%})")
    lines += [
        "",
        f"{results['parameters']:,} parameters; {settings['pretrain_steps']:,} steps of {settings['batch_size']} images of "
        f"pretraining and {settings['finetune_steps']:,} of finetuning for each arm, {results['training_seconds'] / 60:.0f} "
        f"minutes of training in all on {results['device']} with {_workers(results)} a start. Command: "
        f"`{results['command']}` (seed {settings['seed']}, "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ").",
    ]
    return "\n".join(lines)


def training_speed(results: dict[str, Any]) -> str:
    """The speed of the training loop."""
    low, high = results["ratio_interval_95"]
    return (
        f"The training loop makes {results['images_per_second']:.0f} images/s, {results['ratio']:.3f} of a bare loop over "
        f"the same model and batches (median of {len(results['ratios'])}, its 95 % interval {low:.3f} to {high:.3f}; single "
        f"ones go from {min(results['ratios']):.2f} to {max(results['ratios']):.2f} on this machine; "
        f"{results['parameters']:,} parameters, "
        f"{results['device']}, {results['num_threads']} threads). Command: `{results['command']}` ("
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ")."
    )


def audit(results: dict[str, Any]) -> str:
    """What attacks on certificates came to."""
    settings = results["settings"]
    lines = [
        "| sigma | certificates | gradient steps | candidates | violations | changed beyond the radius | at times it: "
        "least, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["by_sigma"]:
        beyond = (
            "-"
            if row["least_norm_over_radius"] is None
            else f"{row['least_norm_over_radius']:.2f}, {row['median_norm_over_radius']:.2f}"
        )
        lines.append(
            f"| {row['sigma']:g} | {row['certificates']} | {row['gradient_steps']:,} | {row['candidates']:,} | "
            f"{row['violations']} | {row['changed_beyond']} | {beyond} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"At most {settings['steps']:,} gradient steps an image of "
            f"{settings['draws']} noisy cop{'y' if settings['draws'] == 1 else 'ies'} each, over "
            f"{settings['restarts']} starts and three step sizes; {settings['directions']} random directions; the nearest "
            f"image of another class; up to {settings['reach']:g} times the radius. {settings['n']:,} fresh draws judge a "
            f"candidate, at {settings['alpha']:g}; changes that they leave in doubt do not count. Of the certificates "
            f"themselves a share of at most {results['alpha']:g} may be wrong by chance. Command: `{results['command']}` "
            f"(seed {settings['seed']}, "
            + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
            + ").",
        ]
    )


def report(results: dict[str, Any]) -> str:
    """The table of a report, and how its runs were made."""
    made = {
        f"{by['command']}` ({', '.join(f'{name} {version}' for name, version in by.get('versions', {}).items())})"
        for by in (entry["made_by"] for entry in results["results"])
        if "command" in by
    }
    commands = [f"Made with `{command}." for command in sorted(made)]
    return "\n\n".join([markdown_table(results), *commands, f"Read with `{results['command']}`."])


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "training": training,
    "benchmark": benchmark,
    "report": report,
    "study": study,
    "training_speed": training_speed,
    "audit": audit,
    "count_head": count_head,
    "count_head_arms": count_head_arms,
}
