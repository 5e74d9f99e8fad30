import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probekit import report as plots
from probekit.probes import results
from probekit.report import sentences, style

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


def lines_of(figure):
    return {t.name: t for t in figure.data if t.hovertemplate}


def test_curves_show_every_layer_of_every_model(tables):
    figure = plots.layer_curves(tables[0], "caption", "accuracy", chance=0.5)
    lines = lines_of(figure)
    assert set(lines) == {"small", "large", "small untrained"}
    plateau = next(t for t in figure.data if t.name == "large, plateau")
    assert [y == y for y in plateau.y] == [False] * 3 + [True] * 4
    legend = [t.name for t in figure.data if t.showlegend is not False]
    assert legend == ["small", "large", "untrained model", "cannot be told from the best"]
    assert list(lines["large"].x) == list(range(7))
    np.testing.assert_allclose(lines["small"].y, [0.5, 0.6, 0.7, 0.8])
    assert lines["small untrained"].line.dash == "dash"
    assert lines["small"].line.color == lines["small untrained"].line.color
    assert lines["small"].line.color != lines["large"].line.color
    assert "lm.03" in lines["small"].customdata[0][5] and "cannot be told" in lines["small"].customdata[3][6]
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 3 and max(bands[0].y) == pytest.approx(0.85)


