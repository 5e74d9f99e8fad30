"""Local semantics: which objects to ask about, so that an object's name does not tell its label.

An image shows a category where one of its instances covers at least the share
:attr:`~probekit.tasks.base.BuildSettings.smallest` of the image. Crowds count: they say that there
are many. Where all its instances are smaller, the image neither shows the category nor lacks it,
and is never asked about it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit.tasks.balance import balanced_assignment, random_chunks
from probekit.tasks.base import Selection, example_rows
from probekit.tasks.words import whole_word_pattern

PROMPT = "This image contains the following types of object:"
LIST_PROMPT = PROMPT + " {categories}"
QUERY_PROMPT = "Objects: {categories}.\nIs there a {category} in this image?"
# Categories that each image is asked about, as in the study.
ASKED_CATEGORIES = 3
SAMPLINGS = ("random", "popular", "adversarial")
# Names of categories in a line.
LISTED_NAMES = 10
# Endings of names and of their plurals, besides “s” and “es”.
PLURAL_ENDINGS = (("y", "ies"), ("fe", "ves"), ("person", "people"), ("mouse", "mice"))


# ------------------------------------------------------------------------ what an image shows


def categories_from_instances(
    instances: pd.DataFrame, images: pd.Index, *, names: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return which image shows which category, and of which it shows only tiny instances.

    Parameters
    ----------
    instances : DataFrame
        `image_id`, `category`, and `tiny`: is it too small to be asked about?
    images : Index
        The n images.
    names : sequence of str
        The c categories.

    Returns
    -------
    shows_nc, unclear_nc : DataFrame of bool
        Images by categories.
    """
    shows_nc = _category_table(instances[~instances.tiny], images, names=names)
    shows_tiny_nc = _category_table(instances[instances.tiny], images, names=names)
    return shows_nc, shows_tiny_nc & ~shows_nc


def _category_table(
    instances: pd.DataFrame, images: pd.Index, *, names: Sequence[str]
) -> pd.DataFrame:
    counts = pd.crosstab(instances.image_id, instances.category)
    counts = counts.reindex(index=images, columns=list(names), fill_value=0)
    return pd.DataFrame(counts.to_numpy() > 0, index=images, columns=list(names), dtype=bool)


def categories_from_captions(
    captions: pd.Series, images: pd.Index, *, names: Sequence[str], first_only: bool = True
) -> pd.DataFrame:
    """Return which image's captions name which category, in the singular or in the plural.

    This is how the published study labels images.

    Parameters
    ----------
    captions : Series
        The list of captions of each image.
    images : Index
        The n images.
    names : sequence of str
        The c categories.
    first_only : bool
        Whether to read the first caption alone, as the study does, or all of them.

    Returns
    -------
    DataFrame of bool
        Images by categories.
    """
    texts = []
    for image in images:
        image_captions = captions.get(image, [])
        if first_only:
            image_captions = image_captions[:1]
        texts.append(" . ".join(image_captions).lower())
    columns = {}
    for name in names:
        pattern = whole_word_pattern(_name_forms(name))
        columns[name] = [pattern.search(text) is not None for text in texts]
    return pd.DataFrame(columns, index=images, columns=list(names), dtype=bool)


def check_named(named_nc: pd.DataFrame) -> None:
    """Say in a line which categories no caption names; refuse if it is none of them.

    Parameters
    ----------
    named_nc : DataFrame of bool
        Images by categories, as :func:`categories_from_captions` returns them.

    Raises
    ------
    ValueError
        No caption names any category.
    """
    unnamed = [str(name) for name in named_nc.columns[~named_nc.any()]]
    if not unnamed:
        return
    listed = ", ".join(unnamed[:LISTED_NAMES]) + (", ..." if len(unnamed) > LISTED_NAMES else "")
    if len(unnamed) == len(named_nc.columns):
        raise ValueError(
            f"no first caption of an image names any of the categories ({listed}): write them as "
            "the captions do, in the singular, or take labels_from: instances"
        )
    tqdm.write(
        f"labels_from captions: {len(unnamed)} of {len(named_nc.columns)} categories are in no "
        f"first caption of an image ({listed})"
    )


