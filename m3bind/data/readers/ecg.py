"""What ECG readers share: from channels to twelve leads in microvolt at 500 Hz, in 10 s windows."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.constants import LEADS, SIGNAL_HZ
from m3bind.data.readers.common import Reading, Unreadable, slices, thin

WINDOW_S = 10
_SHORTEST_S = 5
_SLOWEST_HZ = 100.0  # below it the QRS complex is lost
_MICROVOLT = {"uv": 1.0, "µv": 1.0, "μv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
_LEAD = {lead.casefold(): lead for lead in LEADS}
_NAME = r"(avr|avl|avf|v[1-6]|iii|ii|i)"
_WORD = re.compile(rf"(?<![a-z0-9]){_NAME}(?:neg)?(?![a-z0-9])")
# A minus that touches the lead's name alone, as in "Lead -aVR", but not in "Lead-aVR".
_INVERTED = re.compile(
    rf"\b(?:neg|negative|inv|inverted|minus|reversed)\b|\(-\)|{_NAME}neg\b|(?<!\S)\(?-{_NAME}"
)
# By Einthoven's law and Goldberger's definitions.
_LIMB: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "II": ("I + III", lambda uv: uv["I"] + uv["III"]),
    "aVR": ("-(I + II)/2", lambda uv: -(uv["I"] + uv["II"]) / 2),
    "aVL": ("(I - III)/2", lambda uv: (uv["I"] - uv["III"]) / 2),
    "aVF": ("(II + III)/2", lambda uv: (uv["II"] + uv["III"]) / 2),
}
# Of the difference, in uV and as a share of the lead. Recorders derive four limb leads from two,
# so that real recordings differ by rounding (1 uV); an inverted lead differs by twice itself.
_ROUNDING_UV, _SHARE = 20.0, 0.25


def lead_of(text: str) -> tuple[str, int] | None:
    """The lead that a channel's name means, and -1 if inverted: "Lead I (Einthoven)", "-aVR"."""
    text = re.sub(r"[\u2010-\u2015\u2212]", "-", text.casefold().replace("_", " "))
    found = _WORD.findall(text)
    if len(found) != 1:
        return None
    return _LEAD[found[0]], -1 if _INVERTED.search(text) else 1


def microvolts(unit: str) -> float:
    """How many microvolt one of ``unit`` is."""
    try:
        return _MICROVOLT[unit.strip().casefold()]
    except KeyError:
        raise Unreadable(f"the unit {unit!r} is not uV, mV or V", "correct the header") from None


def add_lead(
    channels: dict[str, NDArray[np.float64]],
    named: tuple[str, int],  # as `lead_of` gives it
    uv: NDArray[np.float64],
    steps: list[str],
) -> None:
    """Put a channel among the leads, upright; raises Unreadable where there is one already."""
    lead, sign = named
    if lead in channels:
        raise Unreadable(f"lead {lead} stands there twice", "leave one of them in the recording")
    channels[lead] = sign * uv
    if sign < 0:
        steps.append(f"lead {lead} turned: it stood there inverted (-{lead})")


def to_readings(
    channels: dict[str, NDArray[np.float64]],  # lead -> microvolt [samples]
    rate_hz: float,
    part: str,
    steps: list[str],
) -> list[Reading]:
    """The twelve leads in the order of `LEADS`, resampled, in whole windows of 10 s.

    A recording of 5 s to 10 s stays as long as it is; what is left after the last whole window of
    a longer one is not used. Raises Unreadable for what is no complete ECG.
    """
    from scipy.signal import resample_poly

    missing = [lead for lead in LEADS if lead not in channels]
    if missing:
        raise Unreadable(
            f"lead {', '.join(missing)} is missing (there are: {', '.join(channels) or 'none'})",
            "leave the recording out, or export it with all twelve leads",
        )
    uv = np.stack([channels[lead] for lead in LEADS])
    seconds = uv.shape[1] / rate_hz
    cut = slices(part, (seconds,), "seconds")
    if cut:
        start, stop = (round(end * rate_hz) for end in cut[0])
        uv, seconds = uv[:, start:stop], cut[0][1] - cut[0][0]
    if seconds < _SHORTEST_S:
        raise Unreadable(f"it lasts {seconds:.2f} s", f"at least {_SHORTEST_S} s are needed")
    if rate_hz < _SLOWEST_HZ:
        raise Unreadable(f"{rate_hz:g} samples a second", f"at least {_SLOWEST_HZ:g} are needed")
    for lead, values in zip(LEADS, uv, strict=True):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise Unreadable(
                f"lead {lead} has {len(wrong)} samples that are no numbers (NaN), the first at "
                f"{wrong[0] / rate_hz:.2f} s",
                "leave the recording out, or take a part without them (column part)",
            )
        if values.min() == values.max():
            raise Unreadable(f"lead {lead} is flat: its electrode was off", "leave it out")
    if rate_hz != SIGNAL_HZ:
        ratio = Fraction(SIGNAL_HZ / rate_hz).limit_denominator(1000)
        # "line": the ends are not 0 mV, and a filter that takes them for it would ring there.
        uv = resample_poly(uv, ratio.numerator, ratio.denominator, axis=1, padtype="line")
        steps.append(f"{rate_hz:g} to {SIGNAL_HZ} Hz by {ratio.numerator}/{ratio.denominator}")
    _check_limb_leads(uv)
    whole = np.rint(uv)
    if np.abs(whole).max() > 32767:
        raise Unreadable(
            f"up to {np.abs(whole).max() / 1000:.0f} mV cannot be an ECG", "correct its units"
        )
    return _windows(whole.astype(np.int16), rate_hz, part, steps)


def _check_limb_leads(uv: NDArray[np.float64]) -> None:
    """Raises Unreadable where the six limb leads contradict each other."""
    whole = uv.shape[1] // SIGNAL_HZ * SIGNAL_HZ
    # Second by second and its median: neither drift nor a loose electrode's artefact decides.
    beats = uv[:6, :whole].reshape(6, -1, SIGNAL_HZ)
    leads = dict(zip(LEADS[:6], beats - beats.mean(axis=2, keepdims=True), strict=True))
    for lead, (formula, derive) in _LIMB.items():
        derived = derive(leads)
        differs, *sizes = (_rms(v) for v in (leads[lead] - derived, leads[lead], derived))
        if differs > _ROUNDING_UV + _SHARE * max(sizes):
            raise Unreadable(
                f"lead {lead} is not {formula}: they differ by {differs:.0f} uV (rms)",
                "look whether one of these leads is inverted, and call it so (-aVR), or stands "
                "under another's name; or leave the recording out",
            )


def _rms(values: NDArray[np.float64]) -> float:
    """Of the median second."""
    return float(np.median(np.sqrt((values**2).mean(axis=-1))))


def _windows(uv: NDArray[np.int16], rate_hz: float, part: str, steps: list[str]) -> list[Reading]:
    length = WINDOW_S * SIGNAL_HZ
    all_starts = list(range(0, max(uv.shape[1] - length, 0) + 1, length))
    starts = thin(all_starts)
    where = {"source_rate_hz": rate_hz} | ({"part": part} if part else {})
    return [
        Reading(
            array=uv[:, start : start + length],
            part=f"t{start // SIGNAL_HZ:05d}" if len(all_starts) > 1 else "",
            steps=list(steps),
            where=where | {"start_s": start / SIGNAL_HZ, "windows": len(all_starts)},
        )
        for start in starts
    ]
