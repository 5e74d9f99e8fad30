"""From examples to activations: the only step that needs the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from probekit import coco, paths, pool, store

if TYPE_CHECKING:
    import torch

    from probekit.models import Vlm


@dataclass(frozen=True)
class Extraction:
    """Settings of one extraction; they name its folder.

    Attributes
    ----------
    model, revision, dtype, untrained, seed : as for :func:`probekit.models.load_vlm`
    poolings : see :mod:`probekit.pool`
    longest_side : pixels that bound an image before the processor sees it; None leaves it to the checkpoint's rule
    shard_images : images a shard, the unit of work, of writing and of resuming
    batch : examples a forward pass
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    untrained: bool = False
    seed: int = 0
    poolings: tuple[str, ...] = ("mean",)
    longest_side: int | None = None
    shard_images: int = 200
    batch: int = 32


def folder_of(settings: Extraction, examples: pd.DataFrame) -> Path:
    """The folder that these settings, this checkpoint and these examples own."""
    from probekit.models import locate

    source = Path(locate(settings.model))
    weights = [(f.name, f.stat().st_size, _tail_hash(f)) for f in sorted(source.glob("*")) if f.is_file()]
    sizes = {file: paths.resolve(file).stat().st_size for file in examples.file.unique()}
    rows = [[file, sizes[file], prompt] for file, prompt in zip(examples.file, examples.prompt, strict=True)]
    name = source.name + ("-untrained" if settings.untrained else "")
    return paths.DATA / "activations" / name / paths.fingerprint(settings, weights, rows)


def _tail_hash(file: Path, size: int = 1 << 20) -> str:
    """Hash of a file's last MiB: enough to tell checkpoints apart without reading gigabytes."""
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - size))
        return hashlib.sha256(handle.read()).hexdigest()


