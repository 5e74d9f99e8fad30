"""Probes of all layers at once against scikit-learn's loop and against the published study's.

    python benchmarks/probe.py [--layers 6] [--examples 4000] [--width 576] [--classes 80] [--quick] [--json PATH]

Hidden states of captions in a randomly initialised decoder, pooled by mean: badly conditioned, as real ones are. The
labels are what the captions say (whether a word or a pair of words is in them), so that some are easy and some hard.
One process, the same features and labels, side by side:

sweep        8 strengths x 5 label sets of one binary label, all layers, against a loop of LogisticRegression
multilabel   one strength, all classes, all layers, against the same loop
adam loop    one strength, one binary label, all layers, against the study's way: layer by layer, dropout and a linear
             layer, Adam, batches of 16, 10 epochs; with both ways' test accuracy and its spread over 5 seeds

scikit-learn runs with its default solver and tolerance, on the same standardised float32 features. Its objective is
compared with ours in float64: `max_objective_gap` is the largest (ours - its) / its over all problems, so that a value
below zero means that ours is the lower one everywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from probekit import paths
from probekit.data import scenes
from probekit.models import forward, load
from probekit.probes import logreg

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
ONE = 0.01
SEEDS = range(5)


# ----------------------------------------------------------------------------------------------------- hidden states


def make_model(width: int, layers: int, folder: Path) -> Path:
    source = paths.Home.find().data / "models" / "tiny-qwen2-vl"
    config = AutoConfig.from_pretrained(source)
    heads = max(1, width // 64)
    config.text_config.update({
        "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": layers - 1,
        "num_attention_heads": heads, "num_key_value_heads": heads, "layer_types": ["full_attention"] * (layers - 1),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    })
    config.vision_config.hidden_size = width
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def hidden_states(width: int, layers: int, texts: list[str]) -> torch.Tensor:
    """(l, n, d) float32: each layer's mean over the tokens of a text."""
    with tempfile.TemporaryDirectory() as temporary:
        vlm = load.load_vlm(str(make_model(width, layers, Path(temporary))), dtype="float32", device="cpu")
    found = [forward.run_pooled(vlm, [vlm.prompt_processor.prepare(None, texts[at : at + 64])], ["mean"])
             for at in tqdm(range(0, len(texts), 64), desc="hidden states", unit="batch")]
    return torch.stack([torch.cat([states[f"{layer}/mean"] for states in found]) for layer in vlm.layers])


def captions(count: int) -> list[str]:
    """Different sentences about drawn scenes."""
    found: dict[str, None] = {}
    seed = 0
    while len(found) < count:
        rng = np.random.default_rng([7, seed])
        found[" ".join(scenes.captions(scenes.sample_scene(rng), rng)[:2])] = None
        seed += 1
    return [*found][:count]


def labels(texts: list[str], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, c) which of the most frequent words and pairs a text holds, the most balanced first; (n, 1) one that is hard.

    The hard one is whether the first sentence has a larger share of the text than in half of the texts.
    """
    words = [text.lower().replace(".", "").split() for text in texts]
    held = [{*said, *pairwise(said)} for said in words]
    often = Counter(part for said in held for part in said)
    kept = sorted(often, key=lambda part: (abs(often[part] / len(texts) - 0.5), str(part)))[:classes]
    share = torch.tensor([len(text.partition(". ")[0]) / len(text) for text in texts])
    return (torch.tensor([[part in said for part in kept] for said in held], dtype=torch.float32),
            (share > share.median()).float()[:, None])


# ------------------------------------------------------------------------------------------------------ the two ways


Found = tuple[torch.Tensor, torch.Tensor]  # weights (l, d, p) and intercepts (l, p) of all strengths and label sets


def ours(x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float], seed: int = 0) -> Found:
    solution = logreg.solve(x_lnd, y_nk, torch.ones_like(y_nk), strengths, seed)
    assert bool(solution.converged_lsk.all())
    return solution.weight_ldsk.flatten(2), solution.intercept_lsk.flatten(1)


def sklearn_loop(x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float]) -> Found:
    weights, intercepts = [], []
    for x in tqdm(x_lnd.numpy(), desc="scikit-learn", unit="layer"):
        fits = [LogisticRegression(C=c, max_iter=10_000).fit(x, y) for c in strengths for y in y_nk.T.numpy()]
        weights.append(torch.from_numpy(np.concatenate([fit.coef_ for fit in fits]).T))
        intercepts.append(torch.from_numpy(np.concatenate([fit.intercept_ for fit in fits])))
    return torch.stack(weights), torch.stack(intercepts)


def adam_loop(x_lnd: torch.Tensor, y_n: torch.Tensor, seed: int = 0) -> Found:
    """The study's loop; rows are drawn by hand, which is faster than its DataLoader."""
    torch.manual_seed(seed)
    weights, intercepts = [], []
    for x_nd in tqdm(x_lnd, desc=f"Adam loop, seed {seed}", unit="layer"):
        probe = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.ProbeWeights(x_nd.shape[1], 2))
        adam = torch.optim.Adam(probe.parameters(), lr=1e-3)
        for _ in range(10):
            for rows in torch.randperm(len(x_nd)).split(16):
                loss = torch.nn.functional.cross_entropy(probe(x_nd[rows]), y_n[rows].long())
                adam.zero_grad()
                loss.backward()
                adam.step()
        weights.append(probe[1].weight[1] - probe[1].weight[0])
        intercepts.append(probe[1].bias[1] - probe[1].bias[0])
    return torch.stack(weights).detach()[..., None], torch.stack(intercepts).detach()[:, None]


