import pandas as pd
import pytest

from probekit.answers.reading import LENS
from probekit.answers.scores import ANSWER
from probekit.report.known_and_said import known_and_said_figure


def with_answers(table, *, tuned):
    """Give both models answers that are right in 0.6, a lens, and a probe that is 0.2 better."""
    probes = table[(table.task == "caption") & (table.probe == "logreg")].assign(pooling="last")
    trained = probes[(probes.control == "none") & (probes.metric == "accuracy")]
    gaps = [trained.assign(metric=name, value=0.2) for name in ("over_answer", "known_not_said")]
    lens = trained.assign(probe=LENS, plateau=pd.NA)
    one = trained[(trained.layer == "lm.00") & (trained.split == "test")]
    one = one.assign(probe=ANSWER, stage="answer", layer="answer", plateau=pd.NA)
    said = {"accuracy": 0.6, "guess": 0.5, "accuracy_tuned": tuned}
    answers = [one.assign(metric=name, value=value) for name, value in said.items()]
    counts = [
        one.assign(metric=name, value=20, **{"class": "yes"}) for name in ("tp", "fp", "fn", "tn")
    ]
    return pd.concat([probes, *gaps, lens, *answers, *counts], ignore_index=True)


def entries(figure):
    return [trace.name.partition("<br>")[0] for trace in figure.data if trace.showlegend is None]


def test_a_control_above_chance_has_a_line_outside_the_band(table, tasks):
    table = with_answers(table, tuned=0.6)
    is_untrained = table.control == "untrained"
    is_strong = is_untrained & table.layer.isin(["lm.02", "lm.03"]) & (table.metric == "accuracy")
    table.loc[is_strong, ["value", "lo", "hi"]] = 0.8, 0.78, 0.82
    shuffled = table[is_untrained].assign(control="shuffled", value=0.52, lo=0.45, hi=0.59)
    table = pd.concat([table, shuffled], ignore_index=True)
    figure = known_and_said_figure(table, "caption", tasks["caption"])
    lines = [trace for trace in figure.data if trace.name == "probe, untrained model"]
    assert list(lines[0].y) == pytest.approx([0.5, 0.5, 0.8, 0.8])
    (area,) = [trace for trace in figure.data if trace.legendgroup == "all controls" and trace.fill]
    assert max(area.y) == 0.52
    assert {"probe, untrained model", "shuffled labels, small and chance"} <= set(entries(figure))


@pytest.mark.parametrize("tuned", [0.6, 0.7])
def test_the_legend_names_what_is_drawn(table, tasks, tuned):
    figure = known_and_said_figure(with_answers(table, tuned=tuned), "caption", tasks["caption"])
    names = entries(figure)
    assert ("answer, tuned threshold" in names) == (tuned == 0.7)
    assert "tuned lens" not in names
    assert {"probe: known", "lens: would be said", "probe less answer"} <= set(names)
    groups = {trace.legendgroup for trace in figure.data if trace.showlegend is False}
    assert {trace.legendgroup for trace in figure.data if trace.showlegend is None} <= groups
