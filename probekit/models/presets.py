"""Checkpoints with a short name, and what was measured when their architectures were checked."""

from __future__ import annotations

import difflib
import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd

from probekit import paths

ARCHITECTURES_CSV = Path(__file__).with_name("architectures.csv")
ADAPTER_CONFIG = "adapter_config.json"
HUB_PAGE = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<id>[^/]+/[^/@]+)(?:/tree/(?P<revision>.+?))?/?"
)


@dataclass(frozen=True)
class Preset:
    """A checkpoint with a short name.

    Attributes
    ----------
    source : str
        A hub id, or a folder below the home or the checkout.
    type : str
        Its row in the table of architectures (:func:`read_checked_architectures`).
    revision : str or None
        The commit or reference that it is pinned to; None takes the newest.
    """

    source: str
    _: KW_ONLY
    type: str
    revision: str | None = None


PRESETS = {
    "tiny-qwen2-vl": Preset("data/models/tiny-qwen2-vl", type="qwen2_vl"),
    "tiny-fast-vlm": Preset("data/models/tiny-fast-vlm", type="fast_vlm"),
    "qwen2-vl-2b": Preset(
        "Qwen/Qwen2-VL-2B-Instruct",
        type="qwen2_vl",
        revision="895c3a49bc3fa70a340399125c650a463535e71c",
    ),
    "qwen2-vl-7b": Preset(
        "Qwen/Qwen2-VL-7B-Instruct",
        type="qwen2_vl",
        revision="eed13092ef92e448dd6875b2a00151bd3f7db0ac",
    ),
    "qwen3-vl-2b": Preset(
        "Qwen/Qwen3-VL-2B-Instruct",
        type="qwen3_vl",
        revision="89644892e4d85e24eaac8bacfd4f463576704203",
    ),
    "qwen3-vl-30b-a3b": Preset(  # a mixture of experts: 3 of 30 billion parameters are active
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        type="qwen3_vl_moe",
        revision="9c4b90e1e4ba969fd3b5378b57d966d725f1b86c",
    ),
    "fastvlm-0.5b": Preset(  # Apple's weights, converted to transformers' own class
        "KamilaMila/FastVLM-0.5B",
        type="fast_vlm",
    ),
    "gemma-3-4b": Preset(
        "google/gemma-3-4b-it",
        type="gemma3",
        revision="093f9f388b31de276ce2de164bdc2081324b9767",
    ),
    "internvl3-1b": Preset(
        "OpenGVLab/InternVL3-1B-hf",
        type="internvl",
        revision="014c0583a0d4bedf29fbe2dbff4f865eb998e171",
    ),
    "llava-onevision-0.5b": Preset(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        type="llava_onevision",
        revision="74dd0bf867a4cda7950c17663794267c60cf4b40",
    ),
    "minicpm-v-4.6": Preset(
        "openbmb/MiniCPM-V-4.6",
        type="minicpmv4_6",
        revision="8169864629825dc1d755a5aa1cd8b5935dcbc83f",
    ),
    "smolvlm-500m": Preset(
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        type="smolvlm",
        revision="7b375e1b73b11138ff12fe22c8f2822d8fe03467",
    ),
    "phi-4-multimodal": Preset(  # the pull request with weights for transformers' own class
        "microsoft/Phi-4-multimodal-instruct",
        type="phi4_multimodal",
        revision="refs/pr/70",
    ),
    "kosmos-2": Preset(
        "microsoft/kosmos-2-patch14-224",
        type="kosmos-2",
        revision="e91cfbcb4ce051b6a55bfb5f96165a3bbf5eb82c",
    ),
    "blip2-opt-2.7b": Preset(
        "Salesforce/blip2-opt-2.7b",
        type="blip-2",
        revision="59a1ef6c1e5117b3f65523d1c6066825bcf315e3",
    ),
    "blip2-flan-t5-xl": Preset(
        "Salesforce/blip2-flan-t5-xl",
        type="blip-2 (T5)",
        revision="0eb0d3b46c14c1f8c7680bca2693baafdb90bb28",
    ),
}
NOT_IN_TRANSFORMERS = {
    "LaVIT": "docs/adapters/lavit.py:LaVit",
    "MoE-LLaVA": "docs/adapters/moe_llava.py:MoeLlava",
}


def locate(model: str, home: str | Path | paths.Home | None = None) -> str:
    """Find where a checkpoint is loaded from.

    Parameters
    ----------
    model : str
        The name of a preset, a folder (a relative one starts at the home), a hub id,
        ``id@revision``, or the address of its page on the hub.
    home : str, Path or Home, optional
        See :meth:`probekit.paths.Home.find`. The folder of a preset that is not below the home is
        looked for in the checkout.

    Returns
    -------
    str
        An absolute folder, or a hub id.

    Raises
    ------
    FileNotFoundError
        There is no such preset, or no checkpoint in the folder.
    ValueError
        The folder has an adapter, which is to be merged first.
    """
    name, _ = _split_revision(model, home)
    source = PRESETS[name].source if name in PRESETS else name
    folder = paths.Home.find(home).resolve(source)
    if (folder / ADAPTER_CONFIG).is_file():
        refuse_adapter(str(folder), folder / ADAPTER_CONFIG)
    if _is_checkpoint(folder):
        return str(folder)
    in_checkout = paths.CHECKOUT / source
    if name in PRESETS and _looks_like_folder(source) and _is_checkpoint(in_checkout):
        return str(in_checkout)
    if folder.is_dir() or _looks_like_folder(source):
        configs = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        inside = sorted(str(config.parent) for config in configs)
        suggestion = f"did you mean {' or '.join(inside[:3])}? Else " if inside else ""
        raise FileNotFoundError(
            f"{folder} is not a checkpoint folder (it has no config.json): {suggestion}give a "
            f"folder with one, a hub id, or one of {', '.join(PRESETS)}"
        )
    if source in read_checked_architectures().index:
        examples = [preset.source for preset in PRESETS.values() if preset.type == source]
        suggestion = f", such as {examples[0]}" if examples else ""
        raise FileNotFoundError(
            f"{source} is a type of models, not a checkpoint: give a checkpoint of that type by "
            f"its folder or hub id (owner/name){suggestion}"
        )
    if "/" not in source:
        similar = difflib.get_close_matches(source, PRESETS, n=1, cutoff=0.4)
        suggestion = f"did you mean {similar[0]}? Else " if similar else ""
        raise FileNotFoundError(
            f"there is no checkpoint with the name {source}: {suggestion}give a folder, a hub id "
            f"(owner/name), or one of {', '.join(PRESETS)}"
        )
    return source


