"""From examples to activations: the only step that needs the model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit import coco, paths, pool, store
from probekit.tasks import rows_key

if TYPE_CHECKING:
    from probekit.models import Vlm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass(frozen=True)
class Extraction:
    """Settings of one extraction; all but `batch_tokens` name its folder.

    Attributes
    ----------
    model, revision, dtype, untrained, seed : as for :func:`probekit.models.load_vlm`
    poolings : see :mod:`probekit.pool`
    longest_side : pixels that bound an image before the processor sees it; None leaves it to the checkpoint's rule
    shard_images : images a shard, the unit of work, of writing and of resuming
    batch_tokens : tokens that a batch of whole images with their prompts is filled up to
    sharing : run each image once for all its prompts: "auto" where a check finds it exact, "on" (an error where it is
        not), "off"
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    untrained: bool = False
    seed: int = 0
    poolings: tuple[str, ...] = ("mean",)
    longest_side: int | None = None
    shard_images: int = 200
    batch_tokens: int = 8192
    sharing: str = "auto"


def resolved(settings: Extraction, device: str) -> Extraction:
    """The settings with what they leave open filled in: the type that the device takes, the commit on the hub."""
    from probekit.models import best_dtype, commit_of

    return replace(settings, dtype=settings.dtype or best_dtype(device),
                   revision=commit_of(settings.model, settings.revision))