def objective(x_lnd: torch.Tensor, y_nk: torch.Tensor, strengths: Sequence[float], found: Found) -> torch.Tensor:
    """(l, p) in float64."""
    out, y_np = [], y_nk.repeat(1, len(strengths)).double()
    c_p = torch.tensor(strengths, dtype=torch.float64).repeat_interleave(y_nk.shape[1])
    for x, w, b in zip(x_lnd, found[0].double(), found[1].double(), strict=True):
        logits = x.double() @ w + b
        loss = torch.nn.functional.softplus(logits) - y_np * logits
        out.append(loss.mean(0) + (w**2).sum(0) / (2 * c_p * len(x)))
    return torch.stack(out)


def timed(function: Callable, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - start, found


def peak(name: str, *arguments) -> float:
    """MB that a call of a function of this file adds to the peak memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        torch.save(arguments, Path(temporary) / "arguments.pt")
        code = ("import sys, torch; sys.path.insert(0, 'benchmarks'); import probe\n"
                "from extract import high_water_mb as used\n"
                f"arguments = torch.load({str(Path(temporary) / 'arguments.pt')!r})\n"
                f"before = used(); probe.{name}(*arguments); print(used() - before)")
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent, check=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(done.stdout.split()[-1])


# ----------------------------------------------------------------------------------------------------- measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--examples", type=int, default=4000, help="for training; a quarter as many are for testing")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--quick", action="store_true", help="few and small layers: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.examples, options.width, options.classes = 2, 400, 64, 8
    n = options.examples
    texts = captions(n * 5 // 4)
    raw, (y, hard) = hidden_states(options.width, options.layers, texts), labels(texts, options.classes)
    mean, scale = raw[:, :n].mean(1, keepdim=True), raw[:, :n].std(1, keepdim=True, correction=0)
    x = torch.where(scale > 0, (raw - mean) / scale, 0)
    train, test = x[:, :n].contiguous(), x[:, n:]
    result: dict[str, object] = {"layers": options.layers, "examples": n, "width": options.width}
    gaps = []

    generator = torch.Generator().manual_seed(0)
    sets = torch.stack([y[:n, 0], *(y[:n, 0][torch.randperm(n, generator=generator)] for _ in range(2)),
                        *y[:n, 1:3].T], 1)
    problems = {"sweep": (sets, STRENGTHS), "multilabel": (y[:n], (ONE,))}
    ours(train[:1], *problems["multilabel"])  # warm up
    for name, problem in problems.items():
        quick, mine = timed(ours, train, *problem)
        slow, theirs = timed(sklearn_loop, train, *problem)
        a, b = (objective(train, *problem, found) for found in (mine, theirs))
        gaps.append(float(((a - b) / b).max()))
        result |= {f"speedup_{name}": slow / quick, f"seconds_{name}": quick, f"seconds_{name}_sklearn": slow}
        print(f"{name}: {a.numel()} problems: {quick:.2f} s, scikit-learn {slow:.1f} s, {slow / quick:.1f} times as "
              f"long; objective at most {gaps[-1]:+.1e} above its", flush=True)
    result["max_objective_gap"] = max(gaps)

    def accuracy(features: torch.Tensor, found: Found) -> torch.Tensor:
        """(l,) of the test texts."""
        logits = (features @ found[0] + found[1][:, None])[..., 0]
        return ((logits > 0) == (hard[n:, 0] > 0)).float().mean(1)

    quick, mine = timed(ours, train, hard[:n], [ONE])
    slow, theirs = timed(adam_loop, raw[:, :n], hard[:n, 0])
    fits = {"logreg": [accuracy(test, mine)], "adam_loop": [accuracy(raw[:, n:], theirs)]}
    for seed in SEEDS[1:]:
        fits["logreg"].append(accuracy(test, ours(train, hard[:n], [ONE], seed)))
        fits["adam_loop"].append(accuracy(raw[:, n:], adam_loop(raw[:, :n], hard[:n, 0], seed)))
    for name, found in fits.items():
        spread = torch.stack(found).amax(0) - torch.stack(found).amin(0)
        result |= {f"accuracy_{name}": float(torch.stack(found).mean()), f"spread_{name}": float(spread.max())}
    result["speedup_adam_loop"] = slow / quick
    print(f"adam loop: {quick:.2f} s against {slow:.1f} s: {slow / quick:.1f} times faster; test accuracy (mean of all "
          f"layers) {result['accuracy_logreg']:.3f} and {result['accuracy_adam_loop']:.3f}; largest spread over "
          f"{len(SEEDS)} seeds at any layer {result['spread_logreg']:.3f} and {result['spread_adam_loop']:.3f}")
    result |= {"peak_rss_mb": peak("ours", train, *problems["sweep"]),
               "peak_rss_mb_sklearn": peak("sklearn_loop", train[:1], sets[:, :1], [ONE]),
               "peak_rss_mb_adam_loop": peak("adam_loop", raw[:1, :n].clone(), y[:n, 0].clone())}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
