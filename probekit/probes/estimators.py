"""Logistic regression of all layers at once as a scikit-learn estimator, for arrays of your own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from probekit.probes.logreg import Features, Solution, choose_logreg, feature_spread, solve_logreg

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class LayerwiseLogisticRegression(ClassifierMixin, BaseEstimator):
    r"""L2-regularised logistic regressions on many layers, solved side by side.

    Each layer has its own features, all have the same examples and labels. For each layer and
    column of 0/1 labels, this is the optimum of scikit-learn's ``LogisticRegression(C=C)``, after a
    ``StandardScaler`` of that layer unless `standardize` is False. More than two classes are
    one-vs-rest, as in ``OneVsRestClassifier(LogisticRegression(C=C))``.

    Parameters
    ----------
    C : float or sequence of float, default=1.0
        Inverse strength of regularisation. Out of several, each layer takes the one with the lowest
        log loss on `validation` (see :meth:`fit`) or on held-out examples, summed over all columns
        of labels. They are tried from the smallest on, until that loss has risen twice.
    standardize : bool, default=True
        Fit on features with mean 0 and standard deviation 1, measured on the training examples:
        the penalty then acts on the weights of standardised features. A constant feature has the
        weight 0.
    tol : float, default=1e-5
        Largest norm of the gradient of a converged problem. The objective is a mean over examples,
        see Notes.
    max_iter : int, default=60
        Newton steps before a problem is given up, with a ``ConvergenceWarning``.
    memory_gb : float, default=2.0
        About how much is held besides `X`, in 10^9 bytes; layers are fitted in groups that fit.
    device : str, torch.device or None, default=None
        Where to solve; None takes ``"cuda"`` where there is one, else ``"cpu"``.
    random_state : int, RandomState instance or None, default=0
        Seed of which examples are held out.
    validation_fraction : float, default=0.2
        Share of the examples that is held out to choose among several `C` when no `validation` is
        given; with the same share of each class if `y` is (n,). Examples are held out one by one:
        if several of them share an image, split by image yourself and give `validation`.

    Attributes
    ----------
    coef_ : ndarray
        (layers, k, d) weights, in the units of `X` also if `standardize` is True: `X` times
        `coef_`, plus `intercept_`, are the log-odds. k is 1 for two classes, else the number of
        classes or columns.
    intercept_ : ndarray
        (layers, k) intercepts.
    classes_ : ndarray
        The classes in sorted order; for columns of labels, their numbers.
    C_ : ndarray
        (layers,) the inverse strength of each layer; a float after a 2-D `X`.
    n_iter_ : ndarray
        (layers, k) Newton steps that were taken.
    converged_ : ndarray
        (layers, k) whether the gradient is within `tol`, and a further step would gain nothing.
    multilabel_ : bool
        Whether `y` had several columns.
    n_features_in_ : int
        d, the number of features.
    feature_names_in_ : ndarray
        (d,) names of the features; only after a 2-D `X` with column names that are all strings.

    See Also
    --------
    probekit.probes.logreg.solve_logreg : The solver, on tensors.

    Notes
    -----
    With one layer as a 2-D `X` (n, d), all attributes and results lose their first axis and have
    scikit-learn's own shapes.

    With the features x of a layer, standardised if so asked, the labels y and the mask m of a
    column and :math:`n_m = \sum_i m_i`, the weights w and the intercept b minimise

    .. math:: \frac{1}{n_m} \sum_i m_i \log(1 + e^{-(2 y_i - 1) (x_i w + b)})
              + \frac{1}{2 C n_m} \lVert w \rVert^2

    They are solved in float32 by a Newton method that shares the matrix products of a layer between
    the columns; ``benchmarks/probe.py`` measured it 20 to 40 times faster than a loop over
    ``LogisticRegression``.

    Examples
    --------
    The second of three layers carries the label:

    >>> import numpy as np
    >>> from probekit import LayerwiseLogisticRegression
    >>> rng = np.random.default_rng(0)
    >>> y = rng.choice(["cat", "dog"], 300)
    >>> X = rng.normal(size=(3, 300, 8))
    >>> X[1, :, 0] += 4 * (y == "dog")
    >>> probe = LayerwiseLogisticRegression(C=[0.01, 0.1, 1.0])
    >>> probe.fit(X[:, :200], y[:200], validation=(X[:, 200:250], y[200:250])).coef_.shape
    (3, 1, 8)
    >>> int(probe.score(X[:, 250:], y[250:]).argmax())
    1

    Several sets of labels at once, each with the examples that count for it:

    >>> labels = np.stack([y == "dog", rng.integers(0, 2, 300)], axis=1)
    >>> mask = rng.integers(0, 2, labels.shape)
    >>> LayerwiseLogisticRegression().fit(X, labels, mask=mask).predict_proba(X).shape
    (3, 300, 2)

    One layer has scikit-learn's shapes:

    >>> LayerwiseLogisticRegression().fit(X[1], y).predict_proba(X[1]).shape
    (300, 2)
    """

    def __init__(
        self,
        C: float | Sequence[float] = 1.0,
        *,
        standardize: bool = True,
        tol: float = 1e-5,
        max_iter: int = 60,
        memory_gb: float = 2.0,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = 0,
        validation_fraction: float = 0.2,
    ):
        self.C = C
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.memory_gb = memory_gb
        self.device = device
        self.random_state = random_state
        self.validation_fraction = validation_fraction

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.classifier_tags.multi_label = True
        return tags

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        validation: Sequence[ArrayLike] | None = None,
    ) -> LayerwiseLogisticRegression:
        """Fit one logistic regression for each layer and column of labels.

        Parameters
        ----------
        X : array-like
            (layers, n, d) features, or (n, d) of one layer: arrays or torch tensors of any
            precision, or a sequence with one of them per layer.
        y : array-like
            (n,) labels of two or more classes, or (n, k) columns of 0 and 1: several sets of labels
            of the same examples, or one multilabel set. A single column (n, 1) counts as (n,).
        mask : array-like or None
            1 where an entry of `y` counts, else 0: (n, k), or (n,) for whole examples. For (n,)
            labels of more than two classes, k is the number of classes. Entries that do not count
            may hold anything; examples that count nowhere are left out altogether. None counts
            everything.
        validation : tuple or None
            ``(X_val, y_val)`` or ``(X_val, y_val, mask_val)``, shaped like `X`, `y` and `mask`: to
            choose among several `C`. None holds out `validation_fraction` of the examples for that
            choice, and then fits all examples with the chosen `C`. A single `C` needs neither.

        Returns
        -------
        LayerwiseLogisticRegression
            The fitted estimator itself.

        Raises
        ------
        ValueError
            Shapes do not fit together, `X` is not finite, a column has one class only, or a
            parameter is out of range. The message names the fix.

        Warns
        -----
        ConvergenceWarning
            Problems did not converge within `max_iter` steps.
        """
        strengths = self._check_parameters()
        x_lnd, is_layered = self._check_features(X, reset=True)
        labels = self._check_labels(y, mask, n=x_lnd.shape[1], reset=True)
        self._check_both_answers(labels)
        rows = np.flatnonzero(labels.counting_n)

        if len(strengths) == 1:
            strength_l = np.full(len(x_lnd), strengths[0])
        else:
            if validation is None:
                train, validation_rows = self._hold_out(labels, rows)
                x_validation = x_lnd
                validation_labels = labels
            else:
                train = rows
                x_validation, validation_labels = self._check_validation(
                    validation, n_layers=len(x_lnd), is_layered=is_layered
                )
                validation_rows = np.flatnonzero(validation_labels.counting_n)
            strength_l = self._choose_strengths(
                x_lnd,
                labels,
                train=train,
                x_validation=x_validation,
                validation_labels=validation_labels,
                validation_rows=validation_rows,
                strengths=strengths,
            )
        self._fit_layers(x_lnd, labels, rows=rows, strength_l=strength_l)
        self.C_: np.ndarray | float = strength_l if is_layered else float(strength_l[0])
        if not is_layered:
            for name in ("coef_", "intercept_", "n_iter_", "converged_"):
                setattr(self, name, getattr(self, name)[0])
        return self

    def _check_parameters(self) -> list[float]:
        """Return the values of C."""
        strengths = np.atleast_1d(np.asarray(self.C, dtype=float))
        if strengths.ndim > 1 or len(strengths) == 0 or not (strengths > 0).all():
            raise ValueError(f"C={self.C!r}: give a number above 0, or a list of them")
        if not np.isfinite(strengths).all():
            raise ValueError(f"C={self.C!r}: give finite numbers; a large C has almost no penalty")
        for name in ("tol", "max_iter", "memory_gb"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}={value!r}: give a number above 0")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction!r}: give a share between 0 and 1"
            )
        return strengths.tolist()

    def _check_features(
        self, X: ArrayLike, *, reset: bool, name: str = "X"
    ) -> tuple[np.ndarray, bool]:
        """Return X as (l, n, d) float32 or float64, and whether it came with an axis of layers.

        `reset` is True in fit.
        """
        X = _to_numpy(X)
        axes = X.ndim if hasattr(X, "ndim") else _stack(X, name).ndim
        if axes > 3:
            raise ValueError(
                f"{name} has {axes} axes: give it the shape (layers, n, d), or (n, d) for one "
                "layer, with one vector per example"
            )
        if axes == 3:
            X = _stack(X, name)
            n_layers, n, d = X.shape
            # All layers below each other: scikit-learn counts the features of 2-D arrays.
            X = X.reshape(n_layers * n, d)
        rows = validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_all_finite=False
        )
        x_lnd = rows.reshape(n_layers, n, d) if axes == 3 else rows[None]
        for layer, x_nd in enumerate(x_lnd):
            _check_finite(x_nd, f"{name}, layer {layer}," if axes == 3 else name)
        return x_lnd, axes == 3

    def _check_labels(
        self, y: ArrayLike, mask: ArrayLike | None, *, n: int, reset: bool, name: str = "y"
    ) -> _Labels:
        """Return y as columns of 0 and 1; set the classes if `reset`, else check against them."""
        targets = self._check_targets(y, n=n, name=name)
        mask_nm = _check_mask(mask, n=n, name=name)
        counting_n = (mask_nm > 0).any(1)
        if not counting_n.any():
            raise ValueError(f"the mask of {name} is 0 everywhere: put 1 where an entry counts")
        is_multilabel = targets.ndim == 2
        if not is_multilabel:
            check_classification_targets(targets[counting_n])
        if reset:
            self.multilabel_ = is_multilabel
            if is_multilabel:
                self.classes_ = np.arange(targets.shape[1])
            else:
                self.classes_ = np.unique(targets[counting_n])
        else:
            self._check_shape_of_fit(targets, name)
        k = 1 if self._is_one_column() else len(self.classes_)
        if mask_nm.shape[1] not in (1, k):
            raise ValueError(
                f"the mask of {name} has {mask_nm.shape[1]} columns, but {name} makes {k}: give it "
                f"the shape (n,) or (n, {k}), with 1 where an entry counts"
            )
        mask_nk = np.broadcast_to(mask_nm, (n, k))
        if is_multilabel:
            y_nk = np.where(mask_nk > 0, targets, 0)
            if not np.isin(y_nk, (0, 1)).all():
                raise ValueError(
                    f"{name} has several columns, with other values than 0 and 1: give each class "
                    "a column of 0 and 1, or one label per example with the shape (n,)"
                )
        else:
            unseen = np.setdiff1d(targets[counting_n], self.classes_).tolist()
            if unseen:
                raise ValueError(
                    f"{name} has labels that y does not have in fit, such as {unseen[0]!r}: leave "
                    "these examples out"
                )
            # One column stands for two classes: it is 1 for the second.
            y_nk = targets[:, None] == self.classes_[-k:]
        return _Labels(
            y_nk=y_nk.astype(np.float32),
            mask_nk=mask_nk.astype(np.float32),
            classes=None if is_multilabel else targets,
        )

    def _check_targets(self, y: ArrayLike, *, n: int, name: str) -> np.ndarray:
        """Return y as an array (n,), or (n, k) with two or more columns."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: give "
                "labels (n,) or columns of 0 and 1 (n, k)"
            )
        targets: np.ndarray = check_array(
            _to_numpy(y), ensure_2d=False, dtype=None, ensure_all_finite=False, input_name=name
        )
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = column_or_1d(targets, warn=True)
        if len(targets) != n:
            raise ValueError(
                f"{name} has {len(targets)} rows, but X has {n} examples per layer: X is "
                f"(layers, n, d), or (n, d) for one layer, and {name} is (n,) or (n, k)"
            )
        return targets

    def _check_shape_of_fit(self, targets: np.ndarray, name: str) -> None:
        columns = (len(self.classes_),) if self.multilabel_ else ()
        if targets.shape[1:] != columns:
            expected = f"(n, {len(self.classes_)})" if self.multilabel_ else "(n,)"
            raise ValueError(
                f"{name} has the shape {targets.shape}, but y had {expected} in fit: give the same "
                "labels"
            )

    def _check_both_answers(self, labels: _Labels) -> None:
        if len(self.classes_) == 1:
            raise ValueError(
                f"y has one class only, {self.classes_.tolist()[0]!r}: add examples of a second "
                "class"
            )
        count_k = labels.mask_nk.sum(0)
        positive_k = (labels.mask_nk * labels.y_nk).sum(0)
        constant = np.flatnonzero((positive_k == 0) | (positive_k == count_k))
        if len(constant):
            raise ValueError(
                f"{len(constant)} of {len(count_k)} columns of y have one class only where they "
                f"count, the first is column {constant[0]}: leave these columns out, or add "
                "examples with the other label"
            )

    def _check_validation(
        self, validation: Sequence[ArrayLike], *, n_layers: int, is_layered: bool
    ) -> tuple[np.ndarray, _Labels]:
        if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
            raise ValueError("validation: give (X_val, y_val) or (X_val, y_val, mask_val)")
        X_val, y_val = validation[:2]
        mask_val = validation[2] if len(validation) == 3 else None
        x_lnd, validation_is_layered = self._check_features(X_val, reset=False, name="X_val")
        if len(x_lnd) != n_layers or validation_is_layered != is_layered:
            expected = f"({n_layers}, n, d)" if is_layered else "(n, d)"
            raise ValueError(
                f"X_val has {_describe_layers(x_lnd, validation_is_layered)}, but X has the shape "
                f"{expected}: give the same layers"
            )
        labels = self._check_labels(y_val, mask_val, n=x_lnd.shape[1], reset=False, name="y_val")
        return x_lnd, labels

    def _hold_out(self, labels: _Labels, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Divide the rows into those that stay and those that are held out."""
        try:
            train, held_out = train_test_split(
                rows,
                test_size=self.validation_fraction,
                random_state=self.random_state,
                stratify=None if labels.classes is None else labels.classes[rows],
            )
        except ValueError as error:
            raise ValueError(
                f"no examples can be held out to choose C ({error}): give "
                "validation=(X_val, y_val), another validation_fraction, or a single C"
            ) from error
        return train, held_out

    def _choose_strengths(
        self,
        x_lnd: np.ndarray,
        labels: _Labels,
        *,
        train: np.ndarray,
        x_validation: np.ndarray,
        validation_labels: _Labels,
        validation_rows: np.ndarray,
        strengths: Sequence[float],
    ) -> np.ndarray:
        """Return (l,) the C of each layer that has the lowest log loss on validation."""
        device = self._device()
        train_labels = labels.select(train)
        held_out_labels = validation_labels.select(validation_rows)
        y_nk = np.concatenate([train_labels.y_nk, held_out_labels.y_nk])
        train_nk = np.zeros_like(y_nk)
        train_nk[: len(train)] = train_labels.mask_nk
        held_out_nk = np.zeros_like(y_nk)
        held_out_nk[len(train) :] = held_out_labels.mask_nk
        best_l = np.empty(len(x_lnd), int)
        for group in self._layer_groups(x_lnd, np.arange(len(x_lnd))):
            x_group = x_lnd[np.ix_(group, train)]
            scaler = _Scaler.fit(x_group, self.standardize)
            x_held_out = scaler.transform(x_validation[np.ix_(group, validation_rows)])
            x_both = torch.cat([scaler.transform(x_group), x_held_out], 1).to(device)
            choice = choose_logreg(
                Features(x_both, torch.arange(len(train), device=device)),
                torch.from_numpy(y_nk)[:, None].to(device),
                train_nsk=torch.from_numpy(train_nk)[:, None].to(device),
                validation_nsk=torch.from_numpy(held_out_nk)[:, None].to(device),
                strengths=strengths,
                tolerance=None,
                max_steps=self.max_iter,
                memory_gb=self.memory_gb,
            )
            best_l[group] = choice.strength_ls[:, 0].cpu().numpy()
        return np.asarray(strengths)[best_l]

    def _fit_layers(
        self,
        x_lnd: np.ndarray,
        labels: _Labels,
        *,
        rows: np.ndarray,
        strength_l: np.ndarray,
    ) -> None:
        """Set the fitted attributes of all layers, each with its C."""
        n_layers, _, d = x_lnd.shape
        k = labels.y_nk.shape[1]
        labels = labels.select(rows)
        self.coef_ = np.empty((n_layers, k, d))
        self.intercept_ = np.empty((n_layers, k))
        self.n_iter_ = np.empty((n_layers, k), int)
        self.converged_ = np.empty((n_layers, k), bool)
        for strength in np.unique(strength_l):
            for group in self._layer_groups(x_lnd, np.flatnonzero(strength_l == strength)):
                x_group = x_lnd[np.ix_(group, rows)]
                scaler = _Scaler.fit(x_group, self.standardize)
                solution = self._solve(
                    scaler.transform(x_group), labels, strengths=[float(strength)]
                )
                weight_lkd = solution.weight_ldsk[:, :, 0].mT.cpu().double().numpy()
                intercept_lk = solution.intercept_lsk[:, 0].cpu().double().numpy()
                coef_lkd = weight_lkd / scaler.scale_ld[:, None]
                self.coef_[group] = coef_lkd
                self.intercept_[group] = intercept_lk - np.einsum(
                    "lkd,ld->lk", coef_lkd, scaler.mean_ld
                )
                self.n_iter_[group] = solution.steps_lsk[:, 0].cpu().numpy()
                self.converged_[group] = solution.converged_lsk[:, 0].cpu().numpy()
        unconverged = np.argwhere(~self.converged_)
        if len(unconverged):
            layer, column = unconverged[0]
            warnings.warn(
                f"{len(unconverged)} of {self.converged_.size} problems did not converge in "
                f"max_iter={self.max_iter} steps, the first in layer {layer}, column {column}: "
                "raise max_iter or tol, lower C, or set standardize=True",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _layer_groups(self, x_lnd: np.ndarray, layers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the numbers of layers in groups that are fitted together."""
        # A copy of X and two more in float64, and one in float32, while it is standardised.
        bytes_per_layer = 28 * x_lnd.shape[1] * x_lnd.shape[2]
        size = max(1, int(self.memory_gb * 1e9 / bytes_per_layer))
        for start in range(0, len(layers), size):
            yield layers[start : start + size]

    def _device(self) -> str | torch.device:
        if self.device is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def _solve(
        self, x_lnd: torch.Tensor, labels: _Labels, *, strengths: Sequence[float]
    ) -> Solution:
        device = self._device()
        return solve_logreg(
            x_lnd.to(device),
            torch.from_numpy(labels.y_nk).to(device),
            mask_nk=torch.from_numpy(labels.mask_nk).to(device),
            strengths=strengths,
            tolerance=self.tol,
            max_steps=self.max_iter,
            memory_gb=self.memory_gb,
        )

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Return the log-odds of each class.

        Parameters
        ----------
        X : array-like
            (layers, n, d) features, or (n, d) if the estimator was fitted on one layer.

        Returns
        -------
        ndarray
            (layers, n) of ``classes_[1]`` for two classes, else (layers, n, k): the log-odds of
            each class against the rest, or of 1 in each column. A 2-D `X` has no first axis.
        """
        scores = self._scores(X)
        if self._is_one_column():
            scores = scores[..., 0]
        return scores if self._is_layered() else scores[0]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Return the probability of each class.

        Parameters
        ----------
        X : array-like
            (layers, n, d) features, or (n, d) if the estimator was fitted on one layer.

        Returns
        -------
        ndarray
            (layers, n, classes), summing to 1: for more than two classes, the probabilities of each
            class against the rest, divided by their sum. For columns of labels (layers, n, k), the
            probability of 1 in each. A 2-D `X` has no first axis.
        """
        p_lnk = expit(self._scores(X))
        if self._is_one_column():
            p_lnk = np.concatenate([1 - p_lnk, p_lnk], axis=-1)
        elif not self.multilabel_:
            p_lnk = p_lnk / p_lnk.sum(-1, keepdims=True).clip(np.finfo(float).tiny)
        return p_lnk if self._is_layered() else p_lnk[0]

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the most probable class of each example.

        Parameters
        ----------
        X : array-like
            (layers, n, d) features, or (n, d) if the estimator was fitted on one layer.

        Returns
        -------
        ndarray
            (layers, n) classes; for columns of labels (layers, n, k) of 0 and 1. A 2-D `X` has no
            first axis.
        """
        scores = self.decision_function(X)
        if self.multilabel_:
            return (scores > 0).astype(int)
        if self._is_one_column():
            return self.classes_[(scores > 0).astype(int)]
        return self.classes_[scores.argmax(-1)]

    def score(
        self, X: ArrayLike, y: ArrayLike, *, mask: ArrayLike | None = None
    ) -> np.ndarray | float:
        """Return the accuracy of each layer.

        Parameters
        ----------
        X : array-like
            (layers, n, d) features, or (n, d) if the estimator was fitted on one layer.
        y : array-like
            (n,) labels, or (n, k) columns of 0 and 1.
        mask : array-like or None
            1 where an entry of `y` counts, else 0: (n,), or (n, k) for columns. None counts
            everything.

        Returns
        -------
        ndarray or float
            (layers,) share of the examples whose class is predicted. For columns of labels it is
            the share of the entries that count, not of the examples with all columns right. A
            float after a 2-D `X`.
        """
        predicted = self.predict(X)
        if self.multilabel_:
            labels = self._check_labels(y, mask, n=predicted.shape[-2], reset=False)
            right = (predicted == labels.y_nk) * labels.mask_nk
            accuracy = right.sum((-2, -1)) / labels.mask_nk.sum()
        else:
            n = predicted.shape[-1]
            targets = self._check_targets(y, n=n, name="y")
            counting_n = (_check_mask(mask, n=n, name="y") > 0).any(1)
            accuracy = np.equal(predicted, targets)[..., counting_n].mean(-1)
        return accuracy if self._is_layered() else float(accuracy)

    def _is_layered(self) -> bool:
        """Return whether the estimator was fitted on X with an axis of layers."""
        return self.coef_.ndim == 3

    def _is_one_column(self) -> bool:
        """Return whether one column of log-odds stands for two classes."""
        return not self.multilabel_ and len(self.classes_) <= 2

    def _scores(self, X: ArrayLike) -> np.ndarray:
        """Return the log-odds (l, n, k); l is 1 for a 2-D X."""
        check_is_fitted(self)
        x_lnd, is_layered = self._check_features(X, reset=False)
        coef_lkd = self.coef_ if self._is_layered() else self.coef_[None]
        intercept_lk = self.intercept_ if self._is_layered() else self.intercept_[None]
        if is_layered != self._is_layered() or len(x_lnd) != len(coef_lkd):
            expected = f"({len(coef_lkd)}, n, d)" if self._is_layered() else "(n, d)"
            raise ValueError(
                f"X has {_describe_layers(x_lnd, is_layered)}, but X had the shape {expected} in "
                "fit: give the same layers"
            )
        # One layer at a time: the product needs a copy of the layer in float64.
        scores = [
            x_nd @ coef_kd.T + intercept_k
            for x_nd, coef_kd, intercept_k in zip(x_lnd, coef_lkd, intercept_lk, strict=True)
        ]
        return np.stack(scores)


@dataclass(frozen=True)
class _Labels:
    """Labels of n examples as k columns.

    Attributes
    ----------
    y_nk : ndarray
        (n, k) float32, 0 or 1.
    mask_nk : ndarray
        (n, k) float32, 1 where an entry counts.
    classes : ndarray or None
        (n,) the labels as they were given; None if they were columns.
    """

    y_nk: np.ndarray
    mask_nk: np.ndarray
    classes: np.ndarray | None

    @property
    def counting_n(self) -> np.ndarray:
        """Which examples count for at least one column."""
        return np.any(self.mask_nk > 0, axis=1)

    def select(self, rows: np.ndarray) -> _Labels:
        """Return the labels of some of the examples."""
        return _Labels(
            y_nk=self.y_nk[rows],
            mask_nk=self.mask_nk[rows],
            classes=None if self.classes is None else self.classes[rows],
        )


@dataclass(frozen=True)
class _Scaler:
    """The float64 means and scales (l, d) that features are standardised with."""

    mean_ld: np.ndarray
    scale_ld: np.ndarray

    @classmethod
    def fit(cls, x_lnd: np.ndarray, standardize: bool) -> _Scaler:
        if not standardize:
            shape = (x_lnd.shape[0], x_lnd.shape[2])
            return cls(np.zeros(shape), np.ones(shape))
        mean_ld, scale_ld = feature_spread(torch.tensor(x_lnd, dtype=torch.float64))
        return cls(mean_ld.numpy(), scale_ld.numpy())

    def transform(self, x_lnd: np.ndarray) -> torch.Tensor:
        standardised = (x_lnd - self.mean_ld[:, None]) / self.scale_ld[:, None]
        return torch.from_numpy(standardised.astype(np.float32))


def _to_numpy(values: Any) -> Any:
    """Return torch tensors as arrays, and half precision as float32; leave the rest as it is."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        return values.numpy()
    if getattr(values, "dtype", None) == np.float16:
        return values.astype(np.float32)
    return values


def _stack(values: Any, name: str) -> np.ndarray:
    """Return a sequence of layers, or anything else like an array, as one array."""
    if isinstance(values, (list, tuple)):
        values = [_to_numpy(layer) for layer in values]
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be one array ({error}): all layers need the same shape (n, d); give "
            "layers of another width to another estimator"
        ) from error


