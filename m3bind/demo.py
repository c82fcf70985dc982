"""The whole path on a simulated cohort, in the order in which a user would run the commands."""

import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console

from m3bind.bars import progress_bar
from m3bind.config import Config, load_config
from m3bind.data.phantom import make_cohort
from m3bind.errors import Interrupted, M3BindError
from m3bind.eval.tables import summary
from m3bind.files import claimed
from m3bind.measure import measured
from m3bind.processes import spawned_pool
from m3bind.resources import configs_dir
from m3bind.stages import SOURCES, Run
from m3bind.tracking import read_history

# Keep freed memory, in huge pages (glibc 2.35; older ones and other libraries pay no heed).
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2000000000"
    ":glibc.malloc.trim_threshold=2000000000"
)


def demo(config: Path | None, output: Path, overrides: list[str], *, resume: bool = False) -> None:
    """Make the cohort, pretrain, align, distil, evaluate and report, under ``output``.

    The cohort is made once; everything else is done anew unless ``resume``.
    """
    named = [setting for setting in overrides if setting.startswith("output=")]
    if named:
        raise M3BindError(f"{named[0]}: name the demo's folder with --output instead")
    settings = load_config(
        config or configs_dir() / "demo.yaml",
        [f"output={output}", f"data={output / 'cohort'}", *overrides],
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        "[bold]m3bind demo[/bold]: a simulated cohort. It proves the machinery, not medicine."
    )
    with claimed(output):
        _run_stages(settings, resume, console)


def _run_stages(settings: Config, resume: bool, console: Console) -> None:
    phantom, output = settings.phantom, Path(settings.output)
    with measured(output, "phantom"):
        make_cohort(
            Path(settings.data), seed=phantom.seed,
            train=phantom.train, val=phantom.val, test=phantom.test, workers=phantom.workers,
        )  # fmt: skip
    run = Run(settings)
    with measured(output, "pretrain", resume=resume):
        _pretrain_all(run, resume)
    run.align(resume=resume)
    run.distill(resume=resume)
    run.distill(control=True, resume=resume)
    for stage in SOURCES:
        run.embed(stage)
    metrics = run.evaluate()
    with console.status("drawing the report"):
        report = run.report()
    console.print(summary(metrics))
    console.print(f"metrics: {output / 'metrics.json'}")
    console.print(f"report:  {report}")


def _pretrain_all(run: Run, resume: bool) -> None:
    """Experts do not need each other: one process a core, one thread each, is fastest."""
    with spawned_pool(1) as pool:  # its memory ends with it
        pool.submit(_prepare_texts, run.config).result()
    workers = min(len(run.modalities), len(os.sched_getaffinity(0)))
    logs = [run.folder / "pretrain" / modality / "metrics.jsonl" for modality in run.modalities]
    if not resume:
        for log in logs:
            log.unlink(missing_ok=True)
    steps = run.config.pretrain.steps * len(logs)
    # Drawn anew although there was no step: a step of the volumes takes long.
    bar = progress_bar(total=steps, desc="pretrain, all", unit="step", miniters=0)
    # For the workers: their bars would write over each other; and memory that a step returns to
    # the system is faulted in again by the next, which is a large part of the time of a CT's.
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    # Volumes take longest: started last, they would leave the other cores idle.
    waiting = sorted(run.modalities, key=lambda m: run.dataset.modalities[m].kind != "volume")
    jobs: set[Future[None]] = set()
    try:
        with ThreadPoolExecutor(workers) as pool, bar:
            while jobs or waiting:
                # No more than there are workers: a job in the queue would start after a Ctrl-C.
                while waiting and len(jobs) < workers:
                    jobs.add(pool.submit(_pretrain_apart, run.config, waiting.pop(0), resume))
                done, jobs = wait(jobs, timeout=1, return_when=FIRST_COMPLETED)
                for job in done:
                    job.result()
                done_steps = sum(line["step"] for log in logs for line in read_history(log)[-1:])
                bar.update(done_steps - bar.n)
    except (KeyboardInterrupt, Interrupted):
        # A Ctrl-C reaches the workers too: each has written its checkpoint when the pool is closed.
        raise Interrupted(
            f"stopped while pretraining; m3bind demo --output {run.folder} --resume continues"
        ) from None
    except BrokenProcessPool:
        raise M3BindError(
            "a process that pretrained was killed, perhaps for lack of memory; close other "
            f"programs, then m3bind demo --output {run.folder} --resume continues"
        ) from None
    finally:
        del os.environ["TQDM_DISABLE"]


def _prepare_texts(settings: Config) -> None:
    Run(settings).prepare_texts()


def _pretrain_apart(settings: Config, modality: str, resume: bool) -> None:
    """In a process of its own, whose memory is free again when this returns."""
    with spawned_pool(1) as pool:
        pool.submit(_pretrain, settings, modality, resume).result()


def _pretrain(settings: Config, modality: str, resume: bool) -> None:
    settings.threads = 1
    run = Run(settings)
    run.pretrain(modality, resume=resume)
    run.prepare_features(modality)
