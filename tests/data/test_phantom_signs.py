"""The simulated examinations measured as a physician would, without asking the simulator."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import find_peaks

from m3bind.data.constants import LEADS
from m3bind.data.phantom import make_patient, simulate


def examine(modality: str, count: int, seed: int = 21):
    """(patient, simulated) of the first patients of a split."""
    patients = [make_patient(modality, "test", i, seed) for i in range(count)]
    return [(p, simulate(p)) for p in patients]


@pytest.fixture(scope="module")
def ecgs():
    return examine("ecg", 140)


def lead(signal, name):
    return signal[LEADS.index(name)].astype(float) / 1000


def r_peaks(signal):
    """Samples of the QRS complexes, from the slopes of all leads together (after Pan, Tompkins)."""
    slope = np.abs(np.diff(gaussian_filter(signal.astype(float), (0, 3)), axis=1)) ** 2
    slope /= slope.max(axis=1, keepdims=True)
    energy = gaussian_filter(slope.sum(0), 22)
    peaks, _ = find_peaks(energy, height=0.3 * np.quantile(energy, 0.99), distance=140)
    return peaks


def test_leads_obey_einthoven(ecgs):
    for _, ecg in ecgs:
        one, two, three, avr, avl, avf = (ecg.array[i].astype(int) for i in range(6))
        assert np.array_equal(one + three, two)
        assert np.abs(avr + (one + two) / 2).max() <= 1
        assert np.abs(avl - (one - three) / 2).max() <= 1
        assert np.abs(avf - (two + three) / 2).max() <= 1


def test_reported_rate_is_the_measured_one(ecgs):
    wrong = 0
    for _, ecg in ecgs:
        peaks = r_peaks(ecg.array)
        rate = 60 * 500 / np.diff(peaks).mean()
        wrong += abs(rate - ecg.facts["rate"]) > 4
    assert wrong <= 0.05 * len(ecgs)


def test_rates_and_intervals_are_in_range(ecgs):
    for p, ecg in ecgs:
        facts = ecg.facts
        assert (30 if p.label == "sarcoidosis" else 50) <= facts["rate"] <= 145, p.label
        if p.label == "none":
            assert 50 <= facts["rate"] <= 105
            assert 120 <= facts["pr_ms"] <= 200 and 70 <= facts["qrs_ms"] <= 110
            assert 320 <= facts["qt_ms"] <= 460
        if p.label == "heart_failure":
            assert facts["qrs_ms"] >= 120
        if p.label == "diabetes":
            assert facts["rate"] >= 98
        if p.label == "sarcoidosis" and facts["degree"] == "first":
            assert facts["pr_ms"] > 200


def test_fibrillation_is_irregular_and_sinus_rhythm_is_not(ecgs):
    spread = {"atrial_fibrillation": [], "none": [], "diabetes": []}
    for p, ecg in ecgs:
        if p.label in spread and not ecg.facts["ectopic"]:
            intervals = np.diff(r_peaks(ecg.array))
            spread[p.label].append(intervals.std() / intervals.mean())
    assert np.quantile(spread["atrial_fibrillation"], 0.1) > 0.10
    assert np.quantile(spread["none"], 0.9) < 0.09
    assert np.quantile(spread["diabetes"], 0.9) < 0.03


def average_beat(signal):
    """The median beat, 0.3 s to either side of R."""
    peaks = [k for k in r_peaks(signal) if 150 < k < 4850]
    return np.median([signal[:, k - 150 : k + 150] for k in peaks], axis=0)


def test_p_waves_precede_qrs_in_sinus_rhythm_only(ecgs):
    """The median of the 100 to 240 ms before R rises where P waves are, and averages out else."""
    size = {"none": [], "emphysema": [], "atrial_fibrillation": []}
    for p, ecg in ecgs:
        if p.label in size:
            beat = average_beat(ecg.array)[LEADS.index("II")]
            before = beat[30:118]
            size[p.label].append((before.max() - np.median(before)) / 1000)
    assert np.median(size["emphysema"]) > 0.18
    assert np.median(size["none"]) > 2 * np.median(size["atrial_fibrillation"])


def test_left_ventricular_hypertrophy_meets_its_voltage_criterion(ecgs):
    for p, ecg in ecgs:
        if p.label == "hypertension":
            beat = average_beat(ecg.array) / 1000
            base = np.median(beat, axis=1)
            r = max(beat[LEADS.index(v)].max() - base[LEADS.index(v)] for v in ("V5", "V6"))
            s = base[LEADS.index("V1")] - beat[LEADS.index("V1")].min()
            assert 10 * (r + s) > 30
            assert abs(10 * (r + s) - ecg.facts["sokolow_mm"]) < 9


def test_bundle_branch_block_is_wider_than_normal(ecgs):
    """Width at a tenth of the energy of the slopes of the median beat."""

    def width(ecg):
        slope = np.abs(np.diff(average_beat(ecg.array)[6:], axis=1)).sum(0)
        slope = gaussian_filter(slope, 2)
        return 2 * np.flatnonzero(slope > 0.2 * slope.max()).size

    wide = [width(e) for p, e in ecgs if p.label == "heart_failure"]
    narrow = [width(e) for p, e in ecgs if p.label == "none"]
    assert np.median(wide) > 1.3 * np.median(narrow)


def test_pathological_q_waves_of_old_infarcts_are_inferior(ecgs):
    """Before R, III is well below its base line where an infarct is told."""
    depth = {"diabetes": [], "none": []}
    for p, ecg in ecgs:
        if p.label in depth:
            beat = average_beat(ecg.array)
            avf = beat[LEADS.index("aVF")]
            depth[p.label].append((np.median(avf) - avf[110:150].min()) / np.ptp(avf))
    assert np.median(depth["diabetes"]) > 2 * np.median(depth["none"])


@pytest.fixture(scope="module")
def cts():
    return examine("ct", 70)


def lungs(hu):
    """Air inside the body: below -600 HU, and not connected to the border of the slice."""
    from scipy.ndimage import label

    air = hu < -600
    marks, _ = label(air, np.ones((3, 3, 3)))
    border = set(np.unique(marks[:, [0, -1]])) | set(np.unique(marks[:, :, [0, -1]]))
    return air & ~np.isin(marks, list(border))


def test_hounsfield_units_are_those_of_the_tissues(cts):
    for p, ct in cts:
        hu = ct.array
        assert hu.min() >= -1024 and hu.max() <= 3071
        assert -1024 <= np.median(hu[:, :3, :3]) <= -960  # air around the patient
        inside = hu[lungs(hu)]
        assert inside.size > 8000
        assert -990 < np.median(inside) < -720, p.label
        assert (hu > 300).sum() > 300  # bone
        tissue = hu[(hu > -150) & (hu < 150)]
        low, high = np.quantile(tissue, [0.1, 0.9])
        assert low < -60 and 30 < high < 140  # fat, and muscle with organs


def test_low_attenuation_area_is_that_of_emphysema(cts):
    share = {"emphysema": [], "none": [], "sarcoidosis": []}
    for p, ct in cts:
        if p.label in share:
            inside = gaussian_filter(ct.array.astype(float), 0.6)[lungs(ct.array)]
            share[p.label].append((inside < -920).mean())
    assert min(share["emphysema"]) > 0.08
    assert max(share["none"] + share["sarcoidosis"]) < 0.08


def test_calcium_is_heaviest_in_diabetes(cts):
    """Voxels above every contrast agent, before the spine."""
    score = {"diabetes": [], "none": []}
    for p, ct in cts:
        if p.label in score:
            middle = ct.array[12:25, 12:52, 20:62]
            score[p.label].append(int((middle > 450).sum()))
    assert np.median(score["diabetes"]) > np.median(score["none"]) + 10


def test_the_nodule_lies_on_the_reported_side(cts):
    """Mean density of the lung fields' middles, left against right, in patients with a tumour."""
    right = 0
    tumours = [(p, ct) for p, ct in cts if p.label == "lung_tumour"]
    for p, ct in tumours:
        dense = gaussian_filter((ct.array > -300).astype(float), 1.0) > 0.5
        air = lungs(ct.array)
        columns = np.flatnonzero(air.any((0, 1)))
        middle = (columns[0] + columns[-1]) // 2
        # Solid voxels with lung on both sides of them in the row are within a lung.
        within = dense & (np.cumsum(air, 2) > 2) & (np.cumsum(air[:, :, ::-1], 2)[:, :, ::-1] > 2)
        left_side = within[:, :, middle + 8 :].sum() / max(1, air[:, :, middle + 8 :].sum())
        right_side = within[:, :, : middle - 8].sum() / max(1, air[:, :, : middle - 8].sum())
        right += (left_side > right_side) == (p.side == "left")
    assert right >= 0.6 * len(tumours)