def short_name(model: str, home: str | Path | paths.Home | None = None) -> str:
    """Return what a checkpoint is called in tables.

    Parameters
    ----------
    model : str
        See :func:`locate`.
    home : str, Path or Home, optional
        See :func:`locate`.

    Returns
    -------
    str
        The last part of its id or folder, with the revision where `model` names one. The folder of
        a training's checkpoint has the name of the training's before it: ``run-checkpoint-500``.
        Of an adapter the name of its class, or of its entry point.
    """
    from probekit.models.adapters import find_adapter  # loads torch

    adapter = find_adapter(model, home)
    if adapter is not None:
        return adapter.name
    _, revision = _split_revision(model, home)
    path = Path(locate(model, home))
    name = path.name
    if re.fullmatch(r"checkpoint-\d+", name):
        name = f"{path.parent.name}-{name}"
    if revision is None:
        return name
    return f"{name}@{revision.replace('/', '-')}"


def pinned_revision(
    model: str, revision: str | None = None, *, home: str | Path | paths.Home | None = None
) -> str | None:
    """Return the revision that a checkpoint is loaded in.

    Parameters
    ----------
    model : str
        See :func:`locate`.
    revision : str, optional
        Takes precedence over a revision in `model`, and that over the one that a preset pins.
    home : str, Path or Home, optional
        See :func:`locate`.

    Returns
    -------
    str or None
        None for the newest.
    """
    name, named_revision = _split_revision(model, home)
    preset_revision = PRESETS[name].revision if name in PRESETS else None
    return revision or named_revision or preset_revision


def refuse_adapter(source: str, adapter_config: Path) -> NoReturn:
    """Raise ValueError: an adapter is not applied, and is never passed over.

    Parameters
    ----------
    source : str
        The folder or hub id that has it.
    adapter_config : Path
        Its ``adapter_config.json``.
    """
    described = paths.read_json(adapter_config)
    base = described.get("base_model_name_or_path") or "its base model"
    raise ValueError(
        f"{source} has an adapter ({adapter_config.name}, {described.get('peft_type', 'PEFT')} for "
        f"{base}), and an adapter is neither applied nor passed over: merge it into its base "
        "model,\n"
        "    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("
        f"{base!r}), {source!r})\n"
        f"    model.merge_and_unload().save_pretrained({f'{Path(source).name}-merged'!r})\n"
        "(from peft import PeftModel), save the processor of the base model beside it, and name "
        "that folder; or, where the weights are merged already, take adapter_config.json out"
    )


def read_checked_architectures() -> pd.DataFrame:
    """Read what was measured on a tiny random model of each architecture.

    Returns
    -------
    DataFrame
        Indexed by `architecture`; ``docs/models.md`` says what its columns mean.
    """
    table = pd.read_csv(ARCHITECTURES_CSV, keep_default_na=False)
    return table.set_index("architecture")


def list_models() -> str:
    """Return the presets and the checked architectures as text."""
    architectures = read_checked_architectures()
    rows = [
        {
            "name": name,
            "checkpoint": preset.source,
            "type": preset.type,
            "revision": _short_revision(preset),
            "sharing": architectures.sharing[preset.type],
        }
        for name, preset in PRESETS.items()
    ]
    presets = pd.DataFrame(rows).to_string(index=False)
    adapters = [
        f"{name} is not in transformers: {adapter} is an adapter for it, a worked example."
        for name, adapter in NOT_IN_TRANSFORMERS.items()
    ]
    return "\n\n".join(
        [
            presets,
            "Any checkpoint of the following types can be given by its hub id or folder.\n"
            "Each type was checked on a tiny random model; docs/models.md explains the columns:",
            architectures.to_string(),
            "\n".join([*adapters, "docs/models.md says how to write your own."]),
        ]
    )


def _split_revision(model: str, home: str | Path | paths.Home | None) -> tuple[str, str | None]:
    """Id and revision of ``id@revision``, or of a page of the hub; a folder may have an @."""
    page = HUB_PAGE.fullmatch(model)
    if page is not None:
        return page["id"], page["revision"]
    if paths.Home.find(home).resolve(model).is_dir():
        return model, None
    name, _, revision = model.partition("@")
    return name, revision or None


def _looks_like_folder(source: str) -> bool:
    return source.startswith((".", "/", "~", "data/")) or source.count("/") > 1


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _short_revision(preset: Preset) -> str:
    if preset.revision is not None:
        return preset.revision[:12]
    return "-" if _looks_like_folder(preset.source) else "newest"
