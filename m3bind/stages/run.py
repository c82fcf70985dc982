"""A run: every command's work over one data set, in one folder."""

from pathlib import Path
from typing import Any

from m3bind.bars import progress_bar
from m3bind.errors import M3BindError
from m3bind.eval.evaluate import evaluate
from m3bind.eval.gallery import fetch_from
from m3bind.eval.metrics import assemble, load_metrics, save_metrics
from m3bind.eval.report import write_report
from m3bind.eval.store import save_stage
from m3bind.measure import measured, read_stages
from m3bind.stages.training import Training
from m3bind.trained import SOURCES, fingerprint


class Run(Training):
    """One configured run over one data set; each public method is the work of one command.

    Training runs on all ranks that torchrun started; evaluation in one process.
    """

    def embed(self, stage: str) -> None:
        """Embed the splits that the evaluation needs, with the encoders of one stage."""
        if stage not in SOURCES:
            raise M3BindError(f"--stage {stage}: the stages are {', '.join(SOURCES)}")
        with measured(self.folder, f"embed/{stage}"):
            experts = self.experts(stage)
            text = self.text_encoder(stage) if SOURCES[stage][1] else None
            self._prepare_texts(experts)
            # The few-shot probe fits on training images, and stage 2 leaves images as they are.
            for split in ("test",) if text else ("train", "test"):
                embedders = self._embedders(experts, split)
                bar = progress_bar(embedders, desc=f"embed {stage}, {split}")
                sets = [embedder(text, texts=split == "test") for embedder in bar]
                for item in sets:
                    item.origin = self.origin(stage, item.modality, split)
                save_stage(self.folder / "embeddings", stage, sets)

    def evaluate(self) -> dict[str, Any]:
        """Judge every stage that was embedded, and write ``metrics.json``."""
        settings = self.config.evaluation
        test, train = self.embedded("test"), self.embedded("train")
        if not test:
            raise M3BindError(
                f"no embeddings of a test split in {self.folder / 'embeddings'}: run m3bind embed "
                "first"
            )
        with measured(self.folder, "eval"):
            found = evaluate(
                test,
                train,
                seed=self.config.seed,
                num_permutations=settings.permutations,
                shots=settings.shots,
                num_shot_seeds=settings.seeds,
                progress=True,
            )
        stages = read_stages(self.folder)
        metrics = assemble(
            found,
            seconds={stage: entry["seconds"] for stage, entry in stages.items()},
            peak_rss_mib={stage: entry["peak_rss_mib"] for stage, entry in stages.items()},
            simulated=self.dataset.simulated,
            seed=self.config.seed,
            extra={"embeddings": fingerprint(test)},
        )
        save_metrics(metrics, self.folder / "metrics.json")
        return metrics

    def report(self) -> Path:
        """Write ``report.html`` from ``metrics.json``, the embeddings and the logs."""
        path, test = self.folder / "metrics.json", self.embedded("test")
        if not path.is_file():
            raise M3BindError(f"no {path}: run m3bind eval first")
        metrics = load_metrics(path)
        if metrics.get("embeddings") != fingerprint(test):
            raise M3BindError(
                f"{path} is of other embeddings than are there: run m3bind eval again"
            )
        logs = {f"pretraining, {m}": self.folder / "pretrain" / m for m in self.modalities} | {
            "stage 1, align": self.folder / "align",
            "stage 2, distil": self.folder / "distill",
            "control: stage 2 without stage 1": self.folder / "control",
        }
        histories = {title: folder / "metrics.jsonl" for title, folder in logs.items()}
        with measured(self.folder, "report"):
            return write_report(
                self.folder / "report.html",
                metrics,
                test=test,
                histories={title: path for title, path in histories.items() if path.is_file()},
                fetch=fetch_from(self.dataset.root),
                dataset=self.dataset.name,
                description=self._description(),
            )

    def _description(self) -> str:
        """What a reader must know of how the experts were made."""
        texts = {self._config_of(m).text.source for m in self.modalities}
        images = {self._config_of(m).image.source for m in self.modalities}
        said = (
            f"One expert a modality: image towers {', '.join(sorted(images))}, text towers "
            f"{', '.join(sorted(texts))}, all in {self.config.width} dimensions. "
            f"Agreement of stage 1: {self.config.align.agreement}."
        )
        experts = [self._config_of(modality) for modality in self.modalities]
        if any(e.text.cache for e in experts):
            layers = max(e.text.train_layers for e in experts)
            said += (
                " The text towers' frozen layers are computed once for each text and their hidden "
                f"states kept; their last {layers} layers and the heads train."
                if layers
                else " The text towers are frozen, computed once for each text; their heads train."
            )
        if any(e.image.cache for e in experts):
            said += (
                " Stages 1 and 2 train the heads on features of the frozen image trunks, computed "
                "once for each image, without augmentation."
            )
        return said
