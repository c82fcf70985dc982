import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m3bind.data.records import Record
from m3bind.eval.drawings import WINDOWS, draw_ct, draw_ecg, draw_image
from m3bind.eval.figures import Series, heat_map, line_chart, project
from m3bind.eval.gallery import choose_queries, search
from m3bind.eval.report import write_report
from m3bind.eval.tables import summary


def _record(modality: str, key: str) -> Record:
    rng = np.random.default_rng(0)
    common = {
        "id": key,
        "patient": key,
        "modality": modality,
        "split": "test",
        "simulated": True,
        "report": f"FINDINGS: What {modality} shows <in> detail.\nIMPRESSION: A secret.",
    }
    if modality == "ct":
        hu = rng.integers(-1000, 200, (10, 12, 12)).astype(np.int16)
        return Record.from_volume(hu, spacing_mm=(4.0, 2.0, 2.0), **common)
    if modality == "ecg":
        return Record.from_signal(rng.integers(-500, 500, (12, 5000)).astype(np.int16), **common)
    return Record.from_image(rng.integers(0, 255, (24, 24, 3)).astype(np.uint8), **common)


def _fetch(modality, ids):
    return {key: _record(modality, key) for key in ids}


HISTORY = [
    {"step": 1, "loss": 3.0, "losses": {"clip/ct": 2.0, "agreement": 1.0}},
    {"step": 5, "loss": 2.0, "losses": {"clip/ct": 1.5, "agreement": 0.5}},
    {"step": 5, "validation": {"score": 0.4}},
    {"step": 9, "loss": 1.5, "losses": {"clip/ct": 1.2, "agreement": 0.3}},
    {"step": 9, "validation": {"score": 0.3}},
]


@pytest.fixture(scope="module")
def page(tmp_path_factory, metrics, test_sets):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    assert path == write_report(
        path,
        metrics,
        test=test_sets,
        histories={"Stage 1": HISTORY},
        fetch=_fetch,
        dataset="made-up",
    )
    assert not list(path.parent.glob("*.part"))
    return path.read_text(encoding="utf-8")


def test_the_file_needs_nothing_beside_it(page):
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|file:)""", page)
    assert not re.search(r"<(script|link|iframe)\b", page)
    assert "url(" not in page and "@import" not in page
    links = re.findall(r"""(?:src|href)="([^"#]{1,40})""", page)
    assert links and all(link.startswith("data:image/") for link in links)
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page


def test_it_says_that_it_is_simulated(page, metrics, test_sets, tmp_path):
    assert "<title>SIMULATED" in page and "SIMULATED COHORT" in page
    real = write_report(tmp_path / "real.html", {**metrics, "simulated": False}, test=test_sets)
    assert "simulated" not in real.read_text(encoding="utf-8").lower()


def test_it_shows_the_figures_of_metrics_json(page, metrics):
    for path in ("aligned", "before"):
        assert f"mean {metrics['retrieval'][path]['map']['mean']:.3f}" in page
    assert f"{metrics['zero_shot']['distilled']['findings']['ecg']:.3f}" in page
    assert "8 of 8 demands are met" in page
    assert "0123abc" in page and metrics["versions"]["torch"] in page
    # the gallery tells findings, escaped, and keeps the impression to itself
    assert "What ecg shows &lt;in&gt; detail." in page and "A secret" not in page
    assert page.count('<svg class="ecg"') == 3 + 1 + 3  # found twice, asked for once
    assert ">kept</text>" in page


def test_a_run_without_labels_still_has_a_report(tmp_path, test_sets):
    import copy

    sets = {"before": copy.deepcopy(test_sets["before"])}
    for item in sets["before"].values():
        item.labels = [""] * len(item)
    bare = {"simulated": False, "seed": 0, "versions": {}, "seconds": {}, "peak_rss_mib": {}}
    path = write_report(tmp_path / "r.html", bare, test=sets, fetch=_fetch)
    page = path.read_text(encoding="utf-8")
    assert "not measured" in page and "nan" not in re.sub(r"<style.*?</style>", "", page)


def _mean_pixel(html: str) -> np.ndarray:
    data = re.search(r"base64,([^\"]+)", html).group(1)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_an_ecg_is_drawn_to_scale():
    microvolt = np.zeros((12, 5000), np.int16)
    microvolt[0, 500] = 1500  # lead I, at 1 s
    microvolt[11, 3750 + 250] = -800  # V6, half a second into the last column
    svg = draw_ecg(microvolt, rate_hz=500, alt='a "b"')
    assert 'aria-label="a &quot;b&quot;"' in svg
    assert re.findall(r'class="n">([^<]+)<', svg) == [
        "I", "aVR", "V1", "V4", "II", "aVL", "V2", "V5", "III", "aVF", "V3", "V6", "II",
    ]  # fmt: skip
    traces = [_walk(d) for d in re.findall(r'<path d="([^"]+)" class="w"/>', svg) if "l" in d]
    assert len(traces) == 13
    lead_one, v6 = traces[0], traces[11]
    top = lead_one[lead_one[:, 1].argmin()]
    assert lead_one[0, 1] - top[1] == pytest.approx(15.0, abs=0.02)  # 1.5 mV
    assert top[0] - lead_one[0, 0] == pytest.approx(25.0, abs=0.11)  # 1 s
    low = v6[v6[:, 1].argmax()]
    assert low[1] - v6[0, 1] == pytest.approx(8.0, abs=0.02)
    assert low[0] - lead_one[0, 0] == pytest.approx(8.0 * 25, abs=0.11)  # 7.5 s + 0.5 s
    assert traces[12][-1, 0] - traces[12][0, 0] == pytest.approx(250, abs=0.2)
    with pytest.raises(ValueError, match=r"\[12, T\]"):
        draw_ecg(microvolt[:11])


