"""Simulated 12-lead ECGs: beats as moving dipoles, projected on the leads.

Every wave (P, Q, R, S, ST, T) is a Gaussian in time with a direction in the body: x to the left,
y down, z to the front, in mV. Leads I and II and V1 to V6 are projections; III, aVR, aVL and aVF
are derived from I and II after noise, so Einthoven's law holds as in a real recorder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from m3bind.data.phantom.canvas import Floats, Simulated
from m3bind.data.phantom.patients import Patient

RATE_HZ = 500
LENGTH = 5000
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

_V_ANGLES = np.deg2rad([115.0, 94.0, 75.0, 58.0, 30.0, 0.0])
_V_GAINS = np.array([1.0, 1.4, 1.5, 1.5, 1.3, 1.1])
# Rows: I, II, V1..V6; columns: x, y, z.
PROJECTION = np.concatenate(
    [
        [[1.0, 0.0, 0.0], [0.5, 0.866, 0.0]],
        np.stack([np.cos(_V_ANGLES), 0.12 * np.ones(6), np.sin(_V_ANGLES)], 1) * _V_GAINS[:, None],
    ]
)


@dataclass(kw_only=True, slots=True)
class Heart:
    """The electrical heart of one patient. Times in seconds, voltages in mV, angles in degrees."""

    rate: float
    variability: float = 0.03
    pr: float = 0.16
    qrs: float = 0.090
    qt: float = 0.39
    axis: float = 45.0
    p_mv: float = 0.12
    p_axis: float = 55.0
    r_mv: float = 1.25
    s_mv: float = 0.55
    t_mv: float = 0.32
    t_turn: float = 0.0  # 180 turns T against R
    st_mv: float = 0.0
    transition: float = -0.2  # anterior part of R: lower is later transition
    inferior_q: float = 0.0
    left_bundle: bool = False
    fibrillation: bool = False
    block: str = ""
    waves: list[tuple[float, float, np.ndarray]] = field(default_factory=list)

    def add(self, time: float, sigma: float, mv: float, direction: Any) -> None:
        """One Gaussian wave."""
        self.waves.append((time, sigma, mv * np.asarray(direction, float)))


def _patient_heart(p: Patient, rng: np.random.Generator) -> Heart:
    s = p.strength
    h = Heart(rate=float(np.clip(rng.normal(77, 12), 54, 99)))
    h.variability = rng.uniform(0.015, 0.05)
    h.pr = rng.uniform(0.135, 0.185) + 0.0002 * (p.age - 60)
    h.qrs = rng.uniform(0.078, 0.102)
    h.axis = rng.uniform(-20, 85)
    h.p_mv, h.p_axis = rng.uniform(0.08, 0.15), rng.uniform(35, 70)
    h.r_mv, h.s_mv = rng.uniform(0.8, 2.0), rng.uniform(0.35, 1.0)
    h.t_mv = rng.uniform(0.22, 0.42)
    h.transition = rng.uniform(-0.35, -0.05)
    if p.label == "heart_failure":
        h.left_bundle = True
        h.qrs = 0.125 + 0.035 * s + rng.uniform(-0.005, 0.012)
        h.rate = float(np.clip(rng.normal(84, 12), 58, 112))
        h.variability *= 0.5
        h.axis = rng.uniform(-35, 30)
        h.r_mv *= 0.72
    elif p.label == "hypertension":
        h.axis = rng.uniform(-25, 25)
        h.r_mv = 1.7 + 0.5 * s + rng.uniform(0, 0.3)
        h.s_mv = 0.8 + 0.4 * s
        h.st_mv = 0.09 + 0.13 * s
        h.t_turn, h.t_mv = 180.0, 0.24 + 0.14 * s
        h.qrs += 0.008
    elif p.label == "diabetes":
        h.rate = 96 + 14 * s + rng.uniform(-4, 6)
        h.variability = 0.006
        h.inferior_q = 0.45 + 0.35 * s
        h.t_mv = 0.05
        h.axis = rng.uniform(-10, 30)
    elif p.label == "atrial_fibrillation":
        h.fibrillation = True
        h.rate = float(np.clip(rng.normal(78, 10) + 36 * (s - 0.6), 55, 135))
        h.variability = rng.uniform(0.17, 0.27)
        h.p_mv = 0.0
    elif p.label == "emphysema":
        h.p_mv, h.p_axis = 0.25 + 0.09 * s, rng.uniform(72, 85)
        h.axis = 88 + 18 * s + rng.uniform(-4, 8)
        h.r_mv = rng.uniform(0.55, 0.8)
        h.s_mv *= 0.9
        h.transition = rng.uniform(-0.75, -0.55)
        h.t_mv *= 0.7
        h.rate = float(np.clip(rng.normal(84, 9), 60, 105))
    elif p.label == "sarcoidosis":
        h.block = {"mild": "first", "moderate": "second", "severe": "third"}[p.severity]
        if h.block == "first":
            h.pr = rng.uniform(0.25, 0.34)
            h.rate = min(h.rate, 82.0)
        elif h.block == "second":
            h.pr = rng.uniform(0.18, 0.24)
    h.qt = 0.40 * np.sqrt(60 / h.rate) ** 0.7 + rng.normal(0, 0.012) + 0.6 * max(h.qrs - 0.1, 0)
    return h


def _rhythm(h: Heart, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times of R waves, of P waves, and the RR interval before each R, over -1..11 s."""
    num = int(13 * h.rate / 60) + 6
    rr = 60 / h.rate * np.clip(1 + h.variability * rng.standard_normal(num), 0.45, 1.8)
    if not h.fibrillation:
        breath = np.cumsum(rr) * 2 * np.pi * 0.23
        rr *= 1 + h.variability * np.sin(breath + rng.uniform(0, 6.28))
    atria = -1.2 + rng.uniform(0, 0.8) + np.cumsum(rr)
    if h.fibrillation:
        return atria, np.empty(0), rr
    pr = np.full(num, h.pr)
    conducted = np.ones(num, bool)
    if h.block == "second":
        group = int(rng.integers(2, 5))  # 2:1, 3:2 or 4:3
        place = (np.arange(num) + rng.integers(group)) % group
        conducted = place != group - 1
        pr = h.pr + 0.055 * place * (group > 2)
    elif h.block == "third":
        escape = 60 / rng.uniform(34, 46)
        r = -1.2 + rng.uniform(0, escape) + escape * np.arange(12)
        h.rate = 60 / escape
        h.qrs = rng.uniform(0.10, 0.13)
        return r, atria, np.full(12, escape)
    r = (atria + pr)[conducted]
    return r, atria, np.diff(r, prepend=r[0] - 60 / h.rate)


