"""Options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Image classifier: a name on the Hub or a local folder.")]
Sigma = Annotated[float, typer.Option(help="Standard deviation of the noise, in [0, 1] pixels.")]
Alpha = Annotated[float, typer.Option(help="Probability that a certificate is wrong.")]
Method = Annotated[
    str,
    typer.Option(
        help="`sequential` draws until the question is settled, `fixed` is the usual protocol, `surrogate` asks a count "
        "head alone, `counts` only counts."
    ),
]
CountHead = Annotated[
    str | None,
    typer.Option(help="Count head, on the Hub or in a local folder: `sequential` looks where it says first."),
]
Delta = Annotated[
    float | None,
    typer.Option(help="Share of the images that a calibrated count head may be wrong about (`surrogate`)."),
]
NoiseResolution = Annotated[
    str,
    typer.Option(
        help="Where noise is added, and to whose pixels the radius belongs: `input` (the network's), `native` (the "
        "picture's own size), or pixels a side."
    ),
]
Denoiser = Annotated[
    str | None, typer.Option(help="Denoiser in front of the model, part of what is certified: `wiener`.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise: the same seed gives the same certificates.")]
BatchSize = Annotated[int, typer.Option(help="Draws in one forward pass.")]