def _name_forms(name: str) -> set[str]:
    """Return the name of a category and its plurals."""
    name = name.lower()
    forms = {name, f"{name}s", f"{name}es"}
    for singular, plural in PLURAL_ENDINGS:
        if name.endswith(singular):
            forms.add(name.removesuffix(singular) + plural)
    return forms


def measure_caption_labels(
    named_nc: pd.DataFrame, shows_nc: pd.DataFrame, *, unclear_nc: pd.DataFrame
) -> pd.DataFrame:
    """Measure how far labels from captions agree with labels from instances, over all images.

    Parameters
    ----------
    named_nc : DataFrame of bool
        Images by categories: does the caption name it?
    shows_nc, unclear_nc : DataFrame of bool
        The same shape, from the instances; what is unclear does not count.

    Returns
    -------
    DataFrame
        Indexed by `category`, ``"all"`` first. `images`: how many show it. `precision`: of those
        whose caption names it, the share that shows it. `recall`: of those that show it, the share
        whose caption names it. NaN where there are none.
    """
    is_clear_nc = ~unclear_nc.to_numpy(bool)
    named = named_nc.to_numpy(bool) & is_clear_nc
    shown = shows_nc.to_numpy(bool) & is_clear_nc
    both_count = _with_total((named & shown).sum(0))
    named_count = _with_total(named.sum(0))
    shown_count = _with_total(shown.sum(0))
    with np.errstate(invalid="ignore"):
        columns = {
            "images": shown_count,
            "precision": both_count / named_count,
            "recall": both_count / shown_count,
        }
    index = pd.Index(["all", *shows_nc.columns], name="category")
    return pd.DataFrame(columns, index=index)


def _with_total(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[counts.sum()], counts])


# ------------------------------------------------------------------------- one object at a time


