"""Architectures that nobody has checked: what is read of them is held against transformers.

For the types in :func:`probekit.models.presets.read_checked_architectures` tests have answered it.
Any other type is asked on its first prompt, and goes on only where every layer agrees.
"""

from __future__ import annotations

import torch

from probekit.models.devices import is_out_of_memory
from probekit.models.forward import read_layers
from probekit.models.load import Vlm
from probekit.models.presets import read_checked_architectures
from probekit.models.processor import PreparedImage


@torch.inference_mode()
def check_layers(vlm: Vlm, prepared: PreparedImage) -> None:
    """Check what is read of a prompt, where the type of the model is not a checked one.

    Parameters
    ----------
    vlm : Vlm
    prepared : PreparedImage
        One image with one prompt.

    Raises
    ------
    ValueError
        The model does not run, returns no hidden states to compare with, or others.
    MemoryError, RuntimeError
        The prompt does not fit the memory (:func:`probekit.models.devices.is_out_of_memory`).
    """
    if not vlm.is_native:
        check_pass(vlm, prepared)
        return
    if vlm.type in read_checked_architectures().index:
        return
    read: dict[str, torch.Tensor] = {}

    def keep(layer: str, hidden_ntd: torch.Tensor) -> None:
        read[layer] = hidden_ntd.clone()  # what comes after may change it in place

    try:
        output = read_layers(vlm, [prepared], keep, output_hidden_states=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _refusal(vlm, f"it does not run ({type(error).__name__}: {error})") from error
    name = "encoder_hidden_states" if vlm.reads_prompts_by_encoder else "hidden_states"
    expected = getattr(output, name, None)
    if expected is None:
        raise _refusal(vlm, "transformers returns no hidden states of it to compare with")
    if len(expected) != len(vlm.layers):
        raise _refusal(
            vlm, f"transformers returns {len(expected)} layers, and {len(vlm.layers)} are found"
        )
    for layer, expected_ntd in zip(vlm.layers, expected, strict=True):
        if layer not in read or not torch.equal(read[layer], expected_ntd):  # of the same pass
            raise _refusal(vlm, f"what is read at {layer} differs from transformers' hidden states")


def _refusal(vlm: Vlm, reason: str) -> ValueError:
    return ValueError(
        f"{vlm.name} is of the type {vlm.type}, which probekit has not been checked "
        f"with and cannot read: {reason}"
    )


@torch.inference_mode()
def check_pass(vlm: Vlm, prepared: PreparedImage) -> None:
    """Check that a pass of an adapter hands over each layer, with one state for each token.

    Parameters
    ----------
    vlm : Vlm
    prepared : PreparedImage
        One image with one prompt.

    Raises
    ------
    ValueError
        It does not; the message says what is wrong.
    """
    handed_over: list[str] = []
    shapes: dict[str, torch.Size] = {}

    def keep(layer: str, hidden_ntd: torch.Tensor) -> None:
        handed_over.append(layer)
        shapes[layer] = hidden_ntd.shape

    read_layers(vlm, [prepared], keep)
    if handed_over != list(vlm.layers):
        wrong = next(
            (layer for layer in vlm.layers if handed_over.count(layer) != 1), handed_over[0]
        )
        where = "final_norm" if wrong == vlm.layers[-1] else "blocks"
        raise ValueError(
            f"{vlm.name}: in one pass {wrong} came {handed_over.count(wrong)} times, and the order "
            f"is {', '.join(handed_over[:4])} …: check {where} of the adapter"
        )
    tokens = len(prepared.tokens[0]["input_ids"])
    for layer, shape in shapes.items():
        if tuple(shape) != (1, tokens, vlm.width):
            raise ValueError(
                f"{vlm.name}, {layer}: states are {tuple(shape)}, and there are {tokens} tokens: "
                f"(1, {tokens}, {vlm.width}) is needed, one token id for each vector of the image"
            )
