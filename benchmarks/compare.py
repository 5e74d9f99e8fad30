"""The statistics held against known truth: simulated studies of many layers.

    python benchmarks/compare.py [--studies 300] [--quick] [--json PATH]

Examples are easy or hard for all layers alike (which pairing is for), and the examples of one image
resemble each other (which resampling by image is for). There are two kinds of study, both with
exact truth: `accuracy` of a binary task, and `f1_macro` of six classes, whose prevalence goes from
one half down to 3 %.

coverage   95 % intervals of scores, of differences between named layers, of two models on the same
           and on different images, and of each layer's gap to the best of the others; wanted: 92 to
           98 %
alarms     all layers equal: studies with any false alarm; wanted: at most 5 %
best       one layer is truly best, others are near it: studies that keep it among the candidates;
           wanted: 95 %
planted    20 layers, of which 5 to 9 are equally good: studies whose plateau is exactly 5 to 9, by
           alpha and effect
peaks      two models on the same images: studies whose intervals hold the place of the first one's
           peak and the movement, and that say that the peak moved, by the interval and by where the
           resamples peak; wanted: at least 95 %, and at most 5 % where nothing moved
probes     the same with features and fitted probes: only layers 5 to 9 carry the label; wanted: 95
           of 100

300 studies take half an hour on one core.
(This file is not called statistics.py, because Python would take it for its own module of that
name.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measuring import save_json
from scipy.stats import norm

from probekit.probes.bootstrap import Curve, bca_interval, bootstrap_curve
from probekit.probes.comparison import compare_layers, curve_difference
from probekit.probes.logreg import solve_logreg
from probekit.probes.metrics import ScoreKey, count_by_image, score_counts
from probekit.probes.peaks import compare_peaks, find_peak

PREVALENCE = np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.03])
THRESHOLD = 0.5  # of the f1_macro studies: a class is answered less often than it is shown
PLANTED = list(range(5, 10))
EXAMPLES_PER_IMAGE = 2

Shares = dict[str, float]


# ---- simulated studies ----


def draw_noise(rng: np.random.Generator, *, images: int, layers: int, classes: int) -> np.ndarray:
    """Draw standard normal values (images, examples, l, c) that resemble each other.

    Of the variance 20 % is the image's, 35 % the example's, and 15 % that of layer and image.
    """
    rest = rng.normal(size=(images, EXAMPLES_PER_IMAGE, layers, classes))
    of_image = rng.normal(size=(images, 1, 1, classes))
    of_example = rng.normal(size=(images, EXAMPLES_PER_IMAGE, 1, classes))
    of_layer_and_image = rng.normal(size=(images, 1, layers, classes))
    shared = np.sqrt(0.2) * of_image + np.sqrt(0.35) * of_example
    shared = shared + np.sqrt(0.15) * of_layer_and_image
    return np.sqrt(0.3) * rest + shared


def count_hits(p_lnc: np.ndarray, y_nc: np.ndarray, images: int) -> torch.Tensor:
    """Counts (images, l, c, 5) of answers 0 or 1."""
    image_n = np.repeat(np.arange(images), EXAMPLES_PER_IMAGE)
    return count_by_image(p_lnc, y_nc, mask_nc=np.ones_like(y_nc), image_n=image_n)


def simulate_accuracy(
    rng: np.random.Generator, images: int, strength_l: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Counts (images, l, 1, 5), and the true accuracies.

    These are the normal distribution at the strengths.
    """
    layers = len(strength_l)
    noise = draw_noise(rng, images=images, layers=layers, classes=1)
    right = (noise + strength_l[:, None] > 0)[..., 0]
    y = rng.integers(0, 2, (images, EXAMPLES_PER_IMAGE, 1))
    answers = right == y.astype(bool)
    p_lnc = answers.reshape(-1, layers, 1).swapaxes(0, 1)
    return count_hits(p_lnc, y.reshape(-1, 1), images), norm.cdf(strength_l)


