"""The electrical heart of simulated ECGs: its condition, its rhythm, its beats as moving dipoles.

Every wave (P, Q, R, S, ST, T) is a Gaussian in time with a direction in the body: x to the left,
y down, z to the front, in mV.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m3bind.data.phantom.patients import Patient


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


def make_heart(p: Patient, rng: np.random.Generator) -> Heart:
    """The heart of a patient, with what the condition makes of it."""
    h = Heart(rate=float(np.clip(rng.normal(77, 12), 54, 99)))
    h.variability = rng.uniform(0.015, 0.05)
    h.pr = rng.uniform(0.135, 0.185) + 0.0002 * (p.age - 60)
    h.qrs = rng.uniform(0.078, 0.102)
    h.axis = rng.uniform(-20, 85)
    h.p_mv, h.p_axis = rng.uniform(0.08, 0.15), rng.uniform(35, 70)
    h.r_mv, h.s_mv = rng.uniform(0.8, 2.0), rng.uniform(0.35, 1.0)
    h.t_mv = rng.uniform(0.22, 0.42)
    h.transition = rng.uniform(-0.35, -0.05)
    _sicken(h, p, rng)
    h.qt = 0.40 * np.sqrt(60 / h.rate) ** 0.7 + rng.normal(0, 0.012) + 0.6 * max(h.qrs - 0.1, 0)
    return h


def _sicken(h: Heart, p: Patient, rng: np.random.Generator) -> None:
    """The signs of each condition, as deviations from a normal heart."""
    s = p.strength
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


def contract(h: Heart, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Add the waves of all beats over -1..11 s; returns the times of R, and any ectopic beat."""
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
    return r, ectopic


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


def _premature(h: Heart, time: float, rng: np.random.Generator) -> None:
    """A wide, early beat from the right ventricle."""
    d = np.array([0.8, rng.uniform(-0.8, 0.8), -0.6])
    h.add(time, 0.028, 1.5, d)
    h.add(time + 0.05, 0.035, 0.8, d)
    h.add(time + 0.24, 0.06, -0.5, d)


def _atria(h: Heart, time: float) -> None:
    """A P wave whose onset is at `time` - PR before R: right atrium first, then the left."""
    a = np.deg2rad(h.p_axis)
    h.add(time + 0.035, 0.019, 0.75 * h.p_mv, [np.cos(a), np.sin(a), 0.45])
    h.add(time + 0.062, 0.021, 0.60 * h.p_mv, [np.cos(a), np.sin(a), -0.25])
