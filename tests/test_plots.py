import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probekit import plots, results

TASKS = {"caption": {"kind": "binary", "classes": ["match"], "question": "Right?"},
         "category": {"kind": "multilabel", "classes": ["cup", "car"], "question": "Which?"}}


@pytest.fixture(scope="module")
def tables():
    rows, losses = [], []
    parts = {"binary": "positive", "multilabel": "macro"}
    for task, about in TASKS.items():
        metrics = ["accuracy", "f1_macro", "f1_micro"]
        metrics += [f"{m}_{parts[about['kind']]}" for m in ("precision", "recall", "f1")]
        for model, control, depth in (("small", "none", 4), ("large", "none", 7), ("small", "untrained", 4)):
            for k in range(depth):
                key = {"model": model, "stage": "lm", "layer": f"lm.{k:02d}", "pooling": "mean", "task": task,
                       "control": control, "seed": 0}
                value = 0.5 + 0.1 * (control == "none") * min(k, 3)
                rows += [key | {"probe": p, "split": s, "metric": m, "class": "", "value": value, "n": 80,
                                "lo": value - 0.05, "hi": value + 0.05}
                         for m in dict.fromkeys(metrics) for p in ("logreg", "linear") for s in ("validation", "test")]
                losses += [key | {"probe": "linear", "epoch": e, "split": s, "loss": 1 / e}
                           for e in (1, 2, 3) for s in ("train", "validation")]
    table = pd.DataFrame(rows).reindex(columns=results.COLUMNS)
    table["plateau"] = table.value > 0.75
    return table, pd.DataFrame(losses)


def test_curves_show_every_layer_of_every_model(tables):
    figure = plots.layer_curves(tables[0], "caption", "accuracy", chance=0.5)
    lines = {t.name: t for t in figure.data if t.hovertemplate}
    assert set(lines) == {"small", "large", "small untrained"}
    plateau = next(t for t in figure.data if t.name == "large, plateau")
    assert [y == y for y in plateau.y] == [False] * 3 + [True] * 4
    legend = [t.name for t in figure.data if t.showlegend is not False]
    assert legend == ["small", "large", "untrained model", "cannot be told from the best layer"]
    assert list(lines["large"].x) == list(range(7))
    np.testing.assert_allclose(lines["small"].y, [0.5, 0.6, 0.7, 0.8])
    assert lines["small untrained"].line.dash == "dash"
    assert lines["small"].line.color == lines["small untrained"].line.color
    assert lines["small"].line.color != lines["large"].line.color
    assert "lm.03" in lines["small"].customdata[0][5]
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 3 and max(bands[0].y) == pytest.approx(0.85)


def test_published_numbers_can_be_overlaid(tables):
    figure = plots.layer_curves(tables[0], "caption", "accuracy", published=True)
    lines = {t.name: t for t in figure.data}
    assert len(lines["Qwen2-VL-2B, published accuracy"].x) == 29
    assert len(lines["FastVLM-0.5B, published accuracy"].x) == 25
    assert not any("Gemma" in (name or "") for name in lines)
    macro, micro = (plots.layer_curves(tables[0], "category", m, published=True) for m in ("f1_macro", "f1_micro"))
    assert any("published micro-F1" in t.name for t in micro.data if t.name)
    assert not any("published" in t.name for t in macro.data if t.name)  # the study has no macro-F1
    assert "category_f1_micro" in plots.study_figures(*tables, TASKS, published=True)


def test_poolings_are_told_apart_and_a_missing_probe_is_named(tables):
    table = pd.concat([tables[0], tables[0].assign(pooling="last")])
    figure = plots.layer_curves(table, "caption", "accuracy")
    symbols = {t.name: t.marker.symbol for t in figure.data if t.hovertemplate}
    assert symbols["small, mean"] != symbols["small, last"] and len(symbols) == 6
    assert "mean pooling" in plots.score_heatmap(table, "caption", ["f1_macro"]).layout.title.text
    with pytest.raises(ValueError, match="it has logreg, linear"):
        plots.layer_curves(table, "caption", "accuracy", probe="mlp")


def test_heatmap_and_losses(tables):
    heat = plots.score_heatmap(tables[0], "category", ["precision_macro", "recall_macro", "f1_macro"])
    assert [t.z.shape for t in heat.data] == [(3, 4), (3, 7)]
    loss = plots.loss_curves(tables[1], tables[0], "caption", "accuracy")
    assert len(loss.data) == 8 + 2  # two models, best and worst layer, training and validation; the legend
    titles = [a.text for a in loss.layout.annotations]
    assert "small, its best layer lm.03" in titles and "large, its worst layer lm.00" in titles


def test_the_page_needs_no_network(tables, tmp_path):
    figures = plots.study_figures(*tables, TASKS)
    assert len(figures) == 7
    page = plots.write_page(figures, tmp_path, "A <title>", "lead", ["one <sentence>"])
    text = page.read_text()
    assert "A &lt;title&gt;" in text and "<p>one &lt;sentence&gt;</p>" in text
    assert (tmp_path / "plotly.min.js").stat().st_size > 1e6
    for name in figures:
        assert f'id="{name}"' in text and (tmp_path / f"{name}.html").exists()
    own = re.sub(r"<script type=\"text/javascript\">.*?</script>", "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']https?:""", own)
    assert not re.search(r"""(src|href)=["']https?:""", (tmp_path / f"{name}.html").read_text())


needs_chrome = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")


@needs_chrome
def test_png_files_show_the_figure(tables, tmp_path):
    figures = plots.study_figures(*tables, TASKS)
    told = plots.write_png(dict(list(figures.items())[:2]), tmp_path)
    assert told.startswith("2 PNG files"), told
    for path in tmp_path.glob("*.png"):
        image = Image.open(path).convert("RGB")
        assert image.width == 2000 and image.height == 2 * figures[path.stem][0].layout.height
        assert len(set(image.resize((200, 80)).getdata())) > 50


def test_png_files_are_left_out_with_a_word(tables, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.io.write_images", fail)
    assert "requires Google Chrome" in plots.write_png(plots.study_figures(*tables, TASKS), tmp_path)


@needs_chrome
def test_the_page_opens_from_disk_without_a_network(tables, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    figures = plots.study_figures(*tables, TASKS)
    page_file = plots.write_page(figures, tmp_path, "Try", "lead", ["A sentence."])
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(offline=True)
        page, errors = context.new_page(), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.wait_for_function(f"document.querySelectorAll('.main-svg .cartesianlayer').length >= {len(figures)}")
        assert errors == []
        browser.close()
