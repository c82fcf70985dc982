"""Twelve-lead ECGs kept as DICOM waveforms."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.readers.common import Reading, Unreadable
from m3bind.data.readers.dicom import AGAIN, identifiers, open_dicom
from m3bind.data.readers.ecg import add_lead, lead_of, microvolts, to_readings

PACKAGES = ("pydicom", "scipy")
# The last number of a lead's code, in SCP-ECG's (5.6.3-9-61) and in ISO 11073's (2:61) scheme.
_CODES = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF", 65: "-aVR"} | {
    n + 2: f"V{n}" for n in range(1, 7)
}
_SAMPLES = {"SB": "<i1", "UB": "<u1", "SS": "<i2", "US": "<u2", "SL": "<i4", "UL": "<u4"}


def read(path: Path, part: str = "") -> list[Reading]:
    """The windows of the original recording, not of its median beat.

    A channel's value is sample * sensitivity * correction factor + baseline, in its own unit.
    ``part`` is ``start:stop`` in seconds.
    """
    data = open_dicom(path)
    groups = list(data.get("WaveformSequence", None) or [])
    if not groups:
        raise Unreadable("the DICOM file holds no waveforms", "correct the manifest's path")
    original = [g for g in groups if g.get("WaveformOriginality", "ORIGINAL") == "ORIGINAL"]
    group = max(original or groups, key=lambda g: int(g.NumberOfWaveformSamples))
    stored = _stored(group)
    padding = _padding(group)
    steps = ["samples * sensitivity + baseline, in uV"]
    channels: dict[str, NDArray[np.float64]] = {}
    for index, channel in enumerate(group.ChannelDefinitionSequence):
        lead = _lead(channel)
        if lead is None:
            continue
        try:
            sensitivity = float(channel.ChannelSensitivity)
            unit = str(channel.ChannelSensitivityUnitsSequence[0].CodeValue)
        except (AttributeError, TypeError, ValueError, IndexError):
            raise Unreadable(
                f"lead {lead[0]} has no sensitivity: its unit is unknown", AGAIN
            ) from None
        sensitivity *= float(channel.get("ChannelSensitivityCorrectionFactor") or 1)
        values = stored[:, index] * sensitivity + float(channel.get("ChannelBaseline") or 0)
        if padding is not None:
            values[stored[:, index] == padding] = np.nan
        add_lead(channels, lead, values * microvolts(unit), steps)
    readings = to_readings(channels, float(group.SamplingFrequency), part, steps)
    readings[0].identifiers = identifiers(data)
    return readings


def _stored(group: Any) -> NDArray[Any]:
    kind = str(group.WaveformSampleInterpretation)
    if kind not in _SAMPLES:
        raise Unreadable(f"samples of the kind {kind} are not read", "export it as 16 bit (SS)")
    shape = int(group.NumberOfWaveformSamples), int(group.NumberOfWaveformChannels)
    size = shape[0] * shape[1] * np.dtype(_SAMPLES[kind]).itemsize
    content = bytes(group.WaveformData)
    if len(content) < size:
        raise Unreadable(f"the waveform was cut: {len(content)} of {size} bytes", AGAIN)
    return np.frombuffer(content[:size], _SAMPLES[kind]).reshape(shape)


def _padding(group: Any) -> int | None:
    value = group.get("WaveformPaddingValue")
    if isinstance(value, bytes):
        dtype = np.dtype(_SAMPLES[str(group.WaveformSampleInterpretation)])
        return int(np.frombuffer(value[: dtype.itemsize], dtype)[0])
    return None if value is None else int(value)


def _lead(channel: Any) -> tuple[str, int] | None:
    source = channel.ChannelSourceSequence[0]
    named = lead_of(str(source.get("CodeMeaning", "")))
    last = str(source.get("CodeValue", "")).replace(":", "-").rpartition("-")[2]
    return named or lead_of(_CODES.get(int(last), "") if last.isdigit() else "")
