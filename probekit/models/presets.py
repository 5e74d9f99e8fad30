"""Checkpoints that have a short name here, and what was found when their architectures were checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from probekit import paths

CHECKED = Path(__file__).with_name("architectures.csv")  # written by tests/test_architectures.py


@dataclass(frozen=True)
class Preset:
    """A checkpoint with a short name: a hub id or a folder, its row in the table of architectures, its revision."""

    source: str
    type: str
    revision: str | None = None


PRESETS = {
    "tiny-qwen2-vl": Preset("data/models/tiny-qwen2-vl", "qwen2_vl"),
    "tiny-fast-vlm": Preset("data/models/tiny-fast-vlm", "fast_vlm"),
    "qwen2-vl-2b": Preset("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", "895c3a49bc3fa70a340399125c650a463535e71c"),
    "qwen2-vl-7b": Preset("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", "eed13092ef92e448dd6875b2a00151bd3f7db0ac"),
    "qwen3-vl-2b": Preset("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl", "89644892e4d85e24eaac8bacfd4f463576704203"),
    "qwen3-vl-30b-a3b": Preset("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3_vl_moe",  # mixture of experts, 3B active
                               "9c4b90e1e4ba969fd3b5378b57d966d725f1b86c"),
    "fastvlm-0.5b": Preset("KamilaMila/FastVLM-0.5B", "fast_vlm"),  # transformers' own conversion of Apple's
    "gemma-3-4b": Preset("google/gemma-3-4b-it", "gemma3", "093f9f388b31de276ce2de164bdc2081324b9767"),
    "internvl3-1b": Preset("OpenGVLab/InternVL3-1B-hf", "internvl", "014c0583a0d4bedf29fbe2dbff4f865eb998e171"),
    "llava-onevision-0.5b": Preset("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava_onevision",
                                   "74dd0bf867a4cda7950c17663794267c60cf4b40"),
    "minicpm-v-4.6": Preset("openbmb/MiniCPM-V-4.6", "minicpmv4_6", "8169864629825dc1d755a5aa1cd8b5935dcbc83f"),
    "smolvlm-500m": Preset("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "smolvlm",
                           "7b375e1b73b11138ff12fe22c8f2822d8fe03467"),
    "phi-4-multimodal": Preset("microsoft/Phi-4-multimodal-instruct", "phi4_multimodal", "refs/pr/70"),  # native
    "kosmos-2": Preset("microsoft/kosmos-2-patch14-224", "kosmos-2", "e91cfbcb4ce051b6a55bfb5f96165a3bbf5eb82c"),
    "blip2-opt-2.7b": Preset("Salesforce/blip2-opt-2.7b", "blip-2", "59a1ef6c1e5117b3f65523d1c6066825bcf315e3"),
    "blip2-flan-t5-xl": Preset("Salesforce/blip2-flan-t5-xl", "blip-2 (T5)",
                               "0eb0d3b46c14c1f8c7680bca2693baafdb90bb28"),
}
NOT_IN_TRANSFORMERS = {
    "LaVIT": "its visual tokenizer and decoder are code of their own: transformers would need a config, a model and a "
             "processor class for them, and the weights converted",
    "MoE-LLaVA": "its experts are DeepSpeed layers in model types of its own: transformers would need a native class "
                 "with those experts, and the weights converted",
}


def _parted(name: str) -> tuple[str, str | None]:
    """Id and revision of ``id@revision``; a folder may have such a name."""
    source, _, revision = name.partition("@")
    return (name, None) if paths.Home.find().resolve(name).is_dir() else (source, revision or None)


def short_name(id_or_folder: str) -> str:
    """What a checkpoint is called in tables: the last part of its id or folder, with the revision that is named."""
    revision = _parted(id_or_folder)[1]
    return Path(locate(id_or_folder)).name + (f"@{revision.replace('/', '-')}" if revision else "")


def locate(id_or_folder: str) -> str:
    """Absolute folder, or hub id, of a preset name, a folder (from the project's root), a hub id or ``id@revision``."""
    name, _ = _parted(id_or_folder)
    wanted = PRESETS[name].source if name in PRESETS else name
    folder = paths.Home.find().resolve(wanted)
    if (folder / "config.json").exists():
        return str(folder)
    if folder.is_dir() or wanted.startswith((".", "/", "~", "data/")) or wanted.count("/") > 1:
        raise FileNotFoundError(f"{folder} is not a checkpoint folder (it has no config.json): give a folder with one, "
                                f"a hub id, or one of {', '.join(PRESETS)}")
    if "/" not in wanted:
        near = difflib.get_close_matches(wanted, PRESETS, 1, 0.4)
        meant = f"did you mean {near[0]}? Else " * bool(near)
        raise FileNotFoundError(f"{wanted} is no name of a checkpoint here: {meant}give a folder, a hub id "
                                f"(owner/name), or one of {', '.join(PRESETS)}")
    return wanted


def pinned_revision(id_or_folder: str, revision: str | None) -> str | None:
    """The revision that was asked for, in words or as ``id@revision``, else the one that a preset pins."""
    name, own = _parted(id_or_folder)
    return revision or own or (PRESETS[name].revision if name in PRESETS else None)


def resolve_commit(id_or_folder: str, revision: str | None, trust_remote_code: bool = False) -> str | None:
    """The commit that a hub id and revision stand for now; None for a folder, whose files speak for themselves."""
    from transformers import AutoConfig

    source = locate(id_or_folder)
    if Path(source).is_absolute():
        return None
    return AutoConfig.from_pretrained(source, revision=pinned_revision(id_or_folder, revision),
                                      trust_remote_code=trust_remote_code)._commit_hash


def list_models() -> str:
    """The presets and the checked architectures as text."""
    checked = pd.read_csv(CHECKED, keep_default_na=False).set_index("architecture")
    presets = pd.DataFrame([{"name": name, "checkpoint": p.source, "type": p.type,
                             "revision": (p.revision or ("newest" if p.source.count("/") == 1 else "-"))[:12],
                             "sharing": checked.sharing[p.type]} for name, p in PRESETS.items()])
    missing = "\n".join(f"{name} is not in transformers: {why}." for name, why in NOT_IN_TRANSFORMERS.items())
    return (f"{presets.to_string(index=False)}\n\nAny checkpoint of these types can be given by its hub id or folder; "
            f"each was checked on a tiny random model\n(layers, hidden states, padding, image tokens, sharing: see the "
            f"README):\n\n{checked.to_string()}\n\n{missing}")