def simulate_f1(
    rng: np.random.Generator,
    images: int,
    strength_l: np.ndarray,
    *,
    prevalence_c: np.ndarray = PREVALENCE,
) -> tuple[torch.Tensor, np.ndarray]:
    """Counts (images, l, c, 5), and the true macro F1.

    The truth comes from the expected hits and false alarms of each class.
    """
    layers = len(strength_l)
    classes = len(prevalence_c)
    of_image = rng.normal(size=(images, 1, classes))
    of_example = rng.normal(size=(images, EXAMPLES_PER_IMAGE, classes))
    y = np.sqrt(0.5) * (of_image + of_example) > -norm.ppf(prevalence_c)
    signal = np.where(y, 1, -1)[:, :, None] * strength_l[:, None]
    noise = draw_noise(rng, images=images, layers=layers, classes=classes)
    yes = signal + noise > THRESHOLD
    p_lnc = yes.reshape(-1, layers, classes).swapaxes(0, 1)
    counts = count_hits(p_lnc, y.reshape(-1, classes), images)
    hit_lc = prevalence_c * norm.cdf(strength_l - THRESHOLD)[:, None]
    false_alarm_lc = (1 - prevalence_c) * norm.cdf(-strength_l - THRESHOLD)[:, None]
    f1_lc = 2 * hit_lc / (hit_lc + false_alarm_lc + prevalence_c)
    return counts, f1_lc.mean(1)


KINDS = {
    "accuracy": simulate_accuracy,
    "f1_macro": simulate_f1,
    "f1_rare": partial(simulate_f1, prevalence_c=PREVALENCE[-1:]),
}


def score_study(kind: str, total: torch.Tensor) -> torch.Tensor:
    """Scores (b, l) of summed counts (b, l, c, 5)."""
    is_binary = kind == "accuracy"
    scores = score_counts(total, binary=is_binary)
    return scores[ScoreKey("accuracy" if is_binary else "f1_macro")]


def simulate_study(
    kind: str,
    rng: np.random.Generator,
    *,
    images: int,
    strength_l: np.ndarray,
    first_image: int = 0,
    seed: int = 0,
) -> tuple[Curve, np.ndarray]:
    """A curve and its truth; another `first_image` gives the images other names."""
    counts, truth_l = KINDS[kind](rng, images, strength_l)
    names = range(first_image, first_image + images)
    curve = bootstrap_curve(counts, names, score=partial(score_study, kind), seed=seed)
    return curve, truth_l


def mean_shares(studies: list[dict]) -> Shares:
    return pd.DataFrame(studies).mean().to_dict()


# ---- checks ----


def holds(lower: np.ndarray, upper: np.ndarray, truth: np.ndarray | float) -> float:
    """Share of intervals that hold the truth."""
    return float(((lower <= truth) & (truth <= upper)).mean())


def true_gaps(truth_l: np.ndarray) -> np.ndarray:
    """Each score minus the best of the others."""
    return np.array([truth - np.delete(truth_l, i).max() for i, truth in enumerate(truth_l)])


def to_selected_best(curve: Curve) -> pd.DataFrame:
    """The naive comparison: of each layer with the one that scores highest."""
    best = int(curve.score_l.argmax())
    layers = range(len(curve.score_l))
    return curve_difference(curve, curve.select([best] * len(layers)), layers=layers)


