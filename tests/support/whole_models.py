"""What a whole model says, with its head over the vocabulary."""

from __future__ import annotations

import torch

from probekit.models.batches import batch_images, batch_tokens


@torch.inference_mode()
def whole_logits(vlm, prepared) -> torch.Tensor:
    """(k, vocabulary) what transformers' whole model says after each prompt, one at a time."""
    rows = []
    for k in range(len(prepared.tokens)):
        inputs = batch_tokens(vlm, [prepared.tokens[k]]) | batch_images(vlm, [prepared])
        inputs.pop("labels", None)
        with vlm.head.in_place():
            rows.append(vlm.head.full_model(**vlm.to_device(inputs)).logits[0, -1].float())
    return torch.stack(rows)