def folder_of(settings: Extraction, examples: pd.DataFrame) -> Path:
    """The folder that these (resolved) settings, this checkpoint and these examples own.

    Raises
    ------
    FileNotFoundError
        An image of the examples is gone.
    """
    from probekit.models import locate

    source = Path(locate(settings.model))
    files = sorted(f for f in source.glob("*") if f.is_file()) if source.is_absolute() else []  # a hub id has none
    weights = [(f.name, f.stat().st_size, _sampled_hash(f)) for f in files]
    try:
        sizes = [paths.resolve(file).stat().st_size for file in examples.file.unique()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is gone: run 01_build_data again") from None
    name = source.name + ("-untrained" if settings.untrained else "")
    lasting = replace(settings, batch_tokens=0)  # batches change no result, and may be made smaller half-way
    return paths.DATA / "activations" / name / paths.fingerprint(lasting, weights, sizes, rows_key(examples))


def _sampled_hash(file: Path, pieces: int = 128, piece: int = 1 << 15) -> str:
    """Hash of 4 MiB spread over a file: tells checkpoints apart without reading gigabytes."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as handle:
        for at in sorted({round(k * max(0, size - piece) / (pieces - 1)) for k in range(pieces)}):
            handle.seek(at)
            digest.update(handle.read(piece))
    return digest.hexdigest()


def shard_bounds(examples: pd.DataFrame, shard_images: int) -> np.ndarray:
    """First rows of the shards, and n at the end; the examples of one image stay together."""
    image = examples.image_id.ne(examples.image_id.shift()).cumsum().to_numpy() - 1
    starts = np.flatnonzero(np.diff(image // shard_images, prepend=-1))
    return np.append(starts, len(examples))


# ------------------------------------------------------------------------------------------------------------ a shard


@dataclass(frozen=True)
class Work:
    """One image with its prompts: where its examples are in the shard, and, if it is shared, the prompts' tokens.

    `tokens` is what it adds to a batch.
    """

    image: object
    tails: list[list[int]]
    places: np.ndarray
    tokens: int


def extract_shard(vlm: Vlm, settings: Extraction, sharing: bool, examples: pd.DataFrame, folder: Path, i: int,
                  bar: tqdm) -> Path:
    """Compute and write shard i: the same settings, model and examples make the same file.

    Raises
    ------
    FloatingPointError
        A hidden state is not finite (the layer and the example are named).
    ValueError
        Features that do not differ between examples.
    """
    from probekit import forward

    start, stop = shard_bounds(examples, settings.shard_images)[[i, i + 1]]
    rows = examples.iloc[start:stop].reset_index(drop=True)
    states: dict[str, np.ndarray] = {}
    for batch in _batches(_ahead(vlm, settings, sharing, rows), settings.batch_tokens):
        places = np.concatenate([work.places for work in batch])
        if sharing:
            owner = np.repeat(range(len(batch)), [len(work.places) for work in batch])
            tails = [tail for work in batch for tail in work.tails]
            found = forward.shared(vlm, [work.image for work in batch], tails, owner, settings.poolings)
        else:
            images = [work.image for work in batch for _ in work.places]
            found = forward.plain(vlm, images, rows.prompt[places].tolist(), settings.poolings)
        for key, values in found.items():
            states.setdefault(key, np.empty((len(rows), values.shape[1]), np.float32))[places] = values.cpu().numpy()
        bar.update(len(batch))
    _check(states, rows, vlm.name)
    return store.write_shard(folder, i, states, int(start))


def _ahead(vlm: Vlm, settings: Extraction, sharing: bool, rows: pd.DataFrame, workers: int = 2) -> Iterator[Work]:
    """Images of a shard in order, decoded and preprocessed by threads while the model is busy."""
    tails = vlm.tokens_after_image(rows.prompt.tolist()) if sharing else None
    first = coco.load_rgb(paths.resolve(rows.file[0]), settings.longest_side)
    usual = 0 if sharing else vlm.prepare([first], [rows.prompt[0]])["input_ids"].shape[1]

    def make(places: np.ndarray) -> Work:
        image = coco.load_rgb(paths.resolve(rows.file[places[0]]), settings.longest_side)
        if not sharing:
            return Work(image, [], places, usual * len(places))
        ready, own = vlm.prepare_image(image), [tails[k] for k in places]
        before = ready["input_ids"].shape[1]
        vlm.check_length(before + max(map(len, own)), rows.prompt[places[np.argmax([*map(len, own)])]])
        return Work(ready, own, places, before + sum(map(len, own)))

    groups = iter(np.split(np.arange(len(rows)), np.flatnonzero(rows.image_id.diff().to_numpy()[1:]) + 1))
    with ThreadPoolExecutor(workers) as pool:
        coming: list[Future[Work]] = [pool.submit(make, places) for places in islice(groups, 4 * workers)]
        while coming:
            done = coming.pop(0).result()
            coming += [pool.submit(make, places) for places in islice(groups, 1)]
            yield done


def _batches(works: Iterator[Work], budget: int) -> Iterator[list[Work]]:
    """Images of one shape together, each with all its prompts, until the next would go over the budget of tokens.

    Images of rare shapes wait for others of theirs, up to four budgets in all; then the fullest batch goes.
    """
    from probekit.forward import shape_of

    waiting: dict[tuple, list[Work]] = defaultdict(list)
    filled: dict[tuple, int] = defaultdict(int)
    for work in works:
        shape = shape_of(work.image) if work.tails else ()
        if waiting[shape] and filled[shape] + work.tokens > budget:
            filled.pop(shape)
            yield waiting.pop(shape)
        waiting[shape].append(work)
        filled[shape] += work.tokens
        if sum(filled.values()) > 4 * budget:
            fullest = max(filled, key=filled.get)
            filled.pop(fullest)
            yield waiting.pop(fullest)
    yield from waiting.values()


def _check(states: dict[str, np.ndarray], rows: pd.DataFrame, name: str) -> None:
    for key, values in states.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            row = rows.iloc[bad[0]]
            raise FloatingPointError(f"{name}, {key}: not finite for {len(bad)} examples, the first is {row.file} with "
                                     f"{row.prompt[:80]!r}; try dtype=\"float32\" or \"bfloat16\"")
    last = max(key.partition("/")[0] for key in states)
    for pooling in ("mean", "max", "last"):  # the first tokens of a causal model are always the same
        values = states.get(f"{last}/{pooling}")
        if values is not None and rows.file.nunique() > 1 and (values == values[0]).all():
            raise ValueError(f"{name}, {last}/{pooling}: the same for all {len(rows)} examples of a shard, so the "
                             "model does not see them; check the processor and the attention mask of this checkpoint")


# ------------------------------------------------------------------------------------------------------------- a run


def extract(settings: Extraction, examples: pd.DataFrame, device: str | None = None) -> store.Store:
    """Extract all examples, shard by shard; what is already on disk is not computed again.

    The model is loaded only where a shard is missing, and released at the end.

    Parameters
    ----------
    examples : columns `image_id`, `file`, `prompt`; those of one image next to each other
    device : see :func:`probekit.models.load_vlm`
    """
    from probekit.models import best_device, load_vlm

    for pooling in settings.poolings:
        pool.check(pooling)
    if settings.sharing not in ("auto", "on", "off"):
        raise ValueError(f"sharing={settings.sharing!r}: take \"auto\", \"on\" or \"off\"")
    device = device or best_device()
    settings = resolved(settings, device)
    folder = folder_of(settings, examples)
    bounds = shard_bounds(examples, settings.shard_images)
    known = (folder / "meta.json").exists()  # shards without it cannot be told how they were made
    missing = [i for i, start in enumerate(bounds[:-1]) if not (known and store.is_done(folder, i, int(start)))]
    if missing:
        vlm = load_vlm(settings.model, settings.revision, settings.dtype, device, settings.untrained, settings.seed)
        try:
            sharing, words = _sharing(vlm, settings, examples, folder)
            to_come = pd.concat([examples.iloc[bounds[i] : bounds[i + 1]] for i in missing])
            plan = _announce(vlm, settings, to_come, sharing)
            tqdm.write(f"{plan}, {len(missing)} of {len(bounds) - 1} shards; {words}")
            with tqdm(total=to_come.image_id.nunique(), desc=folder.parent.name, unit="image", bar_format=BAR) as bar:
                for i in missing:
                    extract_shard(vlm, settings, sharing, examples, folder, i, bar)
        finally:
            vlm.release()
    return store.Store(folder)


def _sharing(vlm: Vlm, settings: Extraction, examples: pd.DataFrame, folder: Path) -> tuple[bool, str]:
    """Which way this extraction goes; found out once, and kept in its `meta.json` for when it is resumed."""
    from probekit import forward

    if (folder / "meta.json").exists():
        known = paths.read_json(folder / "meta.json")["sharing"]
        return known["used"], known["words"]
    found = forward.Sharing(False, "every prompt runs from the start")
    if settings.sharing != "off":
        rows = examples[examples.image_id.isin(examples.image_id.unique()[:2])].groupby("image_id").head(2)
        files, owner = np.unique(rows.file, return_inverse=True)
        images = [coco.load_rgb(paths.resolve(file), settings.longest_side) for file in files]
        found = forward.try_sharing(vlm, images, rows.prompt.tolist(), owner.tolist())
    if settings.sharing == "on" and not found.used:
        raise ValueError(f"sharing=\"on\", but with {vlm.name} {found.words}; take sharing=\"auto\" or \"off\"")
    paths.write_json(folder / "meta.json", _meta(vlm, settings, examples) | {"sharing": asdict(found)})
    return found.used, found.words


def _meta(vlm: Vlm, settings: Extraction, examples: pd.DataFrame) -> dict:
    return {
        "model": vlm.name, "revision": vlm.revision, "untrained": settings.untrained, "dtype": vlm.dtype,
        "device": vlm.device, "layers": vlm.layers, "width": vlm.width, "n": len(examples),
        "examples": rows_key(examples),
        "shard_starts": shard_bounds(examples, settings.shard_images)[:-1].tolist(),
        "settings": asdict(settings), "prompt": vlm.wrap("{prompt}"), "tasks": sorted(examples.task.unique()),
        "image_processor": type(vlm.processor.image_processor).__name__,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "timm", "safetensors")},
    }


def _announce(vlm: Vlm, settings: Extraction, examples: pd.DataFrame, sharing: bool) -> str:
    """One line on what is to come; tokens are estimated from 16 examples spread over the table."""
    rows = examples.iloc[np.linspace(0, len(examples) - 1, min(16, len(examples))).astype(int)]
    images = [coco.load_rgb(paths.resolve(file), settings.longest_side) for file in rows.file]
    inputs = vlm.prepare(images, rows.prompt.tolist())
    shown = vlm.shows_image(inputs["input_ids"]).sum(1)
    tokens = float(inputs["attention_mask"].sum(1).float().mean()) * len(examples)
    if sharing:  # the image's tokens once an image, not once an example
        tokens -= float(shown.float().mean()) * (len(examples) - examples.image_id.nunique())
    size = len(examples) * len(vlm.layers) * len(settings.poolings) * vlm.width * 2
    return (f"{vlm.name}{' (untrained)' if settings.untrained else ''} on {vlm.device} in {vlm.dtype}: "
            f"{len(examples):,} examples of {examples.image_id.nunique():,} images, about {tokens:,.0f} tokens to "
            f"compute ({int(shown.min())} to {int(shown.max())} image tokens an image), {size / 1e6:,.1f} MB to write")
