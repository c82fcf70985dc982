"""The words and forms that everything agrees on which writes, reads or draws samples."""

SPLITS = ("train", "val", "test")
KINDS = ("image2d", "volume", "signal")
KIND = {  # of the modalities that need no description
    "xray": "image2d",
    "ct": "volume",
    "retina": "image2d",
    "ecg": "signal",
    "pathology": "image2d",
}
MODALITIES = tuple(KIND)
EXTENSIONS = {"image2d": ("png", "jpg"), "volume": ("hu",), "signal": ("uv",)}  # in the shards
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
SIGNAL_HZ = 500  # the rate at which signals stand in the shards
