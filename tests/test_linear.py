import pytest
import torch
from torch import nn

from probekit import linear
from probekit.linear import Training

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
    setting = Training(epochs=3, batch=16, dropout=0.0)
    fit = linear.fit(x, y, mask, TRAIN, VALIDATION, kind, (4,), setting)
    outputs = 2 if kind == "binary" else 4
    for layer in range(3):
        g = torch.Generator().manual_seed(4)
        probe = nn.Linear(D, outputs)
        probe.weight.data = ((torch.rand(D, outputs, generator=g) * 2 - 1) * D**-0.5).T
        probe.bias.data = (torch.rand(outputs, generator=g) * 2 - 1) * D**-0.5
        adam = torch.optim.Adam(probe.parameters(), lr=1e-3)
        for _ in range(3):
            for rows in TRAIN[torch.randperm(len(TRAIN), generator=g)].split(16):
                torch.rand(len(rows), D, generator=g)  # the dropout mask that the fit drew
                logits = probe(x[layer, rows])
                if kind == "binary":
                    loss = nn.functional.cross_entropy(logits, y[rows, 0].long())
                else:
                    loss = nn.functional.binary_cross_entropy_with_logits(logits, y[rows], mask[rows])
                    loss = loss * mask[rows].numel() / mask[rows].sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
        torch.testing.assert_close(fit.weight[layer, 0], probe.weight.T, atol=1e-5, rtol=1e-4)
        logits = probe(x[layer, VALIDATION]).detach()
        p = logits.softmax(-1)[:, 1:] if kind == "binary" else logits.sigmoid()
        torch.testing.assert_close(fit.probabilities(x[:, VALIDATION])[layer, 0], p, atol=1e-5, rtol=1e-4)


def test_layers_and_seeds_do_not_touch_each_other():
    x, y, mask = data("binary")
    together = linear.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0, 1), Training(epochs=2))
    alone = linear.fit(x[2:], y, mask, TRAIN, VALIDATION, "binary", (1,), Training(epochs=2))
    torch.testing.assert_close(together.weight[2, 1], alone.weight[0, 0])
    assert not torch.allclose(together.weight[:, 0], together.weight[:, 1])


def test_losses_are_kept_and_fall_where_the_label_is():
    x, y, mask = data("binary")
    fit = linear.fit(x, y, mask, TRAIN, VALIDATION, "binary", (0,), Training(epochs=30, lr=1e-2))
    assert fit.losses.shape == (3, 1, 30, 2)
    train, validation = fit.losses[..., 0], fit.losses[..., 1]
    assert validation[1, 0, -1] < 0.6 * validation[1, 0, 0]
    assert train[1, 0, -1] < train[0, 0, -1]
    assert validation[0, 0, -1] > 0.6
