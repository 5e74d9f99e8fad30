import numpy as np
import pandas as pd
import pytest

from probekit.probes.results import COLUMNS, ProbeKey, ProbeResults
from probekit.report.figures import run_figures
from probekit.report.results import Results
from probekit.report.slices import slice_table, slices_figure
from probekit.tasks.base import task_infos
from tests.probes.test_slices import LARGE, instance_table, planted_objects
from tests.support.figures import curves_by_name

IMAGES = 80
MODELS = ("small", "large")


@pytest.fixture(scope="module")
def results() -> Results:
    """Two models whose probes are right at lm.01 alone, which validation chooses.

    On test lm.00 has the higher score in the table. The models answer yes to everything.
    """
    examples, instances, _ = planted_objects(images=IMAGES)
    y_n = np.repeat([1.0, 0.0], IMAGES)
    rows = []
    predictions = {}
    for model in MODELS:
        for probe in ("logreg", "lens"):
            key = ProbeKey(model, "none", "last", "object", probe)
            right = [1 - y_n, y_n, 1 - y_n] if probe == "logreg" else [y_n, y_n, y_n * 0 + 1]
            predictions[key] = np.stack(right)[..., None].astype(np.float16)
            for k, validation in enumerate((0.6, 0.8, 0.5)):
                for split, value in (("validation", validation), ("test", 1 - k / 10)):
                    row = {**key._asdict(), "stage": "lm", "layer": f"lm.{k:02d}", "split": split}
                    row |= {"metric": "accuracy", "class": "", "seed": 0, "n": 160}
                    rows.append({**row, "value": value, "lo": value, "hi": value})
    metrics = pd.DataFrame(rows).reindex(columns=COLUMNS)
    probed = ProbeResults(
        metrics=metrics,
        losses=pd.DataFrame(),
        predictions=predictions,
        tasks=task_infos(examples),
    )
    crowded = instances[instances.image_id < IMAGES // 2]
    return Results.of(probed, examples, instances=pd.concat([instances, crowded]))


def test_the_table_has_the_layer_that_validation_chose_and_the_answer(results):
    table = results.slices(resamples=50)
    pd.testing.assert_frame_equal(
        table, slice_table(results, results.examples, results.instances, resamples=50)
    )
    assert set(table.covariate) == {"area", "objects"}
    probes = table[table.probe == "logreg"]
    assert set(probes.layer) == {"lm.01"}
    assert (probes.value == 1).all()
    answers = table[(table.probe == "answer") & (table.covariate == "area")]
    assert set(answers.layer) == {"lm.02"}
    assert (answers.value == (answers.slice != "not shown")).all()
    assert set(table.model) == set(MODELS)
    assert not table.duplicated(["model", "pooling", "probe", "covariate", "slice"]).any()


def test_the_figure_has_a_panel_for_each_covariate_and_a_point_for_each_score(results):
    table = results.slices(resamples=50)
    figure = results.plot("slices", task="object")
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == ["Area of what is asked about", "Instances in the image"]
    ticks = list(figure.layout.xaxis.ticktext)
    counts = table[table.covariate == "area"].drop_duplicates("slice")
    assert ticks == [f"{row.slice}<br>n = {row.n}" for row in counts.itertuples()]
    assert figure.layout.yaxis.title.text == "recall (test)"
    assert figure.layout.yaxis2.title.text == "accuracy (test)"
    points = [trace for trace in figure.data if trace.hovertemplate]
    assert sum(len(trace.x) for trace in points) == len(table)
    curves = curves_by_name(figure)
    colours = {name: trace.marker.color for name, trace in curves.items()}
    assert colours["small, logreg probe"] == colours["small, the model’s answer"]
    assert colours["small, logreg probe"] != colours["large, logreg probe"]
    probe, answer = (curves[f"small, {name}"] for name in ("logreg probe", "the model’s answer"))
    assert probe.marker.symbol != answer.marker.symbol


def test_a_slice_without_a_score_has_its_reason_below_its_name(results):
    few = results.instances[results.instances.image_id >= IMAGES // 2 - 5]
    table = slice_table(results, results.examples, few, resamples=50)
    figure = slices_figure(table[table.covariate == "objects"], "object")
    assert figure.layout.xaxis.ticktext[-1] == "2<br>n = 10<br>too few"


def test_what_cannot_be_sliced_is_named(results):
    with pytest.raises(ValueError, match="no task 'objects' in these results: take one of object"):
        results.slices(task="objects")
    with pytest.raises(ValueError, match="no slices of object in these results"):
        results.plot("slices", task="object", probe="mlp")
    with pytest.raises(ValueError, match=r"which slices need.*Results\.of\(results, examples\)"):
        Results.of(results, pd.DataFrame()).slices()
    same = instance_table(*((image, "cup", LARGE) for image in range(IMAGES)))
    alike = Results.of(results, results.examples, instances=same)
    assert alike.slices().empty
    with pytest.raises(ValueError, match="do not differ in what slices are made by"):
        alike.plot("slices")


def test_a_saved_run_has_slices(saved_run, tmp_path):
    table = saved_run.results.slices(resamples=50)
    assert {"caption", "category", "category_list"} == set(table.task)
    assert {"none", "untrained"} == set(table.control)
    assert (table.value.isna() == (table.reason != "")).all()
    saved_run.write_tables(tmp_path)
    written = pd.read_csv(tmp_path / "slices.csv", keep_default_na=False)
    assert list(written.columns) == list(table.columns)
    assert len(written) == len(table)


def test_the_page_has_slices_where_one_of_them_has_a_score(saved_run):
    table = saved_run.results.slices(resamples=50)
    scored = table.assign(value=0.5, lo=0.4, hi=0.6).where(table.task != "caption", table)
    scored.loc[scored.task == "caption", "value"] = np.nan
    figures = run_figures(saved_run.results, slices=scored)
    assert {"category_slices", "category_list_slices"} == {
        name for name in figures if name.endswith("_slices")
    }
    assert figures["category_slices"].group == figures["category_accuracy"].group == "category"