def choose_objects(
    shows_nc: np.ndarray,
    *,
    absent: str,
    rng: np.random.Generator,
    unclear_nc: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose for each image one object that it shows, and one that it lacks.

    The absent objects are the present ones in a balanced assignment, so each object is asked about
    equally often with both answers.

    Parameters
    ----------
    shows_nc : ndarray of bool
        Shape (n, c): which image shows which object; at least one in each row, and not all.
    absent : str
        How the objects are sampled. The names are those of POPE (Li et al., 2023, section 5.1).

        ``"random"``
            Frequent and rare objects: present ones are drawn with a chance inverse to their
            frequency.
        ``"popular"``
            Frequent objects: present ones are drawn as they occur.
        ``"adversarial"``
            As popular, and the absent objects are those that occur most often together with what
            the images show.
    rng : Generator
        Source of the random numbers.
    unclear_nc : ndarray of bool, optional
        Shape (n, c): what an image neither shows nor lacks, and is not asked about.

    Returns
    -------
    present, absent : ndarray of int
        Shape (n,): numbers of objects. `absent` is -1 for images that are left out: as few as
        possible within each chunk of :data:`~probekit.tasks.balance.CHUNK` images.

    Raises
    ------
    ValueError
        The sampling is unknown.

    References
    ----------
    Li et al. (2023), Evaluating object hallucination in large vision-language models,
    https://arxiv.org/abs/2305.10355
    """
    if absent not in SAMPLINGS:
        raise ValueError(f"unknown sampling {absent!r}: take one of {', '.join(SAMPLINGS)}")
    shows_nc = shows_nc.astype(bool)
    barred_nc = shows_nc if unclear_nc is None else shows_nc | unclear_nc.astype(bool)
    weight_nc = shows_nc.astype(float)
    if absent == "random":
        weight_nc = shows_nc / np.maximum(shows_nc.sum(0), 1)
    present = _draw_present(weight_nc, rng)
    present = _limit_frequent(present, shows_nc, lacking_c=(~barred_nc).sum(0), rng=rng)
    fit_nc = _company(shows_nc) if absent == "adversarial" else None
    assigned = np.full(len(present), -1)
    for chunk in random_chunks(range(len(present)), rng):
        offered = present[chunk]
        if fit_nc is None:
            cost_nn = rng.random((len(chunk), len(chunk)))
        else:
            cost_nn = 1 - fit_nc[chunk][:, offered]
        cost_nn[barred_nc[chunk][:, offered]] = np.inf
        order = balanced_assignment(cost_nn)
        assigned[chunk] = np.where(order < 0, -1, offered[order])
    return present, assigned


def _draw_present(weight_nc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one object of each image, with a chance proportional to its weight."""
    cumulated_nc = (weight_nc / weight_nc.sum(1, keepdims=True)).cumsum(1)
    drawn = (rng.random((len(weight_nc), 1)) >= cumulated_nc).sum(1)
    return drawn.clip(max=weight_nc.shape[1] - 1)


def _limit_frequent(
    present: np.ndarray, shows_nc: np.ndarray, *, lacking_c: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Exchange present objects that more images were drawn for than there are images without it.

    They are exchanged for another object that the image shows, the one with most room left.
    """
    present = present.copy()
    room_c = lacking_c - np.bincount(present, minlength=shows_nc.shape[1])
    shows_several = shows_nc.sum(1) > 1
    for frequent in np.flatnonzero(room_c < 0):
        for i in rng.permutation(np.flatnonzero((present == frequent) & shows_several)):
            other = np.where(shows_nc[i], room_c, 0).argmax()
            if room_c[frequent] < 0 < room_c[other]:
                present[i] = other
                room_c[frequent] += 1
                room_c[other] -= 1
    return present


def _company(shows_nc: np.ndarray) -> np.ndarray:
    """Return how often each object occurs together with what an image shows, from 0 to 1.

    The conditional frequencies of the object, one for each object that the image shows, are summed.
    """
    shows_nc = shows_nc.astype(float)
    together_cc = shows_nc.T @ shows_nc / np.maximum(shows_nc.sum(0), 1)
    company_nc = shows_nc @ together_cc.T
    return company_nc / company_nc.max(initial=1)


def object_task(
    selection: Selection,
    rng: np.random.Generator,
    *,
    absent: str = "random",
    prompt: str = QUERY_PROMPT,
) -> pd.DataFrame:
    """Ask each image about one object that it shows and one that it lacks.

    The plain prompt lists all categories before, in an order of its own for each image.

    Parameters
    ----------
    selection : Selection
        Images that show no category, or all of them, are left out, as are those for which no
        object remains that they lack (where few categories are asked about).
    rng : Generator
        Source of the random numbers.
    absent : str
        How the objects are sampled, see :func:`choose_objects`.
    prompt : str
        Template of the prompts, with the fields `category` and, for the list, `categories`.
    """
    names = np.array(selection.shows_nc.columns)
    parts = []
    for split_images in selection.images_by_split():
        shows_nc, unclear_nc = _labels_of(selection, split_images)
        is_kept = shows_nc.any(1) & ~(shows_nc | unclear_nc).all(1)
        images = split_images[is_kept]
        lists = [", ".join(rng.permutation(names)) for _ in range(len(images))]
        present, lacked = choose_objects(
            shows_nc[is_kept], absent=absent, rng=rng, unclear_nc=unclear_nc[is_kept]
        )
        asked_rows = np.flatnonzero(lacked >= 0)
        for label, objects in ((1, present), (0, lacked)):
            prompts = [
                prompt.format(categories=lists[i], category=names[objects[i]]) for i in asked_rows
            ]
            parts.append(
                example_rows(
                    images.iloc[asked_rows],
                    prompts,
                    [label] * len(prompts),
                    asked=[[names[objects[i]]] for i in asked_rows],
                )
            )
    return pd.concat(parts)


# --------------------------------------------------------------------------- several categories


def category_task(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Ask which categories an image shows, with a prompt that does not name them.

    Images that are asked about nothing are left out. Labels and masks do not depend on `rng`: they
    are the same for all tasks that ask about a few categories per image.
    """
    mask_rng = np.random.default_rng([selection.settings.seed, 1])
    parts = []
    for images in selection.images_by_split():
        shows_nc, unclear_nc = _labels_of(selection, images)
        mask_nc = draw_balanced_mask(shows_nc.astype(int), rng=mask_rng, unclear_nc=unclear_nc)
        is_kept = mask_nc.any(1)
        parts.append(
            example_rows(
                images[is_kept],
                [PROMPT] * is_kept.sum(),
                shows_nc[is_kept],
                masks=mask_nc[is_kept],
            )
        )
    return pd.concat(parts)


def category_list_task(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Ask which categories an image shows, with a prompt that lists all of them.

    The order of the list is drawn for each image. Labels and masks are those of
    :func:`category_task`.
    """
    rows = category_task(selection, rng)
    names = list(selection.shows_nc.columns)
    prompts = [
        LIST_PROMPT.format(categories=", ".join(rng.permutation(names))) for _ in range(len(rows))
    ]
    return rows.assign(prompt=prompts)


def category_dense_task(selection: Selection, rng: np.random.Generator) -> pd.DataFrame:
    """Ask which categories an image shows; every category of every image counts.

    Most of them are absent.
    """
    shows_nc, unclear_nc = _labels_of(selection, selection.images)
    return example_rows(selection.images, [PROMPT] * len(shows_nc), shows_nc, masks=~unclear_nc)


def _labels_of(selection: Selection, images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    shows_nc = selection.shows_nc.loc[images.index].to_numpy()
    unclear_nc = selection.unclear_nc.loc[images.index].to_numpy()
    return shows_nc, unclear_nc


def draw_balanced_mask(
    labels_nc: np.ndarray,
    *,
    rng: np.random.Generator,
    count: int = ASKED_CATEGORIES,
    unclear_nc: np.ndarray | None = None,
) -> np.ndarray:
    """Draw which categories each image is asked about: one or two that it shows, the rest absent.

    Each category is asked about as often with the one answer as with the other, so that its name
    says nothing about its label.

    Parameters
    ----------
    labels_nc : ndarray of int
        Shape (n, c): 1 where the image shows the category.
    rng : Generator
        Source of the random numbers.
    count : int
        Categories that each image is asked about.
    unclear_nc : ndarray of bool, optional
        Shape (n, c): what an image neither shows nor lacks, and is not asked about.

    Returns
    -------
    ndarray of int
        Shape (n, c), with `count` ones in each row. They are fewer where there are few categories,
        or few images that lack them.

    Notes
    -----
    Present categories are drawn with a chance inverse to their frequency, two for half of the
    images that show several. Absent ones go where a category was asked about as present more often
    than as absent; images that show nothing are asked only where the others do not suffice. What
    still is not balanced is taken back.
    """
    mask_nc = _draw_present_categories(labels_nc, rng)
    owed_c = mask_nc.sum(0)
    barred_nc = labels_nc > 0
    if unclear_nc is not None:
        barred_nc = barred_nc | unclear_nc.astype(bool)
    shows_any = labels_nc.any(1)
    for rows in (np.flatnonzero(shows_any), np.flatnonzero(~shows_any)):
        if owed_c.any():
            _add_absent_categories(
                mask_nc,
                owed_c,
                rows=rng.permutation(rows),
                barred_nc=barred_nc,
                count=count,
                rng=rng,
            )
    # A generator of its own: what is drawn next does not depend on how many are taken back.
    removing_rng = rng.spawn(1)[0]
    for c in np.flatnonzero(owed_c):
        present_rows = np.flatnonzero(mask_nc[:, c] * labels_nc[:, c])
        removed_rows = removing_rng.permutation(present_rows)[: owed_c[c]]
        mask_nc[removed_rows, c] = 0
    return mask_nc


def _draw_present_categories(labels_nc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mask_nc = np.zeros(labels_nc.shape, dtype=int)
    rarity_c = 1 / np.maximum(labels_nc.sum(0), 1)
    shows_any = labels_nc.any(1)
    several = rng.permutation(np.flatnonzero(labels_nc.sum(1) > 1))
    rows_with_two = set(several[: shows_any.sum() // 2].tolist())
    for row in np.flatnonzero(shows_any):
        present = np.flatnonzero(labels_nc[row])
        chance = rarity_c[present] / rarity_c[present].sum()
        size = 2 if row in rows_with_two else 1
        mask_nc[row, rng.choice(present, size=size, replace=False, p=chance)] = 1
    return mask_nc


def _add_absent_categories(
    mask_nc: np.ndarray,
    owed_c: np.ndarray,
    *,
    rows: np.ndarray,
    barred_nc: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> None:
    """Ask rows about absent categories, those first that are owed most; changes mask and owed."""
    for row in rows:
        absent = np.flatnonzero(~barred_nc[row])
        urgency = owed_c[absent] + rng.random(len(absent))
        most_urgent = absent[np.argsort(-urgency, kind="stable")]
        added = most_urgent[: count - mask_nc[row].sum()]
        added = added[owed_c[added] > 0]
        mask_nc[row, added] = 1
        owed_c[added] -= 1