def coverage(kind: str, rng: np.random.Generator, *, images: int, studies: int) -> Shares:
    """Coverage of each kind of interval, over layers 0 to 7 of one model and 8 to 15 of another."""
    steps = np.linspace(0, 1.6, 8) if kind == "accuracy" else np.linspace(0.3, 1.6, 8)
    strength_l = np.r_[steps, steps[::-1]]
    seen = []
    for seed in range(studies):
        curve, truth_l = simulate_study(kind, rng, images=images, strength_l=strength_l, seed=seed)
        elsewhere, _ = simulate_study(
            kind, rng, images=images, strength_l=strength_l, first_image=images, seed=seed
        )
        one = curve.select(slice(8))
        true_one = truth_l[:8]
        true_difference = true_one - truth_l[8:]
        neighbours = curve_difference(
            one.select(slice(7)), one.select(slice(1, 8)), layers=range(7)
        )
        models = curve_difference(one, curve.select(slice(8, 16)), layers=range(8))
        other_images = curve_difference(one, elsewhere.select(slice(8, 16)), layers=range(8))
        gaps = compare_layers(one, range(8))
        naive = to_selected_best(one)
        percentiles = np.quantile(curve.resampled_bl, [0.025, 0.975], axis=0)
        seen.append(
            {
                "score": holds(*bca_interval(curve), truth_l),
                "score, percentile": holds(*percentiles, truth_l),
                "difference, layers": holds(
                    neighbours.lo, neighbours.hi, true_one[:-1] - true_one[1:]
                ),
                "difference, models": holds(models.lo, models.hi, true_difference),
                "difference, other images": holds(
                    other_images.lo, other_images.hi, true_difference
                ),
                "gap": holds(gaps.gap_lo, gaps.gap_hi, true_gaps(true_one)),
                "gap, naive": holds(naive.lo, naive.hi, true_one - true_one.max()),
            }
        )
    return mean_shares(seen)


def alarms(kind: str, rng: np.random.Generator, *, images: int, studies: int) -> Shares:
    """Share of studies with any false alarm where 12 layers are equal, and coverage of the gap."""
    seen = []
    for seed in range(studies):
        curve, _ = simulate_study(kind, rng, images=images, strength_l=np.full(12, 0.7), seed=seed)
        table = compare_layers(curve, range(12))
        naive = to_selected_best(curve)
        models = curve_difference(
            curve.select(slice(6)), curve.select(slice(6, 12)), layers=range(6)
        )
        seen.append(
            {
                "p": (table.p <= 0.05).any(),
                "p_holm": (table.p_holm <= 0.05).any(),
                "p_plateau <= .05": (table.p_plateau <= 0.05).any(),
                "outside plateau": not table.plateau.all(),
                "two models, p_holm": (models.p_holm <= 0.05).any(),
                "to the selected best, p_holm": (naive.p_holm <= 0.05).any(),
                "gap coverage": holds(table.gap_lo, table.gap_hi, 0),
                "gap coverage, naive": holds(naive.lo, naive.hi, 0),
            }
        )
    return mean_shares(seen)


def best(kind: str, rng: np.random.Generator, *, images: int, studies: int) -> Shares:
    """Share of studies that keep the one best of 12 layers; its neighbours are close below."""
    strength_l = 0.9 - 0.03 * np.abs(np.arange(12) - 6)
    seen = []
    for seed in range(studies):
        curve, _ = simulate_study(kind, rng, images=images, strength_l=strength_l, seed=seed)
        table = compare_layers(curve, range(12))
        order = np.argsort(-table.best_share)
        count = int(np.searchsorted(np.cumsum(table.best_share[order]), 0.95)) + 1
        seen.append(
            {
                "plateau": table.plateau[6],
                "p_plateau > .05": table.p_plateau[6] > 0.05,
                "p > .05": table.p[6] > 0.05,
                "95 % of best_share": 6 in set(order[:count]),
                "highest score": int(curve.score_l.argmax()) == 6,
                "layers in plateau": table.plateau.sum(),
                "layers at .05": (table.p_plateau > 0.05).sum(),
            }
        )
    return mean_shares(seen)


def peaked(layer: int, *, layers: int = 12) -> np.ndarray:
    """Strengths with a clear peak."""
    return 0.9 - 0.12 * np.abs(np.arange(layers) - layer)


