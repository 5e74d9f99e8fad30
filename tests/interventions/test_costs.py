"""What interventions are said to take, against what they run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from probekit.extraction.planning import ModelSize
from probekit.images import load_rgb
from probekit.interventions.costs import count_operations
from probekit.interventions.settings import CUT, Intervention
from probekit.models.attention import AttentionCut
from probekit.models.replay import KeptPass


def unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("site", ["image", "text", "last", "all", "image>text", "image>last"])
def test_operations_are_those_of_what_runs(vlm, examples, site, layer):
    file = examples.file.iloc[0]
    prompts = ["a b c d", "d c b a"]  # nothing is padded
    prepared = vlm.prompt_processor.prepare(load_rgb(file), prompts)
    name = CUT if ">" in site else "leace"
    planned = [Intervention(layer, name, site, 2)]
    kept = KeptPass(vlm, [prepared], way="shared")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if name == CUT:
            seen, looking = site.split(">")
            sets = kept.token_sets
            cut = AttentionCut(range(layer, layer + 2), sets[looking], sets[seen])
            kept.rerun(layer, {}, cut=cut)
        else:
            sites = ("image", "text") if site == "all" else (site,)
            kept.rerun(layer, dict.fromkeys(sites, unchanged))
    expected = count_operations(ModelSize.of(vlm), prepared, planned, blocks=len(vlm.blocks))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)