def _check_finite(x_nd: np.ndarray, place: str) -> None:
    bad_nd = ~np.isfinite(x_nd)
    if bad_nd.any():
        row, feature = np.argwhere(bad_nd)[0]
        raise ValueError(
            f"{place} contains NaN or inf in {int(bad_nd.any(1).sum())} of {len(x_nd)} examples, "
            f"first in example {row}, feature {feature}: leave these examples out; if half "
            "precision overflowed, take the features in bfloat16 or float32"
        )


def _check_mask(mask: ArrayLike | None, *, n: int, name: str) -> np.ndarray:
    """Return the mask as (n, 1) or (n, m)."""
    if mask is None:
        return np.ones((n, 1), np.float32)
    mask_nm: np.ndarray = check_array(_to_numpy(mask), ensure_2d=False, input_name="mask")
    if mask_nm.ndim == 1:
        mask_nm = mask_nm[:, None]
    if len(mask_nm) != n:
        raise ValueError(
            f"the mask of {name} has {len(mask_nm)} rows, but {name} has {n}: give it the shape of "
            f"{name}, with 1 where an entry counts"
        )
    if not np.isin(mask_nm, (0, 1)).all():
        raise ValueError(
            f"the mask of {name} has other values than 0 and 1: put 1 where an entry counts, else 0"
        )
    return mask_nm


def _describe_layers(x_lnd: np.ndarray, is_layered: bool) -> str:
    return f"the shape {x_lnd.shape if is_layered else x_lnd.shape[1:]}"
