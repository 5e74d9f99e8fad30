"""The statistics held against known truth: simulated studies of many layers, images with several examples each.

    python benchmarks/compare.py [--studies 300] [--quick] [--json PATH]

Examples are easy or hard for all layers alike (which pairing is for), and the examples of one image resemble each
other (which resampling by image is for). Two kinds of study, both with exact truth: `accuracy` of a binary task, and
`f1_macro` of six classes, whose prevalence goes from one half down to 3 %.

coverage   95 % intervals of scores, of differences between named layers, of two models on the same and on different
           images, and of each layer's gap to the best of the others; wanted: 92 to 98 %
alarms     all layers equal: studies with any false alarm; wanted: at most 5 %
best       one layer is truly best, others are near it: studies that keep it among the candidates; wanted: 95 %
planted    20 layers, of which 5 to 9 are equally good: studies whose plateau is exactly 5 to 9, by alpha and effect
probes     the same with features and fitted probes: only layers 5 to 9 carry the label; wanted: 95 of 100

300 studies take 25 minutes on one core.
(This file is not called statistics.py, because Python would then take it for its own module of that name.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

from probekit.probes import bootstrap, comparison, logreg, metrics

PREVALENCE = np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.03])
THRESHOLD = 0.5  # of the f1_macro studies: a class is answered less often than it is there
PLANTED = list(range(5, 10))
EXAMPLES = 2  # of one image


# ---------------------------------------------------------------------------------------------------- simulated studies


def noise(rng: np.random.Generator, images: int, count: int, c: int) -> np.ndarray:
    """Standard normal (images, examples, l, c): 20 % of the image, 35 % of the example, 15 % of layer and image."""
    parts = (0.2, (images, 1, 1, c)), (0.35, (images, EXAMPLES, 1, c)), (0.15, (images, 1, count, c))
    own = np.sqrt(0.3) * rng.normal(size=(images, EXAMPLES, count, c))
    return own + sum(np.sqrt(share) * rng.normal(size=shape) for share, shape in parts)


def accuracy_study(rng: np.random.Generator, images: int, strength_l: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (images, l, 1, 5), and the true accuracies, which are the normal distribution at the strengths."""
    right = (noise(rng, images, len(strength_l), 1) + strength_l[:, None] > 0)[..., 0]
    y = rng.integers(0, 2, (images, EXAMPLES, 1))
    p_lnc = (right == y.astype(bool)).reshape(-1, len(strength_l), 1).swapaxes(0, 1)
    flat = y.reshape(-1, 1)
    counts = metrics.image_counts(p_lnc, flat, np.ones_like(flat), np.repeat(np.arange(images), EXAMPLES))
    return counts, norm.cdf(strength_l)


def f1_study(rng: np.random.Generator, images: int, strength_l: np.ndarray,
             prevalence_c: np.ndarray = PREVALENCE) -> tuple[np.ndarray, np.ndarray]:
    """Counts (images, l, c, 5), and the true macro F1, from the expected hits and false alarms of each class."""
    c = len(prevalence_c)
    latent = np.sqrt(0.5) * (rng.normal(size=(images, 1, c)) + rng.normal(size=(images, EXAMPLES, c)))
    y = latent > -norm.ppf(prevalence_c)
    pull = np.where(y, 1, -1)[:, :, None] * strength_l[:, None]
    yes = pull + noise(rng, images, len(strength_l), c) > THRESHOLD
    p_lnc, flat = yes.reshape(-1, len(strength_l), c).swapaxes(0, 1), y.reshape(-1, c)
    counts = metrics.image_counts(p_lnc, flat, np.ones_like(flat), np.repeat(np.arange(images), EXAMPLES))
    hit = prevalence_c * norm.cdf(strength_l - THRESHOLD)[:, None]
    false = (1 - prevalence_c) * norm.cdf(-strength_l - THRESHOLD)[:, None]
    return counts, (2 * hit / (hit + false + prevalence_c)).mean(1)


KINDS = {"accuracy": accuracy_study, "f1_macro": f1_study, "f1_rare": partial(f1_study, prevalence_c=PREVALENCE[-1:])}


def score(kind: str, total: np.ndarray) -> np.ndarray:
    """Scores (b, l) of summed counts (b, l, c, 5)."""
    return metrics.scores(total, kind == "accuracy")["accuracy" if kind == "accuracy" else "f1_macro", None]