# Strengths of two models, and how far the peak moves between them.
PAIRS = {
    "clear, same": (peaked(5), peaked(5), 0),
    "clear, +3": (peaked(5), peaked(8), 3),
    "beside a plateau": (
        peaked(4, layers=25),
        np.array([0.0, 0.2, 0.4, 0.6, 0.73, *[0.7] * 20]),
        0,
    ),
    "flat": (np.full(12, 0.7), np.full(12, 0.7), 0),
}


def peaks(
    rng: np.random.Generator,
    *,
    images: int,
    strengths: tuple[np.ndarray, np.ndarray],
    movement: int,
    studies: int,
) -> Shares:
    """Coverage of the place of a peak and of its movement, and how often it is said to move."""
    layers = len(strengths[0])
    seen = []
    for seed in range(studies):
        both, truth_l = simulate_study(
            "accuracy", rng, images=images, strength_l=np.concatenate(strengths), seed=seed
        )
        one = both.select(slice(layers))
        peak = find_peak(one)
        shift = compare_peaks(one, both.select(slice(layers, None)))
        is_outside = not shift.resampled_lo <= 0 <= shift.resampled_hi
        seen.append(
            {
                "place": peak.lo <= truth_l[:layers].argmax() <= peak.hi,
                "movement": shift.lo <= movement <= shift.hi,
                "movement, resamples": shift.resampled_lo <= movement <= shift.resampled_hi,
                "says moved": shift.p <= 0.05,
                "says moved, resamples": is_outside,
                "width in layers": shift.hi - shift.lo,
            }
        )
    return mean_shares(seen)


def guesses(rng: np.random.Generator, *, images: int, studies: int) -> Shares:
    """How often one of 25 layers that answer at random seems better than a guess.

    The layer is one that was chosen without these images, or the one that scores highest on them.
    """
    seen = []
    for seed in range(studies):
        curve, _ = simulate_study(
            "accuracy", rng, images=images, strength_l=np.zeros(25), seed=seed
        )
        lower, _ = bca_interval(curve)
        chosen = rng.integers(25)
        highest = curve.score_l.argmax()
        seen.append({"chosen elsewhere": lower[chosen] > 0.5, "highest": lower[highest] > 0.5})
    return mean_shares(seen)


def is_recovered(table: pd.DataFrame) -> dict[str, bool]:
    """Whether exactly the planted layers are kept, by method and level."""
    kept = {f"plateau, alpha {alpha}": table.p_plateau > alpha for alpha in (0.05, 0.025, 0.01)}
    kept["Holm, .05"] = table.p_holm > 0.05
    kept["Hsu, .05"] = table.p > 0.05
    return {name: list(np.flatnonzero(layers)) == PLANTED for name, layers in kept.items()}


def planted(rng: np.random.Generator, *, images: int, points: float, studies: int) -> Shares:
    """Exact recovery where layers 5 to 9 have an accuracy of 70 % plus `points`, others 70 %."""
    is_planted = np.isin(np.arange(20), PLANTED)
    strength_l = norm.ppf(np.where(is_planted, 0.7 + points, 0.7))
    seen = []
    for seed in range(studies):
        curve, _ = simulate_study("accuracy", rng, images=images, strength_l=strength_l, seed=seed)
        seen.append(is_recovered(compare_layers(curve, range(20))))
    return mean_shares(seen)


