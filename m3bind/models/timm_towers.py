"""Image towers by name from timm, with random or local weights."""

from torch import Tensor

from m3bind.config import ImageTowerConfig, LoraConfig
from m3bind.data.preprocess import Preprocess
from m3bind.models.checkpoints import load_weights, read_weights
from m3bind.models.image import ImageTower


class TimmImage(ImageTower):
    """The pooled features of a timm model; its classifier is dropped."""

    def __init__(self, name: str, config: ImageTowerConfig, lora: LoraConfig | None) -> None:
        import timm

        options = dict(config.options)
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"timm:{name} with options {options}: {error}") from None
        data = timm.data.resolve_model_data_config(model)
        channels, *size = data["input_size"]
        if config.size is not None:
            size = config.size
        cut = data["crop_mode"] == "center"
        resize = round(min(size) / data["crop_pct"])
        preprocess = Preprocess(
            kind="image2d",
            size=tuple(size),
            channels=channels,
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation="bicubic" if data["interpolation"] == "bicubic" else "linear",
            fit="crop" if cut else "stretch" if data["crop_mode"] == "squash" else "pad",
            resize=resize if cut and resize > max(size) else None,
        )
        super().__init__(preprocess, int(model.num_features))
        if config.weights is not None:
            load_weights(
                model,
                read_weights(config.weights),
                source=config.weights,
                drop=("head.*", "fc.*", "classifier.*"),
            )
        self.trunk = model
        self.adapt(config, lora, tower=f"timm:{name}", loaded=config.weights is not None)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)
