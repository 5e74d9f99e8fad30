"""Probes of all layers at once against scikit-learn's loop and against the published study's.

    python benchmarks/probe.py [--layers 6] [--examples 4000] [--width 576] [--classes 80]
                               [--quick] [--json PATH]

The features are hidden states of captions in a randomly initialised decoder, pooled by mean: badly
conditioned, as real ones are. The labels are what the captions say (whether a word or a pair of
words is in them), so that some are easy and some hard. One process, the same features and labels,
side by side:

sweep       8 strengths x 5 sets of one binary label, all layers, against a loop of
            LogisticRegression
multilabel  one strength, all classes, all layers, against the same loop
adam loop   one strength, one binary label, all layers, against the study's way: layer by layer,
            dropout and a linear layer, Adam, batches of 16, 10 epochs; with the test accuracy of
            both ways, and the spread of the study's over 5 seeds

scikit-learn runs with its default solver and tolerance, on the same standardised float32 features.
Its objective is compared with ours in float64: `max_objective_gap` is the largest
(ours - its) / its of all problems, so a value below zero means that ours is the lower one
everywhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import high_water_mb, run_in_new_process, save_json
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from probekit.data.scenes import sample_scene, write_captions
from probekit.models.forward import run_pooled
from probekit.models.load import load_vlm
from probekit.paths import Home
from probekit.probes.logreg import feature_spread, solve_logreg

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
SINGLE_STRENGTH = 0.01
SEEDS = range(5)
TEXTS_TOGETHER = 64


def make_model(width: int, layers: int, folder: Path) -> Path:
    """Write a Qwen2-VL of this size with random weights."""
    source = Home.find().data / "models" / "tiny-qwen2-vl"
    config = AutoConfig.from_pretrained(source)
    heads = max(1, width // 64)
    config.text_config.update(
        {
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": layers - 1,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "layer_types": ["full_attention"] * (layers - 1),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
        }
    )
    config.vision_config.hidden_size = width
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def hidden_states(width: int, layers: int, texts: list[str]) -> torch.Tensor:
    """(l, n, d) float32: each layer's mean over the tokens of a text."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_model(width, layers, Path(temporary))
        vlm = load_vlm(str(folder), dtype="float32", device="cpu")
    batches = []
    for start in tqdm(range(0, len(texts), TEXTS_TOGETHER), desc="hidden states", unit="batch"):
        prepared = vlm.prompt_processor.prepare(None, texts[start : start + TEXTS_TOGETHER])
        batches.append(run_pooled(vlm, [prepared], poolings=["mean"]))
    return torch.stack(
        [torch.cat([states[f"{layer}/mean"] for states in batches]) for layer in vlm.layers]
    )


def make_captions(count: int) -> list[str]:
    """Different sentences about drawn scenes."""
    texts: dict[str, None] = {}  # a set that keeps its order
    seed = 0
    while len(texts) < count:
        rng = np.random.default_rng([7, seed])
        captions = write_captions(sample_scene(rng), rng)
        texts[" ".join(captions[:2])] = None
        seed += 1
    return list(texts)[:count]


def word_labels(texts: list[str], classes: int) -> torch.Tensor:
    """(n, c) which of the most balanced words and pairs of words a text holds."""
    parts_of_texts = []
    for text in texts:
        words = text.lower().replace(".", "").split()
        parts_of_texts.append({*words, *pairwise(words)})
    counts = Counter(part for parts in parts_of_texts for part in parts)

    def imbalance(part: str | tuple[str, str]) -> tuple[float, str]:
        return abs(counts[part] / len(texts) - 0.5), str(part)

    most_balanced = sorted(counts, key=imbalance)[:classes]
    labels = [[part in parts for part in most_balanced] for parts in parts_of_texts]
    return torch.tensor(labels, dtype=torch.float32)


def hard_label(texts: list[str]) -> torch.Tensor:
    """(n, 1) whether the first sentence's share of its text is above the median of all texts."""
    share = torch.tensor([len(text.partition(". ")[0]) / len(text) for text in texts])
    return (share > share.median()).float()[:, None]


class Weights(NamedTuple):
    """Weights (l, d, p) and intercepts (l, p) of p problems: each strength with all label sets."""

    weight_ldp: torch.Tensor
    intercept_lp: torch.Tensor


def solve_together(x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float]) -> Weights:
    mask_nk = torch.ones_like(y_nk)
    solution = solve_logreg(x_lnd, y_nk, mask_nk=mask_nk, strengths=strengths)
    assert solution.converged_lsk.all()
    return Weights(solution.weight_ldsk.flatten(2), solution.intercept_lsk.flatten(1))