def study(kind: str, rng: np.random.Generator, images: int, strength_l: np.ndarray, first: int = 0,
          seed: int = 0) -> tuple[bootstrap.Curve, np.ndarray]:
    """A curve and its truth; images are named from `first` on, so that another `first` makes other images."""
    counts, truth = KINDS[kind](rng, images, strength_l)
    return bootstrap.bootstrap_curve(counts, range(first, first + images), partial(score, kind), seed=seed), truth


# --------------------------------------------------------------------------------------------------------------- checks


def holds(lo: np.ndarray, hi: np.ndarray, truth: np.ndarray) -> float:
    """Share of intervals that hold the truth."""
    return float(((lo <= truth) & (truth <= hi)).mean())


def gaps_of(truth_l: np.ndarray) -> np.ndarray:
    """Each score minus the best of the others."""
    return np.array([t - np.delete(truth_l, i).max() for i, t in enumerate(truth_l)])


def coverage(kind: str, rng: np.random.Generator, images: int, studies: int) -> dict[str, float]:
    """Coverage of each kind of interval, averaged over the layers: 0 to 7 of one model, 8 to 15 of another."""
    steps = np.linspace(0, 1.6, 8) if kind == "accuracy" else np.linspace(0.3, 1.6, 8)
    strength, names, seen = np.r_[steps, steps[::-1]], range(8), []
    for seed in range(studies):
        curve, truth = study(kind, rng, images, strength, seed=seed)
        apart, _ = study(kind, rng, images, strength, images, seed)
        one, two, three, g = curve.only(slice(8)), curve.only(slice(8, 16)), apart.only(slice(8, 16)), truth[:8]
        near = comparison.curve_difference(one.only(slice(7)), one.only(slice(1, 8)), names[:7])
        models, elsewhere = (comparison.curve_difference(one, other, names) for other in (two, three))
        gaps = comparison.compare_layers(one, names)
        naive = comparison.curve_difference(one, one.only([int(one.score_l.argmax())] * 8), names)
        seen.append({"score": holds(*bootstrap.bca_interval(curve), truth),
                     "score, percentile": holds(*np.quantile(curve.resampled_bl, [0.025, 0.975], axis=0), truth),
                     "difference, layers": holds(near.lo, near.hi, g[:-1] - g[1:]),
                     "difference, models": holds(models.lo, models.hi, g - truth[8:]),
                     "difference, other images": holds(elsewhere.lo, elsewhere.hi, g - truth[8:]),
                     "gap": holds(gaps.gap_lo, gaps.gap_hi, gaps_of(g)),
                     "gap, naive": holds(naive.lo, naive.hi, g - g.max())})
    return pd.DataFrame(seen).mean().to_dict()


def alarms(kind: str, rng: np.random.Generator, images: int, studies: int) -> dict[str, float]:
    """Share of studies with any false alarm where 12 layers are equal, and the gap's coverage there."""
    seen = []
    for seed in range(studies):
        curve, _ = study(kind, rng, images, np.full(12, 0.7), seed=seed)
        table = comparison.compare_layers(curve, range(12))
        chosen = int(curve.score_l.argmax())
        naive = comparison.curve_difference(curve, curve.only([chosen] * 12), range(12))
        two = comparison.curve_difference(curve.only(slice(6)), curve.only(slice(6, 12)), range(6))
        seen.append({"p": (table.p <= 0.05).any(), "p_holm": (table.p_holm <= 0.05).any(),
                     "p_plateau <= .05": (table.p_plateau <= 0.05).any(), "outside plateau": not table.plateau.all(),
                     "two models, p_holm": (two.p_holm <= 0.05).any(),
                     "to the selected best, p_holm": (naive.p_holm <= 0.05).any(),
                     "gap coverage": holds(table.gap_lo, table.gap_hi, 0),
                     "gap coverage, naive": holds(naive.lo, naive.hi, 0)})
    return pd.DataFrame(seen).mean().to_dict()


def best(kind: str, rng: np.random.Generator, images: int, studies: int) -> dict[str, float]:
    """Share of studies that keep the one best of 12 layers; its neighbours are close below."""
    strength, seen = 0.9 - 0.03 * np.abs(np.arange(12) - 6), []
    for seed in range(studies):
        curve, _ = study(kind, rng, images, strength, seed=seed)
        table = comparison.compare_layers(curve, range(12))
        order = np.argsort(-table.best_share)
        kept = order[: int(np.searchsorted(np.cumsum(table.best_share[order]), 0.95)) + 1]
        seen.append({"plateau": table.plateau[6], "p_plateau > .05": table.p_plateau[6] > 0.05,
                     "p > .05": table.p[6] > 0.05,
                     "95 % of best_share": 6 in set(kept), "highest score": int(curve.score_l.argmax()) == 6,
                     "layers in plateau": table.plateau.sum(), "layers at .05": (table.p_plateau > 0.05).sum()})
    return pd.DataFrame(seen).mean().to_dict()


