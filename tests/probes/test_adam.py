from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from probekit.probes.adam import AdamSettings, draw_dropped, train_adam

N = 90
D = 12
TRAIN = torch.arange(60)
VALIDATION = torch.arange(60, N)


def planted(kind, layers=3):
    """Features, labels and mask; layer 1 carries the label."""
    torch.manual_seed(0)
    x_lnd = torch.randn(layers, N, D)
    classes = 1 if kind == "binary" else 4
    y_nc = (x_lnd[1] @ torch.randn(D, classes) > 0).float()
    if kind == "binary":
        return x_lnd, y_nc, torch.ones_like(y_nc)
    return x_lnd, y_nc, (torch.rand_like(y_nc) < 0.6).float()


def train(x_lnd, y_nc, mask_nc, *, kind="binary", seeds=(0,), settings):
    return train_adam(
        x_lnd,
        y_nc,
        mask_snc=mask_nc,
        train=TRAIN,
        validation=VALIDATION,
        kind=kind,
        seeds=seeds,
        settings=settings,
    )


def plain_loop(x_nd, y_nc, mask_nc, *, kind, seed, settings):
    """The training of one layer with torch's own modules, autograd and optimiser."""
    outputs = 2 if kind == "binary" else y_nc.shape[1]
    sizes = [D, settings.hidden, outputs] if settings.hidden else [D, outputs]
    g = torch.Generator().manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.Linear(fan_in, fan_out)
        linear.weight.data = ((torch.rand(fan_in, fan_out, generator=g) * 2 - 1) * fan_in**-0.5).T
        linear.bias.data = (torch.rand(fan_out, generator=g) * 2 - 1) * fan_in**-0.5
        layers += [linear, nn.ReLU()]
    probe = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(probe.parameters(), lr=settings.lr)
    losses = []
    for _ in range(settings.epochs):
        epoch_loss = 0.0
        for rows in TRAIN[torch.randperm(len(TRAIN), generator=g)].split(settings.batch):
            keep = ~draw_dropped((len(rows), D), settings.dropout, g)
            logits = probe(x_nd[rows] * keep / (1 - settings.dropout))
            if kind == "binary":
                loss = nn.functional.cross_entropy(logits, y_nc[rows, 0].long())
            else:
                loss = nn.functional.binary_cross_entropy_with_logits(
                    logits, y_nc[rows], mask_nc[rows], reduction="sum"
                )
                loss = loss / mask_nc[rows].sum()
            epoch_loss += float(loss.detach()) * len(rows) / len(TRAIN)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(epoch_loss)
    return probe, losses


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_every_layer_is_trained_as_by_a_plain_loop(kind, hidden):
    x_lnd, y_nc, mask_nc = planted(kind)
    settings = AdamSettings(epochs=3, batch=16, dropout=0.2, hidden=hidden)
    probes = train(x_lnd, y_nc, mask_nc, kind=kind, seeds=(4,), settings=settings)
    p_lnc = probes.probabilities(x_lnd[:, VALIDATION])[:, 0]
    for layer in range(3):
        probe, losses = plain_loop(
            x_lnd[layer], y_nc, mask_nc, kind=kind, seed=4, settings=settings
        )
        for found, linear in zip(probes.weights, probe[::2], strict=True):
            weight = linear.weight.detach().T
            torch.testing.assert_close(found[layer, 0], weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probes.losses[layer, 0, :, 0], torch.tensor(losses))
        logits = probe(x_lnd[layer, VALIDATION]).detach()
        expected = logits.softmax(-1)[:, 1:] if kind == "binary" else logits.sigmoid()
        torch.testing.assert_close(p_lnc[layer], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_sets_with_the_same_seed_and_seeds_with_other_numbers_of_sets_are_as_alone(kind, hidden):
    x_lnd, y_nc, mask_nc = planted(kind)
    y_snc = torch.stack([y_nc, 1 - y_nc, y_nc, y_nc.flip(0)])
    mask_snc = torch.stack([mask_nc, mask_nc, mask_nc.flip(0), mask_nc])
    seeds = (3, 5, 3, 7)
    settings = AdamSettings(epochs=2, hidden=hidden)
    together = train(x_lnd, y_snc, mask_snc, kind=kind, seeds=seeds, settings=settings)
    for place, seed in enumerate(seeds):
        alone = train(
            x_lnd, y_snc[place], mask_snc[place], kind=kind, seeds=(seed,), settings=settings
        )
        of_set = together.select_set(place)
        for found, expected in zip(
            [*of_set.weights, *of_set.biases, of_set.losses],
            [*alone.weights, *alone.biases, alone.losses],
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("hidden", [0, 5])
def test_layers_and_seeds_do_not_touch_each_other(hidden):
    x_lnd, y_nc, mask_nc = planted("binary")
    settings = AdamSettings(epochs=2, hidden=hidden)
    together = train(x_lnd, y_nc, mask_nc, seeds=(0, 1), settings=settings)
    alone = train(x_lnd[2:], y_nc, mask_nc, seeds=(1,), settings=settings)
    for all_weights, weight in zip(together.weights, alone.weights, strict=True):
        torch.testing.assert_close(all_weights[2, 1], weight[0, 0])
        assert not torch.allclose(all_weights[:, 0], all_weights[:, 1])
    one_seed = together.select_set(1)
    torch.testing.assert_close(one_seed.losses[2:], alone.losses)
    torch.testing.assert_close(
        one_seed.probabilities(x_lnd)[2:, 0], together.probabilities(x_lnd)[2:, 1]
    )


def test_seeds_can_have_labels_of_their_own():
    x_lnd, y_nc, mask_nc = planted("multilabel")
    settings = AdamSettings(epochs=2, hidden=0)
    y_snc = torch.stack([y_nc, 1 - y_nc])
    mask_snc = torch.stack([mask_nc, 1 - mask_nc])
    together = train(x_lnd, y_snc, mask_snc, kind="multilabel", seeds=(3, 3), settings=settings)
    for place in range(2):
        alone = train(
            x_lnd, y_snc[place], mask_snc[place], kind="multilabel", seeds=(3,), settings=settings
        )
        torch.testing.assert_close(together.weights[0][:, place], alone.weights[0][:, 0])


def test_losses_are_kept_and_fall_where_the_label_is():
    x_lnd, y_nc, mask_nc = planted("binary")
    settings = AdamSettings(epochs=30, lr=1e-2, hidden=0)
    losses = train(x_lnd, y_nc, mask_nc, settings=settings).losses
    assert losses.shape == (3, 1, 30, 2)
    training = losses[:, 0, :, 0]
    validation = losses[:, 0, :, 1]
    assert validation[1, -1] < 0.6 * validation[1, 0]
    assert training[1, -1] < training[0, -1]
    assert validation[0, -1] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_a_hidden_layer_learns_what_a_line_cannot(kind):
    torch.manual_seed(0)
    x_lnd = torch.randn(1, 400, 2)
    y_nc = (x_lnd[0, :, :1] * x_lnd[0, :, 1:] > 0).float()  # whether both signs are the same
    validation = torch.arange(300, 400)
    accuracy = {}
    for hidden in (0, 32):
        probes = train_adam(
            x_lnd,
            y_nc,
            mask_snc=torch.ones_like(y_nc),
            train=torch.arange(300),
            validation=validation,
            kind=kind,
            settings=AdamSettings(epochs=25, batch=50, lr=3e-2, dropout=0.0, hidden=hidden),
        )
        p_nc = probes.probabilities(x_lnd[:, validation])[0, 0]
        accuracy[hidden] = ((p_nc > 0.5) == (y_nc[validation] > 0.5)).float().mean()
    assert accuracy[0] < 0.65
    assert accuracy[32] > 0.9


def test_dropout_leaves_features_out_of_training_alone():
    """A share of the features is set to zero and the rest scaled up, so that the mean stays."""
    x_lnd, y_nc, mask_nc = planted("binary")
    settings = AdamSettings(epochs=1, batch=len(TRAIN), lr=0.0, hidden=0, dropout=0.5)
    probes = train(x_lnd, y_nc, mask_nc, seeds=(2,), settings=settings)
    g = torch.Generator().manual_seed(2)
    weight = (torch.rand(D, 2, generator=g) * 2 - 1) * D**-0.5
    bias = (torch.rand(2, generator=g) * 2 - 1) * D**-0.5
    order = TRAIN[torch.randperm(len(TRAIN), generator=g)]
    keep = ~draw_dropped((len(TRAIN), D), 0.5, g)
    for layer in range(3):
        dropped = nn.functional.cross_entropy(
            2 * keep * x_lnd[layer, order] @ weight + bias, y_nc[order, 0].long()
        )
        whole = nn.functional.cross_entropy(
            x_lnd[layer, VALIDATION] @ weight + bias, y_nc[VALIDATION, 0].long()
        )
        torch.testing.assert_close(probes.losses[layer, 0, 0], torch.stack([dropped, whole]))


def test_patience_keeps_each_probe_at_its_lowest_validation_loss():
    x_lnd, y_nc, mask_nc = planted("binary")
    settings = AdamSettings(epochs=60, batch=30, lr=6e-2, hidden=0)
    whole = train(x_lnd, y_nc, mask_nc, seeds=(0, 1), settings=settings)
    patient = train(x_lnd, y_nc, mask_nc, seeds=(0, 1), settings=replace(settings, patience=3))
    epochs = patient.losses.shape[2]
    assert epochs < 60
    p_lsnc = patient.probabilities(x_lnd[:, VALIDATION])
    for layer in range(3):
        for seed in range(2):
            losses = patient.losses[layer, seed, :, 1]
            losses = losses[~losses.isnan()]
            same_epochs = whole.losses[layer, seed, : len(losses), 1]
            torch.testing.assert_close(losses, same_epochs)
            loss = nn.functional.binary_cross_entropy(
                p_lsnc[layer, seed, :, 0], y_nc[VALIDATION, 0]
            )
            torch.testing.assert_close(loss, losses.min(), atol=1e-5, rtol=1e-4)
            three_epochs_more = int(losses.argmin()) == len(losses) - 4
            assert three_epochs_more or len(losses) == epochs


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_as_many_entries_are_dropped_as_asked_for_and_none_depends_on_another(share):
    g = torch.Generator().manual_seed(0)
    dropped = draw_dropped((300, 401), share, g).float()
    assert dropped.shape == (300, 401)
    error = (share * (1 - share) / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - share) < 4 * error
    for lag in (1, 2, 3, 4, 401):
        flat = dropped.ravel() - share
        correlation = (flat[lag:] * flat[:-lag]).mean() / (share * (1 - share))
        assert abs(correlation) < 4 / dropped.numel() ** 0.5
    assert not torch.equal(draw_dropped((300, 401), share, g).float(), dropped)
