"""Probes trained with Adam: layers, seeds and sets of labels side by side.

They are the probe of the published study that probekit started from (dropout and a linear map) and
a probe with one hidden layer. Every layer and set of labels has its own weights and its own loss,
so that one step moves them all and none touches another. Sets with the same seed see the same
batches with the same features dropped; their outputs stand side by side in one matrix product.

Gradients are written out and the optimiser is one fused kernel, so that what is left is matrix
products and memory traffic: at the study's size (three seeds with three sets of labels, 40 classes,
1,536 features) a step of one layer moves some 20 MB of weights, gradients and moments.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional
from torch.optim.adam import adam


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """Settings of the training; the defaults are the published study's.

    Features are not standardised.

    Attributes
    ----------
    epochs : int
        Passes over the training examples, at most.
    batch : int
        Examples per step.
    lr : float
        Adam's learning rate.
    dropout : float
        Share of the input features that is set to zero in training.
    hidden : int
        Width of the hidden layer (ReLU) of the probe ``"mlp"``; 0 for none, as in the probe
        ``"linear"``.
    patience : int or None
        Stop a probe after this many epochs without a lower validation loss, and keep its weights
        from the epoch with the lowest. None trains all epochs and keeps the last.
    """

    epochs: int = 10
    batch: int = 16
    lr: float = 1e-3
    dropout: float = 0.1
    hidden: int = 128
    patience: int | None = None


@dataclass(frozen=True)
class AdamProbes:
    """Trained probes of l layers and s sets of labels.

    Attributes
    ----------
    weights : list of Tensor
        (l, s, in, out) of each linear map, from the first to the last.
    biases : list of Tensor
        (l, s, out) of each linear map.
    losses : Tensor
        (l, s, epochs, 2): the training loss, measured with dropout while the weights change, and
        the validation loss without dropout; nan after a probe has stopped.
    kind : str
        ``"binary"`` or ``"multilabel"``, see :func:`train_adam`.
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    losses: torch.Tensor
    kind: str

    def select_set(self, number: int) -> AdamProbes:
        """Return the probes of one set of labels alone; s is then 1."""
        place = slice(number, number + 1)
        return AdamProbes(
            weights=[weight[:, place] for weight in self.weights],
            biases=[bias[:, place] for bias in self.biases],
            losses=self.losses[:, place],
            kind=self.kind,
        )

    @classmethod
    def stack(cls, parts: Sequence[AdamProbes]) -> AdamProbes:
        """Put sets of labels beside each other; losses are nan after the last epoch of a set."""
        epochs = max(part.losses.shape[2] for part in parts)
        losses = [
            functional.pad(part.losses, (0, 0, 0, epochs - part.losses.shape[2]), value=torch.nan)
            for part in parts
        ]
        return cls(
            weights=[
                torch.cat(of_map, 1) for of_map in zip(*(p.weights for p in parts), strict=True)
            ],
            biases=[
                torch.cat(of_map, 1) for of_map in zip(*(p.biases for p in parts), strict=True)
            ],
            losses=torch.cat(losses, 1),
            kind=parts[0].kind,
        )

    def probabilities(self, x_lnd: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of label 1.

        Parameters
        ----------
        x_lnd : Tensor
            (l, n, d) features.

        Returns
        -------
        Tensor
            (l, s, n, c); c is 1 for ``kind="binary"``.
        """
        logits = x_lnd[:, None] @ self.weights[0] + self.biases[0][:, :, None]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            logits = logits.relu() @ weight + bias[:, :, None]
        if self.kind == "binary":
            return logits.softmax(-1)[..., 1:]
        return logits.sigmoid()


def train_adam(
    x_lnd: torch.Tensor,
    y_snc: torch.Tensor,
    *,
    mask_snc: torch.Tensor,
    train: torch.Tensor,
    validation: torch.Tensor,
    kind: str,
    seeds: Sequence[int] = (0,),
    settings: AdamSettings = AdamSettings(),
) -> AdamProbes:
    """Train one probe for each layer and set of labels.

    A probe does not depend on which others are trained beside it.

    Parameters
    ----------
    x_lnd : Tensor
        (l, n, d) float32 features.
    y_snc : Tensor
        (s, n, c) float32 labels of each set, 0 or 1; (n, c) if all sets have the same.
    mask_snc : Tensor
        1 where an entry of the labels counts, else 0; of the same shape.
    train, validation : Tensor
        Numbers of the rows to train on, and of those whose loss is measured after each epoch.
    kind : str
        ``"binary"`` (c is 1: two outputs and their cross-entropy, without the mask) or
        ``"multilabel"`` (c outputs, binary cross-entropy of the entries that count).
    seeds : sequence of int
        The seed of each set: of the initial weights, the order of the batches and the dropout, all
        of them drawn on the device of x.
    settings : AdamSettings
        Settings of the training.
    """
    y_snc = y_snc.expand(len(seeds), *y_snc.shape[-2:])
    mask_snc = mask_snc.expand(len(seeds), *mask_snc.shape[-2:])
    trained = {}
    for same_seeds in _arrange_by_seed(seeds):
        sets = [place for places in same_seeds.values() for place in places]
        training = _Training(
            x_lnd,
            y_snc[sets],
            mask_snc[sets],
            train=train.to(x_lnd.device),
            validation=validation.to(x_lnd.device),
            kind=kind,
            seeds=list(same_seeds),
            settings=settings,
        )
        probes = training.run()
        for number, place in enumerate(sets):
            trained[place] = probes.select_set(number)
    return AdamProbes.stack([trained[place] for place in range(len(seeds))])


def _arrange_by_seed(seeds: Sequence[int]) -> Iterator[dict[int, list[int]]]:
    """Yield the places of the sets of each seed, those seeds together that have as many sets."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, seed in enumerate(seeds):
        places[seed].append(place)
    for count in sorted({len(of_seed) for of_seed in places.values()}):
        yield {seed: of_seed for seed, of_seed in places.items() if len(of_seed) == count}


class _Training:
    """Training of l layers, r seeds and q sets of labels of each seed.

    The s = r x q sets are numbered seed by seed. The weights of the first map are (l, r, q x out,
    d), so that the sets of a seed share the product with its examples; those of the second are (l,
    s, hidden, out).
    """

    def __init__(
        self,
        x_lnd: torch.Tensor,
        y_snc: torch.Tensor,
        mask_snc: torch.Tensor,
        *,
        train: torch.Tensor,
        validation: torch.Tensor,
        kind: str,
        seeds: Sequence[int],
        settings: AdamSettings,
    ):
        self._x_lnd = x_lnd
        self._y_snc = y_snc
        self._mask_snc = mask_snc
        self._train = train
        self._validation = validation
        self._kind = kind
        self._settings = settings
        self._n_layers, _, d = x_lnd.shape
        self._sets_per_seed = len(y_snc) // len(seeds)
        self._generators = [torch.Generator(x_lnd.device).manual_seed(seed) for seed in seeds]
        sizes = [d]
        if settings.hidden:
            sizes.append(settings.hidden)
        sizes.append(2 if kind == "binary" else y_snc.shape[-1])
        self._weights = []
        self._biases = []
        for fan_in, fan_out in pairwise(sizes):
            self._weights.append(self._draw(fan_in, fan_in, fan_out))
            self._biases.append(self._draw(fan_in, fan_out))
        self._weights[0] = self._side_by_side(self._weights[0]).contiguous()
        self._parameters = [*self._weights, *self._biases]
        self._weight_gradients = [torch.zeros_like(weight) for weight in self._weights]
        self._bias_gradients = [torch.zeros_like(bias) for bias in self._biases]
        self._moments = [
            [torch.zeros_like(parameter) for parameter in self._parameters] for _ in range(2)
        ]
        self._steps = [torch.zeros((), device=x_lnd.device) for _ in self._parameters]

    def _draw(self, fan_in: int, *shape: int) -> torch.Tensor:
        """Draw parameters (l, s, ...) as torch.nn.Linear does; a seed's are the same everywhere."""
        first = []
        for generator in self._generators:
            uniform = torch.rand(*shape, generator=generator, device=generator.device) * 2 - 1
            first.extend([uniform * fan_in**-0.5] * self._sets_per_seed)
        return torch.stack(first).expand(self._n_layers, -1, *shape).clone()

    def _side_by_side(self, values_lsno: torch.Tensor) -> torch.Tensor:
        """Return (l, r, q x out, n) of what is (l, s, n, out)."""
        by_seed = values_lsno.unflatten(1, (-1, self._sets_per_seed))
        return by_seed.mT.flatten(2, 3)

    def _one_by_one(self, values_lrpn: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`_side_by_side`."""
        by_set = values_lrpn.unflatten(2, (self._sets_per_seed, -1))
        return by_set.mT.flatten(1, 2)

    def run(self) -> AdamProbes:
        """Train all epochs, or until every probe has lost its patience."""
        settings = self._settings
        best_parameters = [torch.zeros_like(parameter) for parameter in self._by_set()]
        shape = (self._n_layers, len(self._y_snc))
        lowest_ls = torch.full(shape, torch.inf, device=self._x_lnd.device)
        epochs_since_lowest_ls = torch.zeros_like(lowest_ls)
        patience = settings.patience or torch.inf
        losses = []
        for _ in range(settings.epochs):
            train_loss_ls = self._run_epoch()
            validation_loss_ls = self._validate()
            stopped_ls = epochs_since_lowest_ls >= patience
            epoch_losses = torch.stack([train_loss_ls, validation_loss_ls], -1)
            losses.append(torch.where(stopped_ls[..., None], torch.nan, epoch_losses))
            keep_ls = ~stopped_ls
            if settings.patience:
                keep_ls = keep_ls & (validation_loss_ls < lowest_ls)
            epochs_since_lowest_ls = torch.where(keep_ls, 0, epochs_since_lowest_ls + 1)
            lowest_ls = torch.where(keep_ls, validation_loss_ls, lowest_ls)
            for best, now in zip(best_parameters, self._by_set(), strict=True):
                best[keep_ls] = now[keep_ls]
            if settings.patience and bool((epochs_since_lowest_ls >= patience).all()):
                break
        maps = len(self._weights)
        return AdamProbes(
            weights=best_parameters[:maps],
            biases=best_parameters[maps:],
            losses=torch.stack(losses, 2).cpu(),
            kind=self._kind,
        )

    def _by_set(self) -> list[torch.Tensor]:
        """Return the parameters as :class:`AdamProbes` has them, weights first."""
        return [self._one_by_one(self._parameters[0]), *self._parameters[1:]]

    def _run_epoch(self) -> torch.Tensor:
        """Train one epoch; return the mean loss (l, s)."""
        device = self._x_lnd.device
        n = len(self._train)
        order_rn = self._train[
            torch.stack([torch.randperm(n, generator=g, device=device) for g in self._generators])
        ]
        order_sn = order_rn.repeat_interleave(self._sets_per_seed, dim=0)[..., None]
        columns = self._y_snc.shape[-1]
        y_snc = self._y_snc.gather(1, order_sn.expand(-1, -1, columns))
        mask_snc = self._mask_snc.gather(1, order_sn.expand(-1, -1, columns))
        loss_ls = torch.zeros(self._n_layers, len(y_snc), device=device)
        batches = zip(
            *(values.split(self._settings.batch, dim=1) for values in (order_rn, y_snc, mask_snc)),
            strict=True,
        )
        for rows_rb, y_sbc, mask_sbc in batches:
            x_lrbd = self._x_lnd.index_select(1, rows_rb.flatten()).unflatten(1, rows_rb.shape)
            if self._settings.dropout:
                x_lrbd.masked_fill_(self._draw_dropped(x_lrbd.shape[2:]), 0)
            share = rows_rb.shape[1] / len(self._train)
            loss_ls += share * self._compute_gradients(x_lrbd, y_sbc, mask_sbc)
            self._step()
        return loss_ls

    def _draw_dropped(self, shape: torch.Size) -> torch.Tensor:
        """Return (r, b, d) whether a feature is dropped; a seed drops the same at all layers."""
        dropped = [draw_dropped(shape, self._settings.dropout, g) for g in self._generators]
        return torch.stack(dropped)

    def _step(self) -> None:
        """Change the parameters along their gradients."""
        adam(
            self._parameters,
            [*self._weight_gradients, *self._bias_gradients],
            exp_avgs=self._moments[0],
            exp_avg_sqs=self._moments[1],
            max_exp_avg_sqs=[],
            state_steps=self._steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._settings.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _compute_gradients(
        self, x_lrbd: torch.Tensor, y_sbc: torch.Tensor, mask_sbc: torch.Tensor
    ) -> torch.Tensor:
        """Set the gradients of a batch; return its loss (l, s).

        Some features of `x_lrbd` are dropped; the others are scaled up here.
        """
        scale = 1 / (1 - self._settings.dropout)
        hidden, logits = self._forward(x_lrbd, scale=scale)
        loss_ls, change = _loss(logits, y_sbc, mask_sbc, self._kind)
        torch.sum(change, 2, out=self._bias_gradients[-1])
        if hidden is not None:
            torch.matmul(hidden.mT, change, out=self._weight_gradients[1])
            change = (change @ self._weights[1].mT) * (hidden > 0)
            torch.sum(change, 2, out=self._bias_gradients[0])
        torch.matmul(self._side_by_side(change * scale), x_lrbd, out=self._weight_gradients[0])
        return loss_ls

    def _forward(
        self, x_lrbd: torch.Tensor, *, scale: float = 1.0
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what the hidden layer gives (l, s, b, hidden), if there is one, and the logits."""
        product_lrpb = (x_lrbd @ self._weights[0].mT).mT
        logits = self._one_by_one(product_lrpb) * scale + self._biases[0][:, :, None]
        if len(self._weights) == 1:
            return None, logits
        hidden = logits.relu()
        return hidden, hidden @ self._weights[1] + self._biases[1][:, :, None]

    def _validate(self) -> torch.Tensor:
        """Return the validation loss (l, s), without dropout."""
        x_lrvd = self._x_lnd[:, None, self._validation]
        _, logits = self._forward(x_lrvd)
        y_svc = self._y_snc[:, self._validation]
        mask_svc = self._mask_snc[:, self._validation]
        return _loss(logits, y_svc, mask_svc, self._kind)[0]


def draw_dropped(shape: Sequence[int], share: float, generator: torch.Generator) -> torch.Tensor:
    """Draw which entries are dropped, a share of them (to 1/65,536).

    A random number of 64 bits decides on four: to draw them is what dropout costs.
    """
    size = math.prod(shape)
    numbers = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
    numbers.random_(-(2**63), None, generator=generator)
    threshold = round(share * 2**16) - 2**15
    return (numbers.view(torch.int16)[:size] < threshold).view(*shape)


def _loss(
    logits: torch.Tensor, y_sbc: torch.Tensor, mask_sbc: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss (l, s) over examples ("binary") or entries that count, and its gradient.

    Logits and gradient are (l, s, b, out).
    """
    if kind == "binary":
        log_p = logits.log_softmax(-1)
        is_label = torch.cat([1 - y_sbc, y_sbc], -1)
        examples = logits.shape[2]
        loss_ls = -(log_p * is_label).sum((-2, -1)) / examples
        return loss_ls, (log_p.exp() - is_label) / examples
    weight_sbc = mask_sbc / mask_sbc.sum((-2, -1), keepdim=True).clamp(min=1)
    loss_ls = ((functional.softplus(logits) - y_sbc * logits) * weight_sbc).sum((-2, -1))
    return loss_ls, (logits.sigmoid() - y_sbc) * weight_sbc