def shard_bounds(examples: pd.DataFrame, shard_images: int) -> np.ndarray:
    """First rows of the shards, and n at the end; the examples of one image stay together."""
    image = examples.image_id.ne(examples.image_id.shift()).cumsum().to_numpy() - 1
    starts = np.flatnonzero(np.diff(image // shard_images, prepend=-1))
    return np.append(starts, len(examples))


# ------------------------------------------------------------------------------------------------- reading the layers


@contextmanager
def tapped(vlm: Vlm, mask_nt: torch.Tensor, poolings: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Within the context a forward pass leaves ``"<layer>/<pooling>"``: (n, d) float32 in the yielded dictionary."""
    taken: dict[str, torch.Tensor] = {}

    def take(layer: str, hidden_ntd: torch.Tensor) -> None:
        for pooling in poolings:
            taken[f"{layer}/{pooling}"] = pool.pool(hidden_ntd, mask_nt, pooling)

    def before(layer, module, args, kwargs):
        take(layer, args[0] if args else kwargs["hidden_states"])

    def after(layer, module, args, output):
        take(layer, output[0] if isinstance(output, tuple) else output)

    decoder, layers = vlm.decoder, vlm.layers
    handles = [decoder.layers[0].register_forward_pre_hook(partial(before, layers[0]), with_kwargs=True)]
    handles += [decoder.layers[k - 1].register_forward_hook(partial(after, layers[k]))
                for k in range(1, len(layers) - 1)]
    handles.append(decoder.norm.register_forward_hook(partial(after, layers[-1])))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def pooled_states(vlm: Vlm, inputs: dict[str, torch.Tensor], poolings: Sequence[str]) -> dict[str, np.ndarray]:
    """One forward pass over prepared inputs: ``"<layer>/<pooling>"`` to (n, d) float32 on the host."""
    mask_nt = inputs["attention_mask"].to(vlm.device)
    with tapped(vlm, mask_nt, poolings) as taken:
        vlm.forward(inputs)
    return {key: values.cpu().numpy() for key, values in taken.items()}


def extract_shard(vlm: Vlm, settings: Extraction, examples: pd.DataFrame, folder: Path, i: int, bar: tqdm) -> Path:
    """Compute and write shard i: the same settings, model and examples make the same file.

    Raises
    ------
    FloatingPointError
        A hidden state is not finite (the layer and the example are named).
    ValueError
        Features that do not differ between examples.
    """
    start, stop = shard_bounds(examples, settings.shard_images)[[i, i + 1]]
    rows = examples.iloc[start:stop]
    load = lru_cache(maxsize=None)(lambda file: coco.load_rgb(paths.resolve(file), settings.longest_side))
    order = np.argsort(rows.prompt.str.len().to_numpy(), kind="stable")
    batches = [order[at : at + settings.batch] for at in range(0, len(rows), settings.batch)]

    def prepare(places: np.ndarray) -> dict[str, torch.Tensor]:
        return vlm.prepare([load(f) for f in rows.file.iloc[places]], rows.prompt.iloc[places].tolist())

    states: dict[str, np.ndarray] = {}
    images_an_example = rows.image_id.nunique() / len(rows)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(prepare, batches[0])
        for k, places in enumerate(batches):
            inputs = coming.result()
            if k + 1 < len(batches):
                coming = ahead.submit(prepare, batches[k + 1])
            for key, values in pooled_states(vlm, inputs, settings.poolings).items():
                states.setdefault(key, np.empty((len(rows), values.shape[1]), np.float32))[places] = values
            bar.update(len(places) * images_an_example)
    _check(states, rows, vlm.name)
    return store.write_shard(folder, i, states, int(start))


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
    for pooling in settings.poolings:
        pool.check(pooling)
    folder = folder_of(settings, examples)
    starts = shard_bounds(examples, settings.shard_images)[:-1].tolist()
    missing = [i for i, start in enumerate(starts) if not store.is_done(folder, i, start)]
    if missing or not (folder / "meta.json").exists():
        from probekit.models import load_vlm

        vlm = load_vlm(settings.model, settings.revision, settings.dtype, device, settings.untrained, settings.seed)
        try:
            paths.write_json(folder / "meta.json", _meta(vlm, settings, examples, starts))
            tqdm.write(_announce(vlm, settings, examples, len(missing), len(starts)))
            bounds = shard_bounds(examples, settings.shard_images)
            images = sum(examples.image_id.iloc[bounds[i] : bounds[i + 1]].nunique() for i in missing)
            with tqdm(total=images, desc=folder.parent.name, unit="image", bar_format=BAR) as bar:
                for i in missing:
                    extract_shard(vlm, settings, examples, folder, i, bar)
        finally:
            vlm.release()
    return store.Store(folder)


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}, {rate_fmt}]"


def _meta(vlm: Vlm, settings: Extraction, examples: pd.DataFrame, starts: list[int]) -> dict:
    return {
        "model": vlm.name, "revision": vlm.revision, "untrained": settings.untrained, "dtype": vlm.dtype,
        "device": vlm.device, "layers": vlm.layers, "width": vlm.width, "n": len(examples), "shard_starts": starts,
        "settings": asdict(settings), "prompt": vlm.wrap("{prompt}"), "tasks": sorted(examples.task.unique()),
        "image_processor": type(vlm.processor.image_processor).__name__,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "timm", "safetensors")},
    }


def _announce(vlm: Vlm, settings: Extraction, examples: pd.DataFrame, missing: int, shards: int) -> str:
    """One line on what is to come; tokens are estimated from 16 examples spread over the table."""
    rows = examples.iloc[np.linspace(0, len(examples) - 1, min(16, len(examples))).astype(int)]
    images = [coco.load_rgb(paths.resolve(file), settings.longest_side) for file in rows.file]
    inputs = vlm.prepare(images, rows.prompt.tolist())
    tokens, seen = inputs["attention_mask"].sum(1).float(), vlm.image_tokens(inputs)
    size = len(examples) * len(vlm.layers) * len(settings.poolings) * vlm.width * 2
    done = f", {shards - missing} of {shards} shards are there already" if missing < shards else ""
    return (f"{vlm.name}{' (untrained)' if settings.untrained else ''} on {vlm.device} in {vlm.dtype}: "
            f"{len(examples):,} examples of {examples.image_id.nunique():,} images, about "
            f"{len(examples) * float(tokens.mean()):,.0f} tokens ({int(seen.min())} to {int(seen.max())} of them image "
            f"tokens an example), {size / 1e6:,.1f} MB to write{done}")
