"""What ECG readers share: from channels to twelve leads in microvolt at 500 Hz, in 10 s windows."""

import re
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from m3bind.data.constants import LEADS, SIGNAL_HZ
from m3bind.data.readers.common import Reading, Unreadable, slices, thin

WINDOW_S = 10
_SHORTEST_S = 5
_SLOWEST_HZ = 100.0  # below it the QRS complex is lost
_MICROVOLT = {"uv": 1.0, "µv": 1.0, "μv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
_LEAD = {lead.casefold(): lead for lead in LEADS}
_WORD = re.compile(r"(?<![a-z0-9])(avr|avl|avf|v[1-6]|iii|ii|i)(?![a-z0-9])", re.IGNORECASE)


def lead_of(text: str) -> str | None:
    """The lead that a channel's name means: "MDC_ECG_LEAD_AVR", "Lead I (Einthoven)", "v1"."""
    found = _WORD.findall(text.replace("_", " "))
    return _LEAD[found[0].casefold()] if len(found) == 1 else None


def microvolts(unit: str) -> float:
    """How many microvolt one of ``unit`` is."""
    try:
        return _MICROVOLT[unit.strip().casefold()]
    except KeyError:
        raise Unreadable(f"the unit {unit!r} is not uV, mV or V", "correct the header") from None


def add_lead(channels: dict[str, NDArray[np.float64]], lead: str, uv: NDArray[np.float64]) -> None:
    """Put a channel among the leads; raises Unreadable where there is one of that name."""
    if lead in channels:
        raise Unreadable(f"lead {lead} stands there twice", "leave one of them in the recording")
    channels[lead] = uv


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
    whole = np.rint(uv)
    if np.abs(whole).max() > 32767:
        raise Unreadable(
            f"up to {np.abs(whole).max() / 1000:.0f} mV cannot be an ECG", "correct its units"
        )
    return _windows(whole.astype(np.int16), rate_hz, part, steps)


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