def sklearn_loop(x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float]) -> Weights:
    weights = []
    intercepts = []
    for x_nd in tqdm(x_lnd.numpy(), desc="scikit-learn", unit="layer"):
        models = []
        for strength in strengths:
            for y_n in y_nk.T.numpy():
                models.append(LogisticRegression(C=strength, max_iter=10_000).fit(x_nd, y_n))
        weights.append(torch.from_numpy(np.concatenate([model.coef_ for model in models]).T))
        intercepts.append(torch.from_numpy(np.concatenate([model.intercept_ for model in models])))
    return Weights(torch.stack(weights), torch.stack(intercepts))


def adam_loop(x_lnd: torch.Tensor, y_n: torch.Tensor, seed: int = 0) -> Weights:
    """The study's loop; rows are drawn by hand, which is faster than its DataLoader."""
    torch.manual_seed(seed)
    weights = []
    intercepts = []
    for x_nd in tqdm(x_lnd, desc=f"Adam loop, seed {seed}", unit="layer"):
        linear = torch.nn.Linear(x_nd.shape[1], 2)
        probe = torch.nn.Sequential(torch.nn.Dropout(0.1), linear)
        optimiser = torch.optim.Adam(probe.parameters(), lr=1e-3)
        for _ in range(10):
            for rows in torch.randperm(len(x_nd)).split(16):
                loss = torch.nn.functional.cross_entropy(probe(x_nd[rows]), y_n[rows].long())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        weights.append(linear.weight[1] - linear.weight[0])
        intercepts.append(linear.bias[1] - linear.bias[0])
    return Weights(
        torch.stack(weights).detach()[..., None], torch.stack(intercepts).detach()[:, None]
    )


def objective(
    x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float], weights: Weights
) -> torch.Tensor:
    """(l, p) objective of every problem in float64."""
    y_np = y_nk.repeat(1, len(strengths)).double()
    c_p = torch.tensor(strengths, dtype=torch.float64).repeat_interleave(y_nk.shape[1])
    objectives = []
    for x_nd, weight_dp, intercept_p in zip(x_lnd, *weights, strict=True):
        logits = x_nd.double() @ weight_dp.double() + intercept_p.double()
        loss = torch.nn.functional.softplus(logits) - y_np * logits
        penalty_p = (weight_dp.double() ** 2).sum(0) / (2 * c_p * len(x_nd))
        objectives.append(loss.mean(0) + penalty_p)
    return torch.stack(objectives)


def accuracy(x_lnd: torch.Tensor, y_n: torch.Tensor, weights: Weights) -> torch.Tensor:
    """(l,) accuracy of the only problem of each layer."""
    logits_ln = (x_lnd @ weights.weight_ldp + weights.intercept_lp[:, None])[..., 0]
    return ((logits_ln > 0) == (y_n > 0)).float().mean(1)


def measure_seconds(function: Callable[..., Weights], *arguments) -> tuple[float, Weights]:
    start = time.perf_counter()
    weights = function(*arguments)
    return time.perf_counter() - start, weights


