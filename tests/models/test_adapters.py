"""Models that transformers does not have: the route, the check, and the faults that it finds."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import probekit as pk
from probekit.cli.main import main
from probekit.extraction.settings import ExtractionSettings
from probekit.models import adapters
from probekit.models.conformance import check_model
from probekit.models.load import cast_weights, load_skeleton, load_vlm, stage_table
from probekit.models.presets import short_name
from probekit.models.replay import KeptPass, NoReplay
from probekit.paths import Home
from tests.conftest import REPOSITORY
from tests.docs.documents import Document

MODELS = Document(REPOSITORY / "docs" / "models.md")
SHARING = '''

class SharingVlm(ToyVlm):
    """The toy with a cache: the tokens of a prefix are run again before each suffix's."""

    def forward_prefix(self, tokens, images):
        self.forward(tokens, images)
        return tokens["input_ids"], images["pixels"]

    def forward_suffix(self, tokens, cache, owner_n):
        prefix_ids, pixels = cache
        ids = torch.cat([prefix_ids[owner_n], tokens["input_ids"]], 1)
        start = prefix_ids.shape[1]
        shorten = [
            block.register_forward_pre_hook(keep_whole(start)) for block in self.model.blocks[:1]
        ]
        raise NotImplementedError
'''


@pytest.fixture
def toy(tmp_path) -> Path:
    """The file of the documents' toy."""
    file = tmp_path / "toy_vlm.py"
    file.write_text(MODELS.worked_examples()["toy"], encoding="utf-8")
    return file
