"""What the tests of models share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probekit.images import load_rgb
from probekit.models.processor import PreparedImage
from tests.support.architectures import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an architecture's tiny random checkpoint, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make_once(name: str) -> Path:
        return save_checkpoint(name, root / name)

    return make_once


@pytest.fixture(scope="module")
def prepared(examples, vlm) -> list[PreparedImage]:
    """Two images with three and two prompts of very different lengths."""
    images = []
    groups = list(examples.groupby("image_id"))[:2]
    for (_, rows), prompt_count in zip(groups, (3, 2), strict=True):
        image = load_rgb(rows.file.iloc[0])
        prompts = rows.prompt.tolist()[:prompt_count]
        images.append(vlm.prompt_processor.prepare(image, prompts))
    return images


@pytest.fixture(scope="session")
def noise_images() -> list[Image.Image]:
    """Two images of noise."""
    rng = np.random.default_rng(0)
    shape = (100, 120, 3)
    return [Image.fromarray(rng.integers(0, 255, shape, np.uint8)) for _ in range(2)]