def _beat(h: Heart, r: float, rr: float, scale: float) -> None:
    """Ventricular waves of a beat at time r. QRS runs from r - 0.45 qrs to r + 0.55 qrs."""
    w = h.qrs
    a = np.deg2rad(h.axis)
    main = np.array([np.cos(a), np.sin(a), h.transition])
    if h.left_bundle:
        # Slow spread from right to left through muscle: broad, notched, no septal q.
        left = np.array([0.95 * np.cos(a), 0.95 * np.sin(a), -0.75])
        h.add(r - 0.15 * w, 0.15 * w, 0.85 * h.r_mv * scale, left)
        h.add(r + 0.22 * w, 0.16 * w, 0.90 * h.r_mv * scale, left)
        turn = -0.38 * left
        h.add(r + 0.62 * w, 0.30 * w, 0.35 * h.r_mv * scale, turn)
        t_dir, t_mv = turn * 1.5, 0.40 * h.r_mv
    else:
        q = -np.array([0.6, 0.15, -0.8])
        h.add(r - 0.28 * w, 0.09 * w, 0.16 * h.r_mv, q)
        if h.inferior_q:
            h.add(r - 0.26 * w, 0.16 * w, 1.1 * h.inferior_q, [0.25, -1.0, 0.0])
        h.add(r, 0.13 * w, h.r_mv * scale, main)
        basal = np.array([-0.35 * np.cos(a), -0.25, -0.8])
        h.add(r + 0.27 * w, 0.11 * w, h.s_mv * scale, basal)
        turn = np.deg2rad(h.t_turn)
        b = np.deg2rad(0.5 * h.axis + 22)
        t_dir, t_mv = np.array([np.cos(b), np.sin(b), 0.55]), h.t_mv
        if h.t_turn:
            t_dir = np.array([-np.cos(a), -np.sin(a), 0.75])
            h.add(r + 0.5 * w + 0.06, 0.045, h.st_mv, t_dir)
    # QT here ends where T has fallen to a few percent.
    fast = min(1.0, (rr / 0.8) ** 0.4)
    end = r - 0.45 * w + h.qt * fast
    width = 0.052 * fast
    h.add(end - 2.0 * width, width, 0.8 * t_mv, t_dir)
    h.add(end - 3.0 * width, 1.3 * width, 0.35 * t_mv, t_dir)


