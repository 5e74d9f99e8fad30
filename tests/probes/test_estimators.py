import doctest

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from probekit.probes import estimators
from probekit.probes.estimators import LayerwiseLogisticRegression

LAYERS = 3
N = 150
D = 8


@parametrize_with_checks(
    [
        LayerwiseLogisticRegression(),
        LayerwiseLogisticRegression(C=[0.1, 1.0], standardize=False),
    ]
)
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def features(seed=0):
    """(layers, n, d) with another mean and scale of each feature."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(LAYERS, N, D))
    return X * rng.uniform(0.1, 10, (LAYERS, 1, D)) + 5 * rng.normal(size=(LAYERS, 1, D))


def labels(X, k, seed=1):
    """(n, k) columns that each layer partly carries."""
    rng = np.random.default_rng(seed)
    standardised = (X - X.mean(1, keepdims=True)) / X.std(1, keepdims=True)
    score = standardised.mean(0) @ rng.normal(size=(D, k)) + 0.5 * rng.normal(size=(N, k))
    return (score > 0).astype(int)


def classes(X):
    """(n,) labels of four classes."""
    return np.array(["ant", "bee", "cat", "dog"])[labels(X, 2) @ [1, 2]]


def reference(C=1.0):
    return LogisticRegression(C=C, tol=1e-10, max_iter=10_000)


def assert_same(estimator, X, layer, pipeline):
    """The same weights as a StandardScaler and a classifier of scikit-learn, in raw units."""
    scaler = pipeline[0]
    classifier = pipeline[-1]
    models = getattr(classifier, "estimators_", [classifier])
    coef = np.concatenate([model.coef_ for model in models]) / scaler.scale_
    intercept = np.concatenate([model.intercept_ for model in models]) - coef @ scaler.mean_
    assert estimator.coef_.shape == (LAYERS, len(models), D)
    assert estimator.converged_.all()
    np.testing.assert_allclose(
        estimator.coef_[layer] * scaler.scale_, coef * scaler.scale_, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(estimator.intercept_[layer], intercept, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        estimator.decision_function(X)[layer],
        pipeline.decision_function(X[layer]),
        rtol=1e-3,
        atol=1e-3,
    )
    np.testing.assert_allclose(
        estimator.predict_proba(X)[layer], pipeline.predict_proba(X[layer]), atol=1e-4
    )


def test_two_classes_are_logistic_regression_at_every_layer():
    X = features()
    y = np.where(labels(X, 1)[:, 0], "yes", "no")
    estimator = LayerwiseLogisticRegression(C=0.3).fit(X, y)
    assert estimator.classes_.tolist() == ["no", "yes"]
    assert estimator.C_.tolist() == [0.3] * LAYERS
    for layer in range(LAYERS):
        pipeline = make_pipeline(StandardScaler(), reference(0.3)).fit(X[layer], y)
        assert_same(estimator, X, layer, pipeline)
        assert estimator.predict(X)[layer].tolist() == pipeline.predict(X[layer]).tolist()
        assert estimator.score(X, y)[layer] == pipeline.score(X[layer], y)


def test_more_classes_are_one_versus_rest():
    X = features()
    y = classes(X)
    estimator = LayerwiseLogisticRegression().fit(X, y)
    for layer in range(LAYERS):
        one_vs_rest = OneVsRestClassifier(reference())
        pipeline = make_pipeline(StandardScaler(), one_vs_rest).fit(X[layer], y)
        assert_same(estimator, X, layer, pipeline)
        assert estimator.predict(X)[layer].tolist() == pipeline.predict(X[layer]).tolist()
        assert estimator.score(X, y)[layer] == pipeline.score(X[layer], y)


def test_columns_are_labels_of_their_own():
    X = features()
    y = labels(X, 3)
    estimator = LayerwiseLogisticRegression().fit(X, y)
    for layer in range(LAYERS):
        one_vs_rest = OneVsRestClassifier(reference())
        pipeline = make_pipeline(StandardScaler(), one_vs_rest).fit(X[layer], y)
        assert_same(estimator, X, layer, pipeline)
        np.testing.assert_array_equal(estimator.predict(X)[layer], pipeline.predict(X[layer]))
        right = pipeline.predict(X[layer]) == y
        assert estimator.score(X, y)[layer] == pytest.approx(right.mean())
        first = estimator.score(X, y, mask=np.tile([1, 0, 0], (N, 1)))
        assert first[layer] == pytest.approx(right[:, 0].mean())


def test_without_standardisation_the_penalty_is_on_the_features_as_they_are():
    X = features()
    y = labels(X, 1)[:, 0]
    X = (X - X.mean(1, keepdims=True)) / X.std(1, keepdims=True) * np.linspace(0.5, 2, D)
    estimator = LayerwiseLogisticRegression(C=0.1, standardize=False).fit(X, y)
    for layer in range(LAYERS):
        model = reference(0.1).fit(X[layer], y)
        np.testing.assert_allclose(estimator.coef_[layer], model.coef_, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(estimator.intercept_[layer], model.intercept_, atol=1e-4)


def test_a_mask_of_entries_fits_each_column_on_its_own_rows():
    X = features()
    y = labels(X, 3)
    mask = np.random.default_rng(2).integers(0, 2, y.shape)
    estimator = LayerwiseLogisticRegression().fit(X, y, mask=mask)
    counts = mask.any(1)
    for layer in range(LAYERS):
        scaled = StandardScaler().fit(X[layer, counts]).transform(X[layer])
        for k in range(3):
            rows = mask[:, k] == 1
            model = reference().fit(scaled[rows], y[rows, k])
            np.testing.assert_allclose(
                estimator.predict_proba(X)[layer, :, k],
                model.predict_proba(scaled)[:, 1],
                atol=1e-4,
            )


@pytest.mark.parametrize("kind", ["two", "four", "columns"])
def test_examples_that_count_nowhere_are_not_there(kind):
    """Neither their features, which would move the mean and scale, nor their labels matter."""
    X = features()
    y = {"two": labels(X, 1)[:, 0], "four": classes(X), "columns": labels(X, 3)}[kind]
    rows = np.arange(N) % 3 > 0
    alone = LayerwiseLogisticRegression(C=[0.1, 1.0]).fit(X[:, rows], y[rows])
    X = X.copy()
    X[:, ~rows] = 1000
    y = y.astype(object)
    y[~rows] = "not asked about"
    if kind != "four":
        y[~rows] = np.nan
        y = y.astype(float)
    estimator = LayerwiseLogisticRegression(C=[0.1, 1.0]).fit(X, y, mask=rows)
    np.testing.assert_array_equal(estimator.coef_, alone.coef_)
    assert estimator.classes_.tolist() == alone.classes_.tolist()
    np.testing.assert_array_equal(
        estimator.score(X, y, mask=rows),
        alone.score(X[:, rows], y[rows].astype(alone.classes_.dtype)),
    )


def test_each_layer_takes_the_strength_with_the_lowest_validation_loss():
    X = features()
    y = labels(X, 1)[:, 0]
    X[0] = np.random.default_rng(5).normal(size=(N, D))  # noise wants a small C
    train = slice(0, 100)
    rest = slice(100, N)
    strengths = [1e-3, 1.0, 100.0]
    estimator = LayerwiseLogisticRegression(C=strengths).fit(
        X[:, train], y[train], validation=(X[:, rest], y[rest])
    )
    for layer in range(LAYERS):
        losses = []
        for strength in strengths:
            pipeline = make_pipeline(StandardScaler(), reference(strength))
            p = pipeline.fit(X[layer, train], y[train]).predict_proba(X[layer, rest])
            losses.append(log_loss(y[rest], p))
        assert estimator.C_[layer] == strengths[int(np.argmin(losses))]
        single = LayerwiseLogisticRegression(C=estimator.C_[layer]).fit(X[layer, train], y[train])
        np.testing.assert_allclose(estimator.coef_[layer], single.coef_, rtol=1e-3, atol=1e-5)
    assert len(set(estimator.C_)) > 1


def test_a_validation_mask_says_which_entries_choose():
    """Validation labels that do not count are inverted; counting them would change the choice."""
    X = features()
    y = labels(X, 2)
    inverted = y.copy()
    mask = np.ones_like(y)
    inverted[100:] = 1 - inverted[100:]
    inverted[100:120] = y[100:120]
    mask[120:] = 0
    strengths = [1e-3, 1.0]

    def choose(y_val, mask_val):
        validation = (X[:, 100:], y_val[100:], mask_val[100:])
        estimator = LayerwiseLogisticRegression(C=strengths)
        return estimator.fit(X[:, :100], y[:100], validation=validation).C_.tolist()

    assert choose(inverted, mask) == choose(y, mask) == [1.0] * LAYERS
    assert choose(inverted, np.ones_like(mask)) == [1e-3] * LAYERS


def test_held_out_examples_choose_and_all_examples_are_fitted():
    X = features()
    y = labels(X, 1)[:, 0]
    X[0] = np.random.default_rng(5).normal(size=(N, D))
    estimator = LayerwiseLogisticRegression(C=[1e-3, 1.0], validation_fraction=0.3).fit(X, y)
    assert estimator.C_.tolist() == [1e-3, 1.0, 1.0]
    for layer, strength in enumerate(estimator.C_):
        single = LayerwiseLogisticRegression(C=strength).fit(X[layer], y)
        np.testing.assert_allclose(estimator.coef_[layer], single.coef_, rtol=1e-3, atol=1e-5)


def test_one_layer_has_the_shapes_of_scikit_learn():
    X = features()
    two = labels(X, 1)[:, 0]
    four = classes(X)
    columns = labels(X, 3)
    for y in (two, four, columns):
        layered = LayerwiseLogisticRegression(C=[0.1, 1.0]).fit(X[:1], y)
        estimator = LayerwiseLogisticRegression(C=[0.1, 1.0]).fit(X[0], y)
        model = OneVsRestClassifier(reference()) if y is columns else reference()
        model.fit(X[0], y)
        for method in ("decision_function", "predict_proba", "predict"):
            values = getattr(estimator, method)(X[0])
            assert values.shape == getattr(model, method)(X[0]).shape
            np.testing.assert_array_equal(values, getattr(layered, method)(X[:1])[0])
        for name in ("coef_", "intercept_", "n_iter_", "converged_", "C_"):
            np.testing.assert_array_equal(getattr(estimator, name), getattr(layered, name)[0])
        assert isinstance(estimator.score(X[0], y), float)
        assert layered.score(X[:1], y).shape == (1,)
    assert LayerwiseLogisticRegression().fit(X[0], two).coef_.shape == (1, D)
    assert LayerwiseLogisticRegression().fit(X[0], four).coef_.shape == (4, D)


def test_tensors_half_precision_and_one_array_per_layer_are_taken():
    X = features().astype(np.float16)
    y = labels(X.astype(float), 2)
    expected = LayerwiseLogisticRegression().fit(X.astype(np.float32), y)
    tensor = torch.from_numpy(X.astype(np.float32))
    forms = [X, torch.from_numpy(X), tensor.requires_grad_(), list(X), tuple(tensor)]
    for form in forms:
        estimator = LayerwiseLogisticRegression().fit(
            form, torch.from_numpy(y), mask=torch.ones(N, 2)
        )
        np.testing.assert_array_equal(estimator.coef_, expected.coef_)
        np.testing.assert_array_equal(
            estimator.predict(form), expected.predict(X.astype(np.float32))
        )
    assert LayerwiseLogisticRegression().fit(tensor.bfloat16(), y).coef_.shape == (LAYERS, 2, D)


def test_groups_of_layers_that_fit_in_memory_give_the_same():
    X = features()
    y = classes(X)
    whole = LayerwiseLogisticRegression(C=[0.1, 1.0]).fit(X, y)
    small = LayerwiseLogisticRegression(C=[0.1, 1.0], memory_gb=1e-6).fit(X, y)
    assert small.C_.tolist() == whole.C_.tolist()
    np.testing.assert_allclose(small.predict_proba(X), whole.predict_proba(X), atol=1e-3)


def test_a_constant_feature_counts_for_nothing():
    X = features()
    y = labels(X, 1)[:, 0]
    X[:, :, 3] = 7.0
    estimator = LayerwiseLogisticRegression().fit(X, y)
    assert (estimator.coef_[:, :, 3] == 0).all()
    moved = X.copy()
    moved[:, :, 3] = 8.0
    np.testing.assert_array_equal(estimator.predict_proba(moved), estimator.predict_proba(X))


def test_it_works_in_tools_of_scikit_learn():
    X = features()[0]
    y = classes(features())
    search = GridSearchCV(LayerwiseLogisticRegression(), {"C": [1e-6, 1.0]}, cv=3)
    assert search.fit(pd.DataFrame(X).add_prefix("f"), y).best_params_ == {"C": 1.0}
    twin = clone(LayerwiseLogisticRegression(C=[1.0, 2.0], tol=1e-3))
    assert twin.get_params()["C"] == [1.0, 2.0]


def test_problems_that_do_not_converge_are_named():
    X = features()
    y = labels(X, 2)
    with pytest.warns(ConvergenceWarning, match=r"6 of 6 problems .* layer 0, column 0: raise"):
        estimator = LayerwiseLogisticRegression(max_iter=1).fit(X, y)
    assert not estimator.converged_.any()
    assert (estimator.n_iter_ == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"C": 0}, "C=0: give a number above 0"),
        ({"C": []}, "give a number above 0, or a list"),
        ({"C": [1.0, float("nan")]}, "give a number above 0"),
        ({"C": float("inf")}, "give finite numbers"),
        ({"tol": 0}, "tol=0: give a number above 0"),
        ({"C": [0.1, 1.0], "validation_fraction": 1.0}, "give a share between 0 and 1"),
        ({"C": [0.1, 1.0], "validation_fraction": 0.001}, "another validation_fraction, or a sing"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    X = features()
    with pytest.raises(ValueError, match=message):
        LayerwiseLogisticRegression(**options).fit(X, classes(X))


def faulty_inputs():
    X = features()
    y = labels(X, 1)[:, 0]
    columns = labels(X, 3)
    not_finite = X.copy()
    not_finite[2, 4, 5] = np.inf
    constant = columns.copy()
    constant[:, 1] = 1
    ragged = [*X[:2], X[2, :, :4]]
    mask_of_ones = np.ones((N, 3))
    mask_of_ones[:, 1] = columns[:, 1]
    return {
        "not finite": (not_finite, y, None, "X, layer 2, contains NaN or inf in 1 of 150 exampl"),
        "four axes": (X[None], y, None, r"X has 4 axes: give it the shape \(layers, n, d\)"),
        "widths": (ragged, y, None, "layers of another width to another estimator"),
        "too few labels": (X, y[:-1], None, "y has 149 rows, but X has 150 examples per layer"),
        "transposed": (X.swapaxes(0, 1), y, None, "y has 150 rows, but X has 3 examples per lay"),
        "no labels": (X, None, None, "give labels"),
        "one class": (X, y * 0, None, "y has one class only"),
        "one class where it counts": (X, y, y, "y has one class only, 1: add examples"),
        "constant column": (X, constant, None, "1 of 3 columns .* column 1: leave these columns"),
        "column constant in mask": (X, columns, mask_of_ones, "1 of 3 columns .* column 1: leave"),
        "other values": (X, columns + 1, None, "other values than 0 and 1: give each class a col"),
        "short mask": (X, y, np.ones(N - 1), "mask of y has 149 rows, but y has 150: give it"),
        "wide mask": (X, columns, np.ones((N, 2)), r"2 columns, but y makes 3: give it the shape"),
        "soft mask": (X, y, np.full(N, 0.5), "other values than 0 and 1: put 1 where"),
        "empty mask": (X, y, np.zeros(N), "mask of y is 0 everywhere: put 1"),
    }


@pytest.mark.parametrize("name", faulty_inputs())
def test_faulty_input_is_refused_with_the_fix(name):
    X, y, mask, message = faulty_inputs()[name]
    with pytest.raises(ValueError, match=message):
        LayerwiseLogisticRegression().fit(X, y, mask=mask)


def test_validation_must_fit_what_is_trained_on():
    X = features()
    y = classes(X)
    several = LayerwiseLogisticRegression(C=[0.1, 1.0])
    cases = [
        (X, r"give \(X_val, y_val\)"),
        ((X[:2], y), r"X_val has the shape \(2, 150, 8\), but X has the shape \(3, n, d\)"),
        ((X[0], y), r"X_val has the shape \(150, 8\)"),
        ((X, np.where(y == "cat", "cow", y)), "labels that y does not have in fit, such as .*cow"),
        ((X, labels(X, 4)), r"y_val has the shape \(150, 4\), but y had \(n,\) in fit"),
        ((X, y[:-1]), "y_val has 149 rows"),
        ((np.where(X > 10, np.nan, X), y), "X_val, layer 0, contains NaN"),
    ]
    for validation, message in cases:
        with pytest.raises(ValueError, match=message):
            several.fit(X, y, validation=validation)


def test_prediction_wants_the_layers_of_fit():
    X = features()
    y = labels(X, 2)
    with pytest.raises(NotFittedError):
        LayerwiseLogisticRegression().predict(X)
    estimator = LayerwiseLogisticRegression().fit(X, y)
    with pytest.raises(ValueError, match=r"\(2, 150, 8\), but X had the shape \(3, n, d\) in fit"):
        estimator.predict(X[:2])
    with pytest.raises(ValueError, match=r"\(150, 8\), but X had the shape \(3, n, d\) in fit"):
        estimator.predict_proba(X[0])
    with pytest.raises(ValueError, match="X has 7 features"):
        estimator.predict(X[..., 1:])
    with pytest.raises(ValueError, match=r"y has the shape \(150,\), but y had \(n, 2\) in fit"):
        estimator.score(X, y[:, 0])


def test_the_examples_of_the_docstring_are_right():
    result = doctest.testmod(estimators)
    assert result.attempted > 5
    assert result.failed == 0