def test_the_disc_is_on_the_nasal_side():
    """In a right eye the optic disc, the palest small spot, is on the image's right."""
    good = []
    for p, fundus in examine("retina", 60):
        if p.label in ("none", "atrial_fibrillation"):
            # Blue, as the disc is whiter than the retina; a ratio, as light is uneven.
            blue = gaussian_filter(fundus.array[..., 2].astype(float), 3) + 8
            spot = np.log(blue / gaussian_filter(blue, 9))
            y, x = np.mgrid[:160, :160]
            spot[np.hypot(x - 79.5, y - 79.5) > 64] = -1
            column = np.unravel_index(spot.argmax(), spot.shape)[1]
            good.append((column > 79.5) == (p.side == "right"))
    assert len(good) == 20 and np.mean(good) >= 0.9


def test_films_show_two_lungs_and_a_mediastinum():
    """Averaged over patients: two dark fields beside a bright middle, diaphragm below."""
    mean = np.mean([x.array for p, x in examine("xray", 56) if p.label == "none"], axis=0)
    row = mean[60:90].mean(0)
    middle = row[70:90].max()
    assert middle > 1.15 * row[40:60].mean() and middle > 1.15 * row[100:125].mean()
    assert mean[135:150, 40:60].mean() > mean[60:90, 40:60].mean()


def test_tissue_is_stained_with_haematoxylin_and_eosin():
    """Pink to purple: green is absorbed most; nuclei make blue exceed red somewhere."""
    for _, slide in examine("pathology", 28):
        od = -np.log(np.clip(slide.array.reshape(-1, 3).astype(float), 4, 255) / 255)
        tissue = od[od[:, 1] > 0.4]
        assert (tissue.mean(0)[1] > tissue.mean(0)[[0, 2]]).all()
        dark = tissue[tissue[:, 0] > np.quantile(tissue[:, 0], 0.97)]
        assert dark[:, 0].mean() > 0.35