def _walk(path: str) -> np.ndarray:
    start, *steps = re.findall(r"[Ml]([^Ml]+)", path)
    return np.cumsum([[float(v) for v in s.split()] for s in [start, *steps]], axis=0)


def test_a_tall_complex_stays_on_the_paper():
    microvolt = np.zeros((12, 5000), np.int16)
    microvolt[0, 300], microvolt[1, 900] = 4000, -3500
    svg = draw_ecg(microvolt)
    high = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg).group(1))
    for trace in (_walk(d) for d in re.findall(r'<path d="([^"]+)" class="w"/>', svg) if "l" in d):
        assert trace[:, 1].min() > 0 and trace[:, 1].max() < high


def test_ct_windows_and_proportions():
    hu = np.full((10, 20, 20), -600, np.int16)  # the lung window's level: mid grey
    sheet = _mean_pixel(draw_ct(hu, (2.0, 1.0, 1.0), alt="ct"))
    half = sheet.shape[0] // 2
    lung, mediastinum = sheet[:half], sheet[half:]
    values, counts = np.unique(lung, return_counts=True)
    assert values[counts.argmax()] in (127, 128)
    assert np.median(mediastinum) == 0  # -600 HU is far below -160
    level, width = WINDOWS["mediastinal"]
    bright = _mean_pixel(draw_ct(np.full_like(hu, level + width / 2), (2.0, 1.0, 1.0)))
    assert np.median(bright) == 255
    # 20 mm x 20 mm axial and coronal: tiles are square
    flat = _mean_pixel(draw_ct(hu, (1.0, 1.0, 1.0)))
    coronal = flat[: flat.shape[0] // 2][-150:, -150:]
    rows = np.flatnonzero((coronal > 100).mean(axis=1) > 0.5)
    assert len(rows) == pytest.approx(75, abs=2)  # 10 mm high, 20 mm wide
    with pytest.raises(ValueError, match=r"\[D, H, W\]"):
        draw_ct(hu[0], (1, 1, 1))


def test_images_are_shown_in_full_range():
    deep = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    shown = _mean_pixel(draw_image(deep))
    assert shown.min() == 0 and shown.max() == 255 and shown.shape == (64, 64)
    wide = _mean_pixel(draw_image(np.zeros((100, 1000, 3), np.uint8), size=200))
    assert wide.shape == (20, 200, 3)


def test_queries_are_drawn_blindly_and_answers_are_judged(test_sets):
    sets = test_sets["aligned"]
    chosen = choose_queries(sets, seed=1)
    assert [m for m, _ in chosen] == ["xray", "ecg", "retina"]
    labels = [sets[m].labels[row] for m, row in chosen]
    assert "none" not in labels and len(set(labels)) == 3
    assert chosen == choose_queries(sets, seed=1)
    # not a function of the embeddings
    blind = {m: SimpleNamespace(labels=item.labels) for m, item in sets.items()}
    assert choose_queries(blind, seed=1) == chosen

    row = sets["xray"].labels.index("emphysema")  # which a retina does not show here
    found = search(sets, "xray", row, before=test_sets["before"])
    answers = {a.modality: a for a in found.answers}
    assert set(answers) == {"ct", "retina", "ecg", "pathology"}
    assert all(hit.right is None for hit in answers["retina"].hits)
    best = answers["ct"].hits[0]
    similarity = sets["ct"].image @ sets["xray"].image[row]
    assert best.id == sets["ct"].ids[similarity.argmax()]
    assert best.similarity == pytest.approx(similarity.max())
    assert best.right == (sets["ct"].labels[similarity.argmax()] == "emphysema")
    assert len(answers["ct"].before) == 3


def test_charts_and_tables():
    chart = line_chart(
        [Series(name="<a>", x=[1, 4, 16], y=[0.0, 0.5, 1.0], colour="#000", points=True)],
        title="t",
        x_label="k",
        y_label="y",
        y_range=(0, 1),
        log_x=True,
    )
    x = [float(v) for v in re.findall(r'<circle cx="([\d.]+)"', chart)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # 1, 4, 16 on a log axis
    assert "<a>" not in chart
    assert line_chart([], title="", x_label="", y_label="") == ""
    table = heat_map({"a->b": 0.25, "mean": 0.25}, ["a", "b"], ["a", "b"], title="x")
    assert table.count("&ndash;") == 3 and ">0.25</td>" in table and "mean 0.250" in table


@pytest.mark.parametrize("count", [3, 60])
def test_projection_keeps_clusters_and_repeats(count):
    rng = np.random.default_rng(0)
    centres = np.eye(16)[:2]
    groups = [c + 0.05 * rng.standard_normal((count, 16)) for c in centres]
    one, two = project(groups, seed=0)
    assert one.shape == two.shape == (count, 2)
    assert min(one.min(), two.min()) >= 0 and max(one.max(), two.max()) <= 1
    between = np.linalg.norm(one.mean(0) - two.mean(0))
    assert between > 2 * np.linalg.norm(one - one.mean(0), axis=1).mean()
    np.testing.assert_array_equal(one, project(groups, seed=0)[0])


def test_the_terminal_table_names_what_was_missed(metrics):
    import copy

    from rich.console import Console

    changed = copy.deepcopy(metrics)
    changed["zero_shot"]["before"]["name"]["mean"] = 0.7
    console = Console(width=110, file=io.StringIO())
    console.print(summary(changed))
    text = console.file.getvalue()
    assert "SIMULATED" in text and "7 of 8" in text
    assert "not met: Zero-shot by name before binding" in text and "0.700" in text
    console.print(summary({}))  # nothing measured: still a table