def test_models_of_any_depth_share_a_relative_axis(tables):
    figure = plots.layer_curves(tables[0], "caption", "accuracy", published=True, relative=True)
    lines = lines_of(figure)
    np.testing.assert_allclose(lines["small"].x, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(lines["large"].x, np.arange(7) / 6)
    published = lines["Qwen2-VL-2B, published accuracy"]
    assert published.x[-1] == 1 and published.customdata[-1] == 28
    assert figure.layout.xaxis.title.text == style.DEPTH_AXIS
    layer, relative = figure.layout.updatemenus[0].buttons
    for trace, x, share in zip(figure.data, layer.args[0]["x"], relative.args[0]["x"], strict=True):
        assert list(trace.x) == list(share)
        if trace.hovertemplate:
            np.testing.assert_allclose(np.array(x) / max(x), share)


def test_published_numbers_can_be_overlaid(tables):
    lines = lines_of(plots.layer_curves(tables[0], "caption", "accuracy", published=True))
    assert len(lines["Qwen2-VL-2B, published accuracy"].x) == 29
    assert len(lines["FastVLM-0.5B, published accuracy"].x) == 25
    assert not any("Gemma" in name for name in lines)
    macro, micro = (plots.layer_curves(tables[0], "category", m, published=True) for m in ("f1_macro", "f1_micro"))
    assert any("published micro-F1" in t.name for t in micro.data if t.name)
    assert not any("published" in t.name for t in macro.data if t.name)  # the study has no macro-F1


def test_poolings_are_told_apart_and_a_missing_probe_is_named(tables):
    table = pd.concat([tables[0], tables[0].assign(pooling="last", value=0.9)])
    figure = plots.layer_curves(table, "caption", "accuracy")
    assert "mean pooling" in figure.layout.title.text and set(lines_of(figure)["small"].y) == {0.5, 0.6, 0.7, 0.8}
    last = plots.layer_curves(table, "caption", "accuracy", pooling="last")
    assert set(lines_of(last)["small"].y) == {0.9}
    both = lines_of(plots.pooling_curves(table, "caption", "accuracy"))
    assert set(both) == {f"{model}, {pooling}" for model in ("small", "large") for pooling in ("mean", "last")}
    assert both["small, mean"].marker.symbol != both["small, last"].marker.symbol
    assert both["small, mean"].line.color != both["small, last"].line.color != both["large, last"].line.color
    assert "mean pooling" in plots.score_heatmap(table, "caption", ["f1_macro"]).layout.title.text
    with pytest.raises(ValueError, match="it has logreg, linear"):
        plots.layer_curves(table, "caption", "accuracy", probe="mlp")


def test_global_and_local_name_their_peaks_and_their_trade(tables):
    table = tables[0].copy()
    late = (table.task == "category") & (table.layer == "lm.01") & (table.control == "none")
    table.loc[late, "value"] = 0.95  # local semantics peak early
    figure = plots.global_and_local(table, TASKS)
    titles = [a.text for a in figure.layout.annotations]
    assert titles[0] == "<b>small</b>: caption peaks at lm.03, category at lm.01"
    points = [t for t in figure.data if t.mode == "markers+text"]
    assert len(points) == 2 and list(points[0].x) == [0.5, 0.95, 0.7, 0.8] and list(points[0].text) == list("0123")
    filled = [colour != "rgba(0,0,0,0)" for colour in points[0].marker.color]
    assert filled == [False, True, False, True]  # each of the two is best at one


def test_losses_of_every_layer_are_on_the_slider(tables):
    loss = plots.loss_curves(tables[1].assign(loss=tables[1].loss + tables[1].layer.str[-1].astype(int)), tables[0],
                             "caption", "accuracy")
    assert len(loss.data) == 4 + 2  # two models, training and validation; the legend
    steps = loss.layout.sliders[0].steps
    assert [step.label for step in steps] == [f"{k:02d}" for k in range(7)]
    assert loss.layout.sliders[0].active == 3 and list(loss.data[0].y) == [4, 3.5, 3 + 1 / 3]
    np.testing.assert_allclose(steps[5].args[0]["y"][2], [6, 5.5, 5 + 1 / 3])
    assert steps[5].args[0]["y"][0] == (None,) * 3 or steps[5].args[0]["y"][0] == [None] * 3  # it has four layers


def test_heatmaps_hold_what_the_table_holds(small_run):
    table, transfer = small_run.results.metrics, small_run.results.transfer
    heat = plots.score_heatmap(table, "category", ["precision_macro", "recall_macro", "f1_macro"])
    assert [t.z.shape for t in heat.data] == [(3, 9)]
    own = table[(table.control == "none") & (table.probe == "logreg") & (table.pooling == "mean")
                & (table.task == "category") & (table.stage == "lm") & (table.split == "test")]
    categories = plots.class_heatmap(table, "category").data[0]
    for row, name in enumerate(categories.y):
        f1 = own[(own["class"] == name) & (own.metric == "f1")].sort_values("layer").value
        np.testing.assert_allclose(categories.z[row], f1)
    best = np.nanmax(np.array(categories.z, float), 1)
    assert (np.diff(best) >= 0).all()  # plotly's first row is at the bottom
    counts = plots.confusion_counts(table, "category")
    asked = sum(int(np.sum(mask)) for mask in small_run.tests("category")["mask"])
    np.testing.assert_allclose(np.sum([t.y for t in counts.data], 0), asked)
    grid = plots.transfer_heatmap(transfer, "caption").data[0]
    accuracy = results.select_curve(own_task(table, "caption"), "logreg", "accuracy").value
    np.testing.assert_allclose(np.diag(grid.z), accuracy, atol=1e-6)  # at home a probe scores as in the table


def own_task(table, task):
    return table[(table.control == "none") & (table.task == task) & (table.pooling == "mean")]


def test_stages_stand_one_after_the_other(small_run):
    figure = plots.stage_curves(small_run.results.metrics, "category", "f1_macro")
    ends = [(min(t.x), max(t.x)) for t in figure.data if t.hovertemplate]
    assert ends == [(0, 1), (1.18, 1.18), (1.36, 2.36)]
    assert [t.showlegend for t in figure.data if t.hovertemplate] == [True, False, False]


@pytest.fixture(scope="module")
def page(small_data, tmp_path_factory):
    from probekit.report.saved_run import SavedRun

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROBEKIT_HOME", str(small_data))
        run = SavedRun.open("small")
        figures = plots.all_figures(run.results, run.tasks) | plots.explorers(run)
        said = [*sentences.summarise(run.results.metrics, run.tasks), "one <sentence>"]
        plots.write_page(figures, folder, "A <title>", "lead", said, run.settings, run.write_tables(folder))
    return folder, figures


def test_the_page_needs_no_network_and_says_it_all(page):
    folder, figures = page
    text = (folder / "index.html").read_text()
    assert "A &lt;title&gt;" in text and "<p>one &lt;sentence&gt;</p>" in text
    assert (folder / "plotly.min.js").stat().st_size > 1e6
    wanted = {"global_and_local", "caption_accuracy", "caption_selectivity", "caption_codelength", "caption_poolings",
              "caption_stages", "caption_scores", "caption_confusion", "caption_transfer", "caption_losses",
              "category_classes", "category_localisation", "category_list_f1_macro", "explorer_tiny-qwen2-vl"}
    assert wanted <= set(figures)
    for name, drawn in figures.items():
        assert f'id="{name}"' in text and (folder / f"{name}.html").exists()
        assert len(drawn.caption) > 40 and drawn.figure.layout.title.text
    own = re.sub(r"<script type=\"text/javascript\">.*?</script>", "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']https?:""", own)
    assert not re.search(r"""(src|href)=["']https?:""", (folder / "caption_accuracy.html").read_text())
    assert "longest_side" in text and "transformers" in text and 'href="transfer.csv"' in text
    assert len(pd.read_csv(folder / "metrics.csv")) > 1000


def test_both_themes_change_colours_alone(tables):
    figure = plots.layer_curves(tables[0], "caption", "accuracy")
    light, dark = (style.plotly.io.templates[name].layout for name in (style.LIGHT, style.DARK))
    assert figure.layout.template.layout.font.color == light.font.color != dark.font.color
    assert light.xaxis.to_plotly_json().keys() == dark.xaxis.to_plotly_json().keys()
    assert not [t for t in figure.data if t.line.color in ("black", "white")]


needs_chrome = pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")


@needs_chrome
def test_pictures_show_the_figure(tables, tmp_path):
    figures = {"curves": plots.Drawn(plots.layer_curves(tables[0], "caption", "accuracy"), "", ""),
               "losses": plots.Drawn(plots.loss_curves(tables[1], tables[0], "caption", "accuracy"), "", "")}
    told = plots.write_images(figures, tmp_path)
    assert told.startswith("2 pictures") and "PNG and SVG" in told
    for name, width in (("curves", style.HALF), ("losses", style.FULL)):
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        assert image.width == 2 * width and image.height == 2 * figures[name].figure.layout.height
        assert len(set(image.resize((200, 80)).getdata())) > 50
        svg = (tmp_path / f"{name}.svg").read_text()
        assert "<svg" in svg and "relative depth" not in svg  # buttons are for the page
    assert "decoder layer 03" in (tmp_path / "losses.svg").read_text()
    assert figures["losses"].figure.layout.sliders  # which itself is left as it was


def test_pictures_are_left_out_with_a_word(tables, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.io.write_images", fail)
    figure = plots.layer_curves(tables[0], "caption", "accuracy")
    assert "requires Google Chrome" in plots.write_images({"a": plots.Drawn(figure, "", "")}, tmp_path)
