"""Simulated 12-lead ECGs: beats as moving dipoles, projected on the leads.

Leads I and II and V1 to V6 are projections; III, aVR, aVL and aVF are derived from I and II after
noise, so Einthoven's law holds as in a real recorder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from m3bind.data.constants import SIGNAL_HZ
from m3bind.data.phantom.canvas import Floats, Simulated
from m3bind.data.phantom.ecg_heart import Heart, contract, make_heart
from m3bind.data.phantom.patients import Patient

LENGTH = 5000

_V_ANGLES = np.deg2rad([115.0, 94.0, 75.0, 58.0, 30.0, 0.0])
_V_GAINS = np.array([1.0, 1.4, 1.5, 1.5, 1.3, 1.1])
# Rows: I, II, V1..V6; columns: x, y, z.
PROJECTION = np.concatenate(
    [
        [[1.0, 0.0, 0.0], [0.5, 0.866, 0.0]],
        np.stack([np.cos(_V_ANGLES), 0.12 * np.ones(6), np.sin(_V_ANGLES)], 1) * _V_GAINS[:, None],
    ]
)


def simulate(p: Patient) -> Simulated:
    """A 12-lead ECG, int16 microvolt [12, 5000] at 500 Hz, and what its report may say."""
    rng = p.rng("image")
    h = make_heart(p, rng)
    r, ectopic = contract(h, rng)
    seconds = np.arange(LENGTH, dtype=np.float32) / SIGNAL_HZ
    dipole = _render(h.waves, seconds)
    if h.fibrillation:
        dipole += _fibrillation(rng)
    gains = _electrodes(rng)
    microvolt = 1000 * (PROJECTION * gains).astype(np.float32) @ dipole
    measured = _calibrate(p, h, microvolt, float(gains[1, 0]), rng)
    # Recorders are coupled by alternating current: no lead keeps a mean of its own.
    microvolt -= microvolt.mean(axis=1, keepdims=True)
    microvolt += _noise(rng, seconds)
    return Simulated(array=_derive(microvolt), facts=_facts(h, r, ectopic) | measured)


def _render(waves: list[tuple[float, float, np.ndarray]], seconds: Floats) -> Floats:
    """The sum of all waves, [3, T]; each is evaluated over five sigmas only."""
    out = np.zeros((3, LENGTH), np.float32)
    for time, sigma, vector in waves:
        lo = max(0, int((time - 5 * sigma) * SIGNAL_HZ))
        hi = min(LENGTH, int((time + 5 * sigma) * SIGNAL_HZ) + 1)
        if hi > lo:
            shape = np.exp(-0.5 * ((seconds[lo:hi] - time) / sigma) ** 2)
            out[:, lo:hi] += vector[:, None].astype(np.float32) * shape
    return out


def _fibrillation(rng: np.random.Generator) -> Floats:
    """Waves of fibrillating atria, [3, T], of changing rate and size."""
    f = rng.uniform(5.0, 8.0)
    phase = 2 * np.pi * np.cumsum(f + 1.2 * _slow(rng, 0.25)) / SIGNAL_HZ
    size = rng.uniform(0.06, 0.11) * (1 + 0.35 * _slow(rng, 0.4))
    wave = size * (np.sin(phase) + 0.35 * np.sin(2 * phase + 1) + 0.4 * _slow(rng, 0.03))
    return np.array([[-0.25], [0.6], [0.75]], np.float32) * wave


def _slow(rng: np.random.Generator, seconds: float) -> Floats:
    """Unit-variance noise, smooth over about `seconds`."""
    step = max(1, int(seconds * SIGNAL_HZ))
    coarse = rng.standard_normal(LENGTH // step + 3)
    line = np.interp(np.arange(LENGTH) / step, np.arange(len(coarse)), coarse)
    return (gaussian_filter1d(line, step / 3, truncate=2) * 1.25).astype(np.float32)


def _electrodes(rng: np.random.Generator) -> np.ndarray:
    """Gains by habitus and placement: of the whole body, the limbs, and each chest lead."""
    gain = np.exp(rng.normal(-0.1, 0.40))
    each = np.exp(rng.normal(0, 0.30, 8))
    each[:2] = np.exp(rng.normal(0, 0.35))
    return (gain * each)[:, None]


def _noise(rng: np.random.Generator, seconds: Floats) -> Floats:
    """Baseline wander, muscle and mains noise, in microvolt, of the eight independent leads."""
    wander = np.zeros((8, LENGTH), np.float32)
    size = np.exp(rng.normal(np.log(45), 0.8))
    for _ in range(3):
        f, phase = rng.uniform(0.1, 0.45), rng.uniform(0, 6.28, (8, 1))
        wander += size * rng.uniform(0.2, 2.0, (8, 1)) * np.sin(2 * np.pi * f * seconds + phase)
    level = np.exp(rng.normal(np.log(9), 0.5))
    muscle = rng.standard_normal((8, LENGTH), dtype=np.float32) * level
    mains = rng.uniform(0, 10, (8, 1)) * np.sin(2 * np.pi * 50 * seconds)
    return wander + muscle + mains.astype(np.float32)


def _derive(eight: Floats) -> np.ndarray:
    """I, II, V1..V6 in microvolt to twelve leads, int16, with III = II - I exactly."""
    eight = np.clip(eight, -16000, 16000)
    one, two = np.round(eight[0]), np.round(eight[1])
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.concatenate([np.stack(limb), np.round(eight[2:])]).round().astype(np.int16)


def _calibrate(
    p: Patient, h: Heart, microvolt: Floats, gain: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Scale the leads until a voltage criterion holds that defines the condition; measure it."""
    if p.label == "hypertension":  # Sokolow and Lyon: S in V1 plus R in V5 or V6 of 35 mm
        sokolow = (max(microvolt[6].max(), microvolt[7].max()) - microvolt[2].min()) / 100
        wanted = np.clip(sokolow, 37 + 4 * p.strength + rng.uniform(0, 4), 58)
        microvolt *= wanted / sokolow
        return {"sokolow_mm": round(float(wanted))}
    if p.label == "emphysema":  # P pulmonale: more than 2.5 mm in II
        a = np.deg2rad(h.p_axis)
        alone = 10 * h.p_mv * 1.05 * (0.5 * np.cos(a) + 0.866 * np.sin(a))
        wanted = np.clip(alone * gain, 2.7 + rng.uniform(0, 0.5), 4.5)
        microvolt[:2] *= wanted / (alone * gain)
        return {"p_mm": round(float(wanted), 1)}
    return {}


def _facts(h: Heart, r: np.ndarray, ectopic: str) -> dict[str, Any]:
    inside = r[(r >= 0) & (r < LENGTH / SIGNAL_HZ)]
    rate = 60 / np.diff(inside).mean() if len(inside) > 1 else h.rate
    facts: dict[str, Any] = {
        "rate": round(float(rate)),
        "qrs_ms": round(1000 * h.qrs),
        "qt_ms": round(1000 * float(h.qt)),
        "axis": round(h.axis),
        "ectopic": ectopic,
    }
    if not h.fibrillation and h.block != "third":
        facts["pr_ms"] = round(1000 * h.pr)
    if h.block:
        facts["degree"] = h.block
    return facts