def recovered(table: pd.DataFrame) -> dict[str, bool]:
    """Whether exactly the planted layers are kept, by method and level."""
    rules = {f"plateau, alpha {a}": table.p_plateau > a for a in (0.05, 0.025, 0.01)}
    rules |= {"Holm, .05": table.p_holm > 0.05, "Hsu, .05": table.p > 0.05}
    return {name: list(np.flatnonzero(kept)) == PLANTED for name, kept in rules.items()}


def planted(rng: np.random.Generator, images: int, points: float, studies: int) -> dict[str, float]:
    """Exact recovery where layers 5 to 9 have an accuracy of 70 % plus `points` and the others 70 %."""
    strength = norm.ppf(np.where(np.isin(np.arange(20), PLANTED), 0.7 + points, 0.7))
    tables = [comparison.compare_layers(study("accuracy", rng, images, strength, seed=seed)[0], range(20))
              for seed in range(studies)]
    return pd.DataFrame([recovered(table) for table in tables]).mean().to_dict()


def probe_study(rng: np.random.Generator, images: int, train: int, d: int) -> bootstrap.Curve:
    """Test accuracy of converged probes on features (l, n, d), in which only layers 5 to 9 carry the label."""
    n = train + images * EXAMPLES
    y = rng.integers(0, 2, (n, 1))
    shared = rng.normal(size=(n, 1)) + 0.5 * np.repeat(rng.normal(size=(n // EXAMPLES, 1)), EXAMPLES, 0)
    label, p_lnc = torch.from_numpy(y).float(), []
    for layer in range(20):
        x_nd = rng.normal(size=(n, d))
        x_nd[:, :1] += shared + (1.5 * (2 * y - 1) if layer in PLANTED else 0)  # an example is easy for all layers
        x = torch.from_numpy(x_nd / x_nd[:train].std(0)).float()
        fit = logreg.solve(x[None, :train], label[:train], torch.ones(train, 1), [1.0])
        p_lnc.append(fit.logits(x[None, train:])[0, :, 0].sigmoid().numpy())
    names = np.repeat(np.arange(images), EXAMPLES)
    counts = metrics.image_counts(np.stack(p_lnc), y[train:], np.ones_like(y[train:]), names)
    return bootstrap.bootstrap_curve(counts, range(images), partial(score, "accuracy"))


def probes(rng: np.random.Generator, images: int, train: int, studies: int) -> dict[str, float]:
    """Exact recovery with fitted probes, and their mean accuracy inside and outside the planted layers."""
    seen = []
    for _ in range(studies):
        curve = probe_study(rng, images, train, 8)
        seen.append(recovered(comparison.compare_layers(curve, range(20))) | {
            "accuracy, planted": curve.score_l[PLANTED].mean(), "others": np.delete(curve.score_l, PLANTED).mean()})
    return pd.DataFrame(seen).mean().to_dict()


def run(studies: int, simulations: int) -> Iterator[tuple[str, dict[str, dict]]]:
    """All checks, one after another, as {design: {quantity: share}}."""
    designs = [(kind, images) for kind in KINDS for images in (300, 1000)]
    grid = [(images, points) for images in (500, 1000) for points in (0.05, 0.08, 0.12)]
    yield "probes", {f"500 images, {train} to train": probes(np.random.default_rng(0), 500, train, simulations)
                     for train in (500, 4000)}
    yield "planted", {f"{images} images, +{points:.2f}": planted(np.random.default_rng(k), images, points, studies)
                      for k, (images, points) in enumerate(grid)}
    for check in (alarms, best, coverage):
        yield check.__name__, {f"{kind}, {images} images": check(kind, np.random.default_rng(k), images, studies)
                               for k, (kind, images) in enumerate(designs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="30 studies: a look, not a measurement")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    studies = 30 if args.quick else args.studies
    torch.set_num_threads(1)
    start = time.perf_counter()
    out = {}
    for check, table in run(studies, 20 if args.quick else 100):
        out[check] = table
        print(f"\n{check}\n{pd.DataFrame(table).round(3).to_string()}", flush=True)
    error = 100 * np.sqrt(0.05 * 0.95 / studies)
    print(f"\n{studies} studies each, simulation error of a share near 5 %: ±{2 * error:.1f} points; "
          f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"studies": studies} | out, indent=1))


if __name__ == "__main__":
    main()