def simulate_probes(rng: np.random.Generator, *, images: int, train: int, width: int = 8) -> Curve:
    """Test accuracy of converged probes on features of which layers 5 to 9 carry the label."""
    n = train + images * EXAMPLES_PER_IMAGE
    y_n1 = rng.integers(0, 2, (n, 1))
    # An example is easy for all layers, or hard for all.
    of_example = rng.normal(size=(n, 1))
    of_image = rng.normal(size=(n // EXAMPLES_PER_IMAGE, 1))
    shared = of_example + 0.5 * np.repeat(of_image, EXAMPLES_PER_IMAGE, 0)
    label_n1 = torch.from_numpy(y_n1).float()
    p_by_layer = []
    for layer in range(20):
        x_nd = rng.normal(size=(n, width))
        signal = 1.5 * (2 * y_n1 - 1) if layer in PLANTED else 0
        x_nd[:, :1] += shared + signal
        x_lnd = torch.from_numpy(x_nd / x_nd[:train].std(0)).float()[None]
        solution = solve_logreg(
            x_lnd[:, :train],
            label_n1[:train],
            mask_nk=torch.ones(train, 1),
            strengths=[1.0],
        )
        p_by_layer.append(solution.logits(x_lnd[:, train:])[0, :, 0].sigmoid().numpy())
    counts = count_hits(np.stack(p_by_layer), y_n1[train:], images)
    return bootstrap_curve(counts, range(images), score=partial(score_study, "accuracy"))


def probes(rng: np.random.Generator, *, images: int, train: int, studies: int) -> Shares:
    """Exact recovery with fitted probes, and their mean accuracy inside and outside the plateau."""
    seen = []
    for _ in range(studies):
        curve = simulate_probes(rng, images=images, train=train)
        recovered = is_recovered(compare_layers(curve, range(20)))
        accuracies = {
            "accuracy, planted": curve.score_l[PLANTED].mean(),
            "others": np.delete(curve.score_l, PLANTED).mean(),
        }
        seen.append(recovered | accuracies)
    return mean_shares(seen)


def run_checks(*, studies: int, probe_studies: int) -> Iterator[tuple[str, dict[str, Shares]]]:
    """All checks, one after another: the name, and by design the share of each quantity."""
    by_design = {}
    for train in (500, 4000):
        rng = np.random.default_rng(0)
        by_design[f"500 images, {train} to train"] = probes(
            rng, images=500, train=train, studies=probe_studies
        )
    yield "probes", by_design

    by_design = {}
    grid = [(images, points) for images in (500, 1000) for points in (0.05, 0.08, 0.12)]
    for seed, (images, points) in enumerate(grid):
        rng = np.random.default_rng(seed)
        by_design[f"{images} images, +{points:.2f}"] = planted(
            rng, images=images, points=points, studies=studies
        )
    yield "planted", by_design

    by_design = {}
    for seed, (images, name) in enumerate((n, name) for n in (300, 1000) for name in PAIRS):
        *strengths, movement = PAIRS[name]
        by_design[f"{name}, {images} images"] = peaks(
            np.random.default_rng(seed),
            images=images,
            strengths=tuple(strengths),
            movement=movement,
            studies=studies,
        )
    yield "peaks", by_design

    by_design = {}
    for images in (100, 300, 1000):
        rng = np.random.default_rng(images)
        by_design[f"{images} images"] = guesses(rng, images=images, studies=studies)
    yield "guesses", by_design

    designs = [(kind, images) for kind in KINDS for images in (300, 1000)]
    for check in (alarms, best, coverage):
        by_design = {}
        for seed, (kind, images) in enumerate(designs):
            rng = np.random.default_rng(seed)
            by_design[f"{kind}, {images} images"] = check(kind, rng, images=images, studies=studies)
        yield check.__name__, by_design


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument(
        "--quick", action="store_true", help="30 studies: a look, not a measurement"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    studies = 30 if options.quick else options.studies
    probe_studies = 20 if options.quick else min(100, studies)
    torch.set_num_threads(1)
    start = time.perf_counter()
    result: dict[str, object] = {"studies": studies}
    for check, by_design in run_checks(studies=studies, probe_studies=probe_studies):
        result[check] = by_design
        print(f"\n{check}\n{pd.DataFrame(by_design).round(3).to_string()}", flush=True)
    error = 100 * np.sqrt(0.05 * 0.95 / studies)
    seconds = time.perf_counter() - start
    print(
        f"\n{studies} studies each, simulation error of a share near 5 %: ±{2 * error:.1f} points; "
        f"{seconds:.0f} s"
    )
    save_json(options.json, result)


if __name__ == "__main__":
    main()
