from dataclasses import replace

import pytest
import torch
from torch import nn

from probekit.probes import adam
from probekit.probes.adam import Training

N, D = 90, 12
TRAIN, VALIDATION = torch.arange(60), torch.arange(60, N)


def data(kind, layers=3):
    torch.manual_seed(0)
    x = torch.randn(layers, N, D)
    y = (x[1] @ torch.randn(D, 1 if kind == "binary" else 4) > 0).float()  # layer 1 carries the label
    mask = torch.ones_like(y) if kind == "binary" else (torch.rand_like(y) < 0.6).float()
    return x, y, mask


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_it_is_the_plain_loop_for_each_layer(kind):
    """Without dropout, weights equal those of nn.Linear and torch's Adam, layer by layer."""
    x, y, mask = data(kind)
    setting = Training(epochs=3, batch=16, dropout=0.0, hidden=0)
    fit = adam.fit(x, y, mask, TRAIN, VALIDATION, kind, (4,), setting)
    outputs = 2 if kind == "binary" else 4
    for layer in range(3):
        g = torch.Generator().manual_seed(4)
        probe = nn.ProbeWeights(D, outputs)
        probe.weight.data = ((torch.rand(D, outputs, generator=g) * 2 - 1) * D**-0.5).T
        probe.bias.data = (torch.rand(outputs, generator=g) * 2 - 1) * D**-0.5
        optimiser = torch.optim.Adam(probe.parameters(), lr=1e-3)
        for _ in range(3):
            for rows in TRAIN[torch.randperm(len(TRAIN), generator=g)].split(16):
                torch.rand(len(rows), D, generator=g)  # the dropout mask that the fit drew
                logits = probe(x[layer, rows])
                if kind == "binary":
                    loss = nn.functional.cross_entropy(logits, y[rows, 0].long())
                else:
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, y[rows], mask[rows])
                    loss = loss * mask[rows].numel() / mask[rows].sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        torch.testing.assert_close(fit.weights[0][layer, 0], probe.weight.T, atol=1e-5, rtol=1e-4)
        logits = probe(x[layer, VALIDATION]).detach()
        p = logits.softmax(-1)[:, 1:] if kind == "binary" else logits.sigmoid()
        torch.testing.assert_close(fit.probabilities(x[:, VALIDATION])[layer, 0], p, atol=1e-5, rtol=1e-4)


def test_layers_and_seeds_do_not_touch_each_other():
    x, y, mask = data("binary")
    together = adam.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0, 1), Training(epochs=2, hidden=0))
    alone = adam.fit(x[2:], y, mask, TRAIN, VALIDATION, "binary", (1,), Training(epochs=2, hidden=0))
    torch.testing.assert_close(together.weights[0][2, 1], alone.weights[0][0, 0])
    assert not torch.allclose(together.weights[0][:, 0], together.weights[0][:, 1])


def test_losses_are_kept_and_fall_where_the_label_is():
    x, y, mask = data("binary")
    fit = adam.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0,), Training(epochs=30, lr=1e-2, hidden=0))
    assert fit.losses.shape == (3, 1, 30, 2)
    train, validation = fit.losses[..., 0], fit.losses[..., 1]
    assert validation[1, 0, -1] < 0.6 * validation[1, 0, 0]
    assert train[1, 0, -1] < train[0, 0, -1]
    assert validation[0, 0, -1] > 0.6


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_a_hidden_layer_learns_what_a_line_cannot(kind):
    torch.manual_seed(0)
    x = torch.randn(1, 600, 4)
    y = (x[0, :, :1] * x[0, :, 1:2] > 0).float()  # exclusive or of two signs
    train, validation = torch.arange(450), torch.arange(450, 600)
    right = {}
    for hidden in (0, 64):
        setting = Training(epochs=60, lr=1e-2, dropout=0.0, hidden=hidden)
        fit = adam.fit(x, y, torch.ones_like(y), train, validation, kind, (0,), setting)
        right[hidden] = float(((fit.probabilities(x)[0, 0, validation] > 0.5) == (y[validation] > 0.5)).float().mean())
    assert right[0] < 0.65 and right[64] > 0.9


def test_patience_keeps_each_probe_at_its_lowest_validation_loss():
    x, y, mask = data("binary")
    setting = Training(epochs=80, lr=3e-2, hidden=0)
    whole = adam.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0, 1), setting)
    early = adam.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0, 1), replace(setting, patience=3))
    count = early.losses.shape[2]
    assert count < 80
    for layer in range(3):
        for seed in range(2):
            seen = early.losses[layer, seed, :, 1]
            seen = seen[~seen.isnan()]
            torch.testing.assert_close(seen, whole.losses[layer, seed, : len(seen), 1])  # the same up to there
            p = early.probabilities(x[:, VALIDATION])[layer, seed, :, 0]
            loss = nn.functional.binary_cross_entropy(p, y[VALIDATION, 0])
            torch.testing.assert_close(loss, seen.min(), atol=1e-5, rtol=1e-4)
            assert len(seen) == count or int(seen.argmin()) == len(seen) - 4  # three epochs more
