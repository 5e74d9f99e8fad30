"""How layers resemble each other, within a model and between two, and how many directions they use.

The images are the units: of each test image the state of its first example is compared, so that
examples of one image do not count as several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from probekit.extraction.store import Activations
from probekit.probes import bootstrap

# Images that are compared at most: what is held grows with their square.
MOST_IMAGES = 1000


class LayerGrams(NamedTuple):
    """The scalar products of the centred states of images, of every layer.

    Attributes
    ----------
    model : str
    layers : list of str
        The l layers.
    images : list of str
        The n images.
    gram_lnn : Tensor
        (l, n, n) float32, each layer's divided by its largest value, on the device that compares.
    """

    model: str
    layers: list[str]
    images: list[str]
    gram_lnn: torch.Tensor

    @classmethod
    def of(cls, activations: Activations, *, pooling: str, device: str = "cpu") -> LayerGrams:
        """Read the decoder's layers of some activations.

        Parameters
        ----------
        activations : Activations
        pooling : str
        device : str
            Where layers are compared.

        Raises
        ------
        ValueError
            There are fewer than four test images.
        """
        examples = activations.examples
        tests = examples[examples.split == "test"].drop_duplicates("image_id").head(MOST_IMAGES)
        if len(tests) < 4:
            raise ValueError(
                f"{len(tests)} test images are too few to compare layers: take more in "
                "01_build_data"
            )
        places = examples.index.get_indexer(tests.index)
        layers = [layer for layer in activations.layers if layer.startswith("lm.")]
        grams = []
        for layer in layers:
            x_nd = torch.as_tensor(activations[layer, pooling][places], device=device).double()
            x_nd = x_nd - x_nd.mean(0)
            gram_nn = x_nd @ x_nd.T
            grams.append((gram_nn / gram_nn.abs().max().clamp(min=1e-30)).float())
        return cls(
            activations.meta["model"],
            layers,
            [str(image) for image in tests.image_id],
            torch.stack(grams),
        )


def layer_similarity(a: LayerGrams, b: LayerGrams, *, resamples: int = 200) -> pd.DataFrame:
    r"""Compare all layers of one model with all of another one, on the same images.

    Parameters
    ----------
    a, b : LayerGrams
        Of the same images.
    resamples : int
        Bootstrap samples of the images.

    Returns
    -------
    DataFrame
        One row per pair: `model`, `layer`, `other_model`, `other_layer`, `cka` with the 95 %
        percentile interval `lo` to `hi`, and the number of images `n`. 1 is the same up to
        rotation and scale, 0 is unrelated; a little below 0 is possible.

    Raises
    ------
    ValueError
        They are of other images.

    Notes
    -----
    Linear CKA (Kornblith et al. 2019, arXiv:1905.00414) with the unbiased estimate of HSIC (Song et
    al. 2012, equation 5), which for few images in many dimensions does not come out large by
    itself (Nguyen et al. 2021, arXiv:2010.15327). A bootstrap sample weighs images; an image is
    never compared with itself.
    """
    if a.images != b.images:
        raise ValueError("the two models were given other images: extract both for one run")
    weight_bn = _weights(a, resamples)
    a_lnn = _without_diagonal(a.gram_lnn)
    b_lnn = _without_diagonal(b.gram_lnn)
    own_a_bl = torch.stack([_hsic(x, x[None], weight_bn)[:, 0] for x in a_lnn], 1)
    own_b_bl = torch.stack([_hsic(x, x[None], weight_bn)[:, 0] for x in b_lnn], 1)
    tables = []
    for k, layer in enumerate(a.layers):
        cross_bl = _hsic(a_lnn[k], b_lnn, weight_bn)
        scale_bl = (own_a_bl[:, [k]] * own_b_bl).clamp(min=1e-30).sqrt()
        cka_bl = (cross_bl / scale_bl).cpu().numpy()
        lower_l, upper_l = np.quantile(cka_bl[1:], [0.025, 0.975], axis=0)
        table = {
            "layer": layer,
            "other_layer": b.layers,
            "cka": cka_bl[0],
            "lo": lower_l,
            "hi": upper_l,
        }
        tables.append(pd.DataFrame(table))
    joined = pd.concat(tables, ignore_index=True)
    return joined.assign(model=a.model, other_model=b.model, n=len(a.images))


def effective_rank(grams: LayerGrams, *, resamples: int = 200) -> pd.DataFrame:
    r"""Count how many directions the states of each layer use.

    Parameters
    ----------
    grams : LayerGrams
    resamples : int

    Returns
    -------
    DataFrame
        One row per layer: `model`, `layer`, `effective_rank` with the 95 % interval `lo` to `hi`,
        and the number of images `n`, which bounds it.

    Notes
    -----
    The participation ratio of the eigenvalues of the covariance,
    :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2`: d for d equally large directions, 1 for one.
    Fewer images have a lower one, so samples, in which some images are missing, lie below it as it
    lies below the truth: the interval is the basic one (Davison and Hinkley 1997, equation 5.6).
    That corrects for it and may lie above `effective_rank`, which is not corrected.
    """
    weight_bn = _weights(grams, resamples)
    ranks = []
    for gram_nn in grams.gram_lnn:
        total_b = weight_bn.sum(1)
        mean_bn = weight_bn @ gram_nn / total_b[:, None]
        of_mean_b = (mean_bn * weight_bn).sum(1) / total_b
        # trace(C) and trace(C C) of the covariance around the sample's own mean
        trace_b = weight_bn @ gram_nn.diagonal() / total_b - of_mean_b
        squares_b = ((weight_bn @ gram_nn**2) * weight_bn).sum(1) / total_b**2
        squares_b = squares_b - 2 * (mean_bn**2 * weight_bn).sum(1) / total_b + of_mean_b**2
        ranks.append((trace_b**2 / squares_b.clamp(min=1e-30)).cpu().numpy())
    rank_bl = np.stack(ranks, 1)
    lower_l, upper_l = np.quantile(rank_bl[1:], [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "model": grams.model,
            "layer": grams.layers,
            "effective_rank": rank_bl[0],
            "lo": 2 * rank_bl[0] - upper_l,
            "hi": 2 * rank_bl[0] - lower_l,
            "n": len(grams.images),
        }
    )


def _weights(grams: LayerGrams, resamples: int) -> torch.Tensor:
    """(1 + b, n) how often each image counts: once, then in each bootstrap sample."""
    device = str(grams.gram_lnn.device)
    drawn_bn = bootstrap.image_weights(grams.images, resamples=resamples, device=device)
    return torch.cat([torch.ones_like(drawn_bn[:1]), drawn_bn]).float()


def _without_diagonal(gram_lnn: torch.Tensor) -> torch.Tensor:
    without = gram_lnn.clone()
    without.diagonal(dim1=1, dim2=2).zero_()
    return without


def _hsic(k_nn: torch.Tensor, others_lnn: torch.Tensor, weight_bn: torch.Tensor) -> torch.Tensor:
    """Estimate HSIC without bias, (b, l), of one layer with l others, up to a common factor.

    Both have zeros on the diagonal; images are weighted.
    """
    n_b = weight_bn.sum(1)[:, None]
    row_bn = weight_bn @ k_nn
    total_b = (row_bn * weight_bn).sum(1)[:, None]
    estimates = []
    for other_nn in others_lnn:
        other_row_bn = weight_bn @ other_nn
        product_b = ((weight_bn @ (k_nn * other_nn)) * weight_bn).sum(1)
        other_total_b = (other_row_bn * weight_bn).sum(1)
        between_b = (row_bn * other_row_bn * weight_bn).sum(1)
        estimates.append(torch.stack([product_b, other_total_b, between_b]))
    product_bl, other_total_bl, between_bl = torch.stack(estimates, -1).unbind(0)
    totals_bl = total_b * other_total_bl / ((n_b - 1) * (n_b - 2))
    return product_bl + totals_bl - 2 * between_bl / (n_b - 2)


def compare_models(
    views: Sequence[Activations], *, pooling: str, resamples: int = 200, device: str = "cpu"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the layers of each model with each other, and of each pair with the same images.

    Parameters
    ----------
    views : sequence of Activations
        Of trained models.
    pooling : str
    resamples : int
    device : str
        Where layers are compared.

    Returns
    -------
    similarity, ranks : DataFrame
        All tables of :func:`layer_similarity` and of :func:`effective_rank`.
    """
    grams = [LayerGrams.of(view, pooling=pooling, device=device) for view in views]
    similarities = []
    for i, first in enumerate(grams):
        for second in grams[i:]:
            if first.images == second.images:
                similarities.append(layer_similarity(first, second, resamples=resamples))
    ranks = [effective_rank(one, resamples=resamples) for one in grams]
    return (
        pd.concat(similarities, ignore_index=True).assign(pooling=pooling),
        pd.concat(ranks, ignore_index=True).assign(pooling=pooling),
    )
