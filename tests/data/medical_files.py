"""Synthetic files of each format, written by the formats' own libraries."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = {"PatientName": "Quisling^Zebediah", "PatientID": "MRN-7741902"}


def header(sop_class: str, modality: str, **values: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.Modality = modality
    data.PatientBirthDate, data.AccessionNumber = "19330214", "ACC5550123"
    data.InstitutionName = "St Elsewhere"
    for name, value in (PATIENT | values).items():
        setattr(data, name, value)
    return data


def put_pixels(data: FileDataset, stored: np.ndarray, photometric: str = "MONOCHROME2") -> None:
    data.Rows, data.Columns = stored.shape[:2]
    data.SamplesPerPixel = 3 if stored.ndim == 3 else 1
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored, data.HighBit = data.BitsAllocated, data.BitsAllocated - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = stored.tobytes()


def radiograph(path: Path, stored: np.ndarray, photometric: str, **values: Any) -> Path:
    data = header(pydicom.uid.ComputedRadiographyImageStorage, "CR", **values)
    put_pixels(data, stored, photometric)
    data.save_as(path, enforce_file_format=True)
    return path


def ct_slice(
    path: Path, stored: np.ndarray, position: tuple[float, float, float],
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0), series: str = "1.2.3", **values: Any,
) -> Path:  # fmt: skip
    defaults = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelSpacing": [0.8, 0.7]}
    data = header(pydicom.uid.CTImageStorage, "CT", **(defaults | values))
    data.SeriesInstanceUID = series
    data.ImagePositionPatient, data.ImageOrientationPatient = [*position], [*orientation]
    put_pixels(data, stored)
    data.save_as(path, enforce_file_format=True)
    return path


def body(shape: tuple[int, int, int] = (6, 32, 36), seed: int = 0) -> np.ndarray:
    """HU [D, H, W], different in every direction: air around a body with lung, fat and bone."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    _, rows, columns = shape
    hu = np.full(shape, -1000.0)
    inside = ((y - rows / 2) / (0.45 * rows)) ** 2 + ((x - columns / 2) / (0.42 * columns)) ** 2 < 1
    hu[inside] = 45 + 3 * z[inside]
    hu[inside & (x < columns / 2) & (abs(y - rows / 2) < rows / 5)] = -820
    hu[inside & (y > 0.8 * rows)] = 700
    hu += rng.normal(0, 12, shape)
    return np.maximum(np.rint(hu), -1024).astype(np.int16)


def limb_leads(signals: list[np.ndarray]) -> np.ndarray:
    """[12, T] in the usual order, whose III, aVR, aVL and aVF follow from I and II."""
    found = np.stack(signals)
    one, two = found[:2]
    found[2:6] = two - one, -(one + two) / 2, one - two / 2, two - one / 2
    return found


def waveform(
    path: Path, channels: dict[str, np.ndarray], rate: float, *, unit: str = "uV",
    sensitivity: float = 1.25, baseline: float = 0.0, padding: int | None = None,
) -> Path:  # fmt: skip
    """int16 samples a lead; a median beat of other values stands before the recording."""
    data = header(pydicom.uid.TwelveLeadECGWaveformStorage, "ECG")
    samples = np.stack(list(channels.values()), axis=1).astype("<i2")
    groups = []
    for kind, values in (("DERIVED", samples[:50] * 0 + 77), ("ORIGINAL", samples)):
        group = Dataset()
        group.WaveformOriginality, group.SamplingFrequency = kind, rate
        group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = len(channels), len(values)
        group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
        group.WaveformData = values.tobytes()
        if padding is not None:
            group.WaveformPaddingValue = np.int16(padding).tobytes()
        definitions = []
        for name in channels:
            channel, source, units = Dataset(), Dataset(), Dataset()
            source.CodeValue, source.CodingSchemeDesignator = "0", "SCPECG"
            source.CodeMeaning = f"Lead {name}"
            units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
            channel.ChannelSourceSequence = Sequence([source])
            channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = sensitivity, 1
            channel.ChannelBaseline = baseline
            channel.ChannelSensitivityUnitsSequence = Sequence([units])
            channel.WaveformBitsStored = 16
            definitions.append(channel)
        group.ChannelDefinitionSequence = Sequence(definitions)
        groups.append(group)
    data.WaveformSequence = Sequence(groups)
    data.save_as(path, enforce_file_format=True)
    return path