def measure_peak_mb(function: Callable[..., Weights], *arguments) -> float:
    """MB that a function adds to the peak memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "arguments.pt"
        torch.save(arguments, file)
        return run_in_new_process(measure_added_mb, function, file)


def measure_added_mb(function: Callable[..., Weights], file: Path) -> float:
    arguments = torch.load(file)
    before = high_water_mb()
    function(*arguments)
    return high_water_mb() - before


class Problem(NamedTuple):
    """Label sets (n, k) and strengths, fitted on the same features."""

    y_nk: torch.Tensor
    strengths: Sequence[float]


def make_problems(y_nc: torch.Tensor) -> dict[str, Problem]:
    """The sweep has a label, two shuffled copies of it, and two other labels."""
    generator = torch.Generator().manual_seed(0)
    first_n = y_nc[:, 0]
    sets = [first_n]
    for _ in range(2):
        sets.append(first_n[torch.randperm(len(first_n), generator=generator)])
    sets.extend(y_nc[:, 1:3].T)
    return {
        "sweep": Problem(torch.stack(sets, 1), STRENGTHS),
        "multilabel": Problem(y_nc, (SINGLE_STRENGTH,)),
    }


def compare_with_sklearn(x_lnd: torch.Tensor, problems: dict[str, Problem]) -> dict[str, float]:
    result = {}
    gaps = []
    solve_together(x_lnd[:1], *problems["multilabel"])  # warm up
    for name, problem in problems.items():
        seconds, weights = measure_seconds(solve_together, x_lnd, *problem)
        sklearn_seconds, sklearn_weights = measure_seconds(sklearn_loop, x_lnd, *problem)
        ours = objective(x_lnd, *problem, weights)
        theirs = objective(x_lnd, *problem, sklearn_weights)
        gaps.append(float(((ours - theirs) / theirs).max()))
        result[f"speedup_{name}"] = sklearn_seconds / seconds
        result[f"seconds_{name}"] = seconds
        result[f"seconds_{name}_sklearn"] = sklearn_seconds
        print(
            f"{name}: {ours.numel()} problems: {seconds:.2f} s, scikit-learn "
            f"{sklearn_seconds:.1f} s, {sklearn_seconds / seconds:.1f} times as long; objective at "
            f"most {gaps[-1]:+.1e} above its",
            flush=True,
        )
    result["max_objective_gap"] = max(gaps)
    return result


def compare_with_adam_loop(
    raw_lnd: torch.Tensor, x_lnd: torch.Tensor, y_n1: torch.Tensor, n: int
) -> dict[str, float]:
    """Train on the first n examples, test on the others; the loop takes raw features."""
    train = slice(n)
    test = slice(n, None)
    y_test = y_n1[test, 0]
    accuracies: dict[str, list[torch.Tensor]] = {"logreg": [], "adam_loop": []}
    seconds = {}
    seconds["logreg"], weights = measure_seconds(
        solve_together, x_lnd[:, train].contiguous(), y_n1[train], [SINGLE_STRENGTH]
    )
    accuracies["logreg"].append(accuracy(x_lnd[:, test], y_test, weights))
    for seed in SEEDS:
        adam_seconds, weights = measure_seconds(adam_loop, raw_lnd[:, train], y_n1[train, 0], seed)
        accuracies["adam_loop"].append(accuracy(raw_lnd[:, test], y_test, weights))
        seconds.setdefault("adam_loop", adam_seconds)
    result = {"speedup_adam_loop": seconds["adam_loop"] / seconds["logreg"]}
    for name, of_seeds in accuracies.items():
        accuracy_sl = torch.stack(of_seeds)
        result[f"accuracy_{name}"] = float(accuracy_sl.mean())
    accuracy_sl = torch.stack(accuracies["adam_loop"])
    result["spread_adam_loop"] = float((accuracy_sl.amax(0) - accuracy_sl.amin(0)).max())
    print(
        f"adam loop: {seconds['logreg']:.2f} s against {seconds['adam_loop']:.1f} s: "
        f"{result['speedup_adam_loop']:.1f} times faster; test accuracy (mean of all layers) "
        f"{result['accuracy_logreg']:.3f} and {result['accuracy_adam_loop']:.3f}; largest "
        f"spread of the loop over {len(SEEDS)} seeds at any layer {result['spread_adam_loop']:.3f}"
    )
    return result


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--examples", type=int, default=4000, help="for training; a quarter as many are for testing"
    )
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument(
        "--quick", action="store_true", help="few and small layers: shows that it runs"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.layers = 2
        options.examples = 400
        options.width = 64
        options.classes = 8
    return options


def main() -> None:
    options = parse_options()
    n = options.examples
    texts = make_captions(n * 5 // 4)
    raw_lnd = hidden_states(options.width, options.layers, texts)
    mean_ld, scale_ld = feature_spread(raw_lnd[:, :n])
    x_lnd = (raw_lnd - mean_ld[:, None]) / scale_ld[:, None]
    train_lnd = x_lnd[:, :n].contiguous()
    y_nc = word_labels(texts, options.classes)[:n]
    y_hard = hard_label(texts)
    problems = make_problems(y_nc)

    result: dict[str, float] = {
        "layers": options.layers,
        "examples": n,
        "width": options.width,
    }
    result |= compare_with_sklearn(train_lnd, problems)
    result |= compare_with_adam_loop(raw_lnd, x_lnd, y_hard, n)
    sweep = problems["sweep"]
    result["peak_rss_mb"] = measure_peak_mb(solve_together, train_lnd, *sweep)
    result["peak_rss_mb_sklearn"] = measure_peak_mb(
        sklearn_loop, train_lnd[:1], sweep.y_nk[:, :1], [SINGLE_STRENGTH]
    )
    result["peak_rss_mb_adam_loop"] = measure_peak_mb(
        adam_loop, raw_lnd[:1, :n].clone(), y_nc[:, 0].clone()
    )
    print(json.dumps(result, indent=1))
    save_json(options.json, result)


if __name__ == "__main__":
    main()