def _atria(h: Heart, time: float) -> None:
    """A P wave whose onset is at `time` - PR before R: right atrium first, then the left."""
    a = np.deg2rad(h.p_axis)
    h.add(time + 0.035, 0.019, 0.75 * h.p_mv, [np.cos(a), np.sin(a), 0.45])
    h.add(time + 0.062, 0.021, 0.60 * h.p_mv, [np.cos(a), np.sin(a), -0.25])


def simulate(p: Patient) -> Simulated:
    """A 12-lead ECG, int16 microvolt [12, 5000] at 500 Hz, and what its report may say."""
    rng = p.rng("image")
    h = _patient_heart(p, rng)
    r, atria, rr = _rhythm(h, rng)
    onset = 0.45 * h.qrs  # PR is measured from the onset of P to the onset of QRS
    ectopic = ""
    extra = int(rng.integers(3, len(r) - 3)) if rng.uniform() < 0.15 and not h.block else -1
    for i, (time, before) in enumerate(zip(r, rr, strict=True)):
        if i == extra:
            ectopic = "premature ventricular beat"
            _premature(h, time - 0.25 * before, rng)
        else:
            _beat(h, time, before, 1 + 0.03 * rng.standard_normal())
    for time in atria:
        _atria(h, time - onset)

    seconds = np.arange(LENGTH, dtype=np.float32) / RATE_HZ
    dipole = _render(h.waves, seconds)
    if h.fibrillation:
        f = rng.uniform(5.0, 8.0)
        phase = 2 * np.pi * np.cumsum(f + 1.2 * _slow(rng, 0.25)) / RATE_HZ
        size = rng.uniform(0.06, 0.11) * (1 + 0.35 * _slow(rng, 0.4))
        wave = size * (np.sin(phase) + 0.35 * np.sin(2 * phase + 1) + 0.4 * _slow(rng, 0.03))
        dipole += np.array([[-0.25], [0.6], [0.75]], np.float32) * wave

    gains = _electrodes(rng)
    microvolt = 1000 * (PROJECTION * gains).astype(np.float32) @ dipole
    measured = _calibrate(p, h, microvolt, float(gains[1, 0]), rng)
    # Recorders are coupled by alternating current: no lead keeps a mean of its own.
    microvolt -= microvolt.mean(axis=1, keepdims=True)
    microvolt += _noise(rng, seconds)
    return Simulated(array=_derive(microvolt), facts=_facts(h, r, ectopic) | measured)


def _premature(h: Heart, time: float, rng: np.random.Generator) -> None:
    """A wide, early beat from the right ventricle."""
    d = np.array([0.8, rng.uniform(-0.8, 0.8), -0.6])
    h.add(time, 0.028, 1.5, d)
    h.add(time + 0.05, 0.035, 0.8, d)
    h.add(time + 0.24, 0.06, -0.5, d)


def _render(waves: list[tuple[float, float, np.ndarray]], seconds: Floats) -> Floats:
    """The sum of all waves, [3, T]; each is evaluated over five sigmas only."""
    out = np.zeros((3, LENGTH), np.float32)
    for time, sigma, vector in waves:
        lo = max(0, int((time - 5 * sigma) * RATE_HZ))
        hi = min(LENGTH, int((time + 5 * sigma) * RATE_HZ) + 1)
        if hi > lo:
            shape = np.exp(-0.5 * ((seconds[lo:hi] - time) / sigma) ** 2)
            out[:, lo:hi] += vector[:, None].astype(np.float32) * shape
    return out


def _slow(rng: np.random.Generator, seconds: float) -> Floats:
    """Unit-variance noise, smooth over about `seconds`."""
    step = max(1, int(seconds * RATE_HZ))
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
    inside = r[(r >= 0) & (r < LENGTH / RATE_HZ)]
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
