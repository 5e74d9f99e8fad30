"""Tiny random checkpoints of many architectures.

They are transformers' own default configs, shrunken, with a tokenizer that has one token per byte.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

# ------------------------------------------------------------------------------------ small configs

# The names under which configs state a size, by the size that they get.
NAMES_BY_SIZE = {
    3: "num_hidden_layers n_layer layers decoder_layers num_decoder_layers",
    2: (
        "depth num_layers conf_num_hidden_layers n_layers encoder_layers num_key_value_heads "
        "num_experts_per_tok moe_topk moe_k linear_num_key_heads vision_layers "
        "num_hidden_layers_image"
    ),
    4: (
        "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads n_head num_experts num_local_experts moe_num_experts n_routed_experts "
        "linear_num_value_heads"
    ),
    8: "num_query_tokens latent_query_num resampler_n_latents",
    16: "head_dim d_kv linear_key_head_dim linear_value_head_dim num_image_tokens",
    32: (
        "moe_intermediate_size share_expert_dim ext_pw_out_channel depthwise_separable_out_channel "
        "nemo_conv_channels"
    ),
    64: (
        "hidden_size embed_dim d_model dim hidden_dim n_embd projection_dim out_hidden_size "
        "text_hidden_size vision_hidden_size word_embed_proj_dim projection_hidden_size "
        "projector_hidden_size"
    ),
    96: (
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff ffn_hidden_size "
        "shared_expert_intermediate_size intermediate_size_mlp alignment_intermediate_size"
    ),
    2048: "max_position_embeddings",
}
SIZES = {name: size for size, names in NAMES_BY_SIZE.items() for name in names.split()}

# Values that follow from the sizes, or do not matter.
DERIVED_VALUES = {
    "layer_types",
    "mlp_layer_types",
    "deepstack_visual_indexes",
    "dtype",
    "transformers_version",
    "id2label",
    "label2id",
    "per_layer_config",
}

# ---------------------------------------------------------------------------------------- tokenizer

# The names under which processors ask the tokenizer for special tokens, by the token that they get.
NAMES_BY_TOKEN = {
    "<image>": "image_token context_image_token",
    "<video>": "video_token",
    "<audio>": "audio_token",
    "<img>": (
        "boi_token start_image_token image_start_token image_id_start_token slice_start_token "
        "image_boundary_token image_wrapper_token boa_token"
    ),
    "</img>": (
        "eoi_token end_image_token image_end_token image_id_end_token slice_end_token eoa_token"
    ),
    "<row>": "img_line_break_token image_break_token eol_token eof_token newline_token",
    "<tile>": "image_newline_token tile_token",
}
TOKENS_BY_NAME = {name: token for token, names in NAMES_BY_TOKEN.items() for name in names.split()}
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mark>",
    *NAMES_BY_TOKEN,
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# ------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one architecture needs besides the general rule.

    Attributes
    ----------
    config, image_processor, processor : dict
        Values of its config, image processor and processor.
    special_tokens : dict
        By the names under which its processor looks them up; a number where the processor writes
        them by itself. None takes one of :data:`TOKENS_BY_NAME` away.
    image_placeholder : str or None
        What stands for an image in its chat template; None saves a checkpoint without a template.
    processor_class, image_processor_class : str or None
        Where transformers maps none to the model type.
    model_type : str or None
        Where the name says more than the model type.
    """

    config: dict = field(default_factory=dict)
    image_processor: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    special_tokens: dict[str, str | None] = field(default_factory=dict)
    image_placeholder: str | None = "<image>"
    processor_class: str | None = None
    image_processor_class: str | None = None
    model_type: str | None = None


def clip(image_size: int = 56, patch_size: int = 14, **values: Any) -> dict:
    """The config of a vision transformer."""
    return {"image_size": image_size, "patch_size": patch_size, **values}


def square(size: int = 56, **values: Any) -> dict:
    """An image processor that makes squares of images."""
    return {"size": {"height": size, "width": size}, **values}


QWEN = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "patch_size": 14}
QWEN_16 = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
LLAVA = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
GRIDS = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
INTERNVL = {
    "vision_config": {"image_size": [56, 56], "patch_size": [14, 14]},
    "image_seq_length": 4,
}
MINICPM = {"scale_resolution": 112, "slice_mode": False}
NO_IMAGE_TOKEN = {"image_token": None}  # the processor adds it
FASTVIT = {
    "hidden_size": 64,
    "architecture": "fastvit_mci3",
    "model_args": {
        "layers": [1, 1, 1, 1],
        "embed_dims": [16, 16, 32, 32],
        "mlp_ratios": [1, 1, 1, 1],
        "inference_mode": True,
    },
}
FULL_ATTENTION = ["full_attention"] * 3
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
PIXTRAL = {"size": {"longest_edge": 56}, "patch_size": 14}

RECIPES: dict[str, Recipe] = {
    "qwen2_vl": Recipe(config={"text_config": {"rope_parameters": ROPE}}, image_processor=QWEN),
    "qwen2_5_vl": Recipe(config={"text_config": {"rope_parameters": ROPE}}, image_processor=QWEN),
    "qwen3_vl": Recipe(image_processor=QWEN_16),
    "qwen3_vl_moe": Recipe(image_processor=QWEN_16, image_processor_class="Qwen2VLImageProcessor"),
    "qwen3_5": Recipe(config={"text_config": LINEAR_ATTENTION}, image_processor=QWEN_16),
    "qwen3_5_moe": Recipe(config={"text_config": LINEAR_ATTENTION}, image_processor=QWEN_16),
    "fast_vlm": Recipe(
        config={"image_seq_length": 4, "vision_config": FASTVIT},
        image_processor=square(64),
        processor={"patch_size": 32, "vision_feature_select_strategy": "full"},
        processor_class="LlavaProcessor",
        image_processor_class="CLIPImageProcessor",
    ),
    "llava": Recipe(config={"vision_config": clip()}, image_processor=CROP, processor=LLAVA),
    "vipllava": Recipe(
        config={"vision_config": clip(), "vision_feature_layers": [-1, -2]},
        image_processor=CROP,
        processor=LLAVA,
    ),
    "llava_next": Recipe(
        config={"vision_config": clip(), **GRIDS},
        image_processor={**CROP, **GRIDS},
        processor=LLAVA,
    ),
    "llava_next_video": Recipe(
        config={"vision_config": clip(), **GRIDS},
        image_processor={**CROP, **GRIDS},
        processor=LLAVA,
    ),
    "llava_onevision": Recipe(
        config={"vision_config": clip(), **GRIDS},
        image_processor={**square(), **GRIDS},
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "video_llava": Recipe(
        config={"vision_config": clip()},
        image_processor=CROP,
        processor={"patch_size": 14, "num_additional_image_tokens": 1},
    ),
    "gemma3": Recipe(
        config={"vision_config": clip(), "mm_tokens_per_image": 4},
        image_processor=square(),
        processor={"image_seq_length": 4},
        image_placeholder="<img>",
    ),
    "gemma3n": Recipe(
        config={
            "text_config": {"layer_types": FULL_ATTENTION, "num_kv_shared_layers": 1},
            "vision_soft_tokens_per_image": 4,
            "vision_config": FASTVIT,
        },
        image_processor=square(64),
        processor={"image_seq_length": 4},
    ),
    "gemma4": Recipe(
        config={
            "vision_config": {
                "model_type": "gemma4_vision",
                "patch_size": 4,
                "position_embedding_size": 256,
            }
        },
        image_processor={"patch_size": 4, "max_soft_tokens": 70},
    ),
    "t5gemma2": Recipe(
        config={"encoder": {"vision_config": clip(), "mm_tokens_per_image": 4}},
        image_processor=square(),
        processor={"image_seq_length": 4},
        image_placeholder="<img>",
    ),
    "paligemma": Recipe(
        config={"vision_config": clip()},
        image_processor=square(image_seq_length=16),
        image_placeholder=None,
    ),
    "internvl": Recipe(
        config=INTERNVL, image_processor=square(), processor={"image_seq_length": 4}
    ),
    "qianfan_ocr": Recipe(
        config=INTERNVL, image_processor=square(), processor={"image_seq_length": 4}
    ),
    "smolvlm": Recipe(
        config={"vision_config": clip(), "scale_factor": 2},
        image_processor=TILES,
        processor={"image_seq_len": 4},
    ),
    "idefics3": Recipe(
        config={"vision_config": clip(), "scale_factor": 2},
        image_processor=TILES,
        processor={"image_seq_len": 4},
    ),
    "idefics2": Recipe(
        config={"vision_config": clip(70)},
        image_processor={"size": {"shortest_edge": 42, "longest_edge": 70}},
        processor={"image_seq_len": 8},
    ),
    "granite_docling": Recipe(
        config={"vision_config": clip(scale_factor=2)},
        image_processor=square(max_patches=4),
        processor={"image_seq_len": 4},
    ),
    "aya_vision": Recipe(
        config={"vision_config": clip(), "downsample_factor": 2},
        image_processor=square(),
        processor={"patch_size": 14, "img_size": 56, "downsample_factor": 2},
        special_tokens={"image_token": "<|IMG_PATCH|>"},
    ),
    "cohere2_vision": Recipe(
        config={"vision_config": clip(), "downsample_factor": 2},
        image_processor=square(patch_size=2),
    ),
    "blip-2": Recipe(
        config={"vision_config": clip()},
        image_processor=square(),
        processor={"num_query_tokens": 8},
        special_tokens=NO_IMAGE_TOKEN,
        image_placeholder=None,
    ),
    "blip-2 (T5)": Recipe(
        config={
            "vision_config": clip(),
            "use_decoder_only_language_model": False,
            "text_config": {"model_type": "t5"},
        },
        image_processor=square(),
        processor={"num_query_tokens": 8},
        special_tokens=NO_IMAGE_TOKEN,
        image_placeholder=None,
        model_type="blip-2",
    ),
    "instructblip": Recipe(
        config={"vision_config": clip()},
        image_processor=square(),
        processor={"num_query_tokens": 8},
        special_tokens=NO_IMAGE_TOKEN,
        image_placeholder=None,
    ),
    "kosmos-2": Recipe(
        config={"vision_config": clip(), "latent_query_num": 64},
        image_processor=CROP,
        image_placeholder=None,
        processor_class="Kosmos2Processor",
    ),
    "minicpmv4_6": Recipe(
        config={
            "text_config": LINEAR_ATTENTION,
            "vision_config": clip(112),
            "insert_layer_id": 1,
        },
        image_processor=MINICPM,
    ),
    "minicpmv4_7": Recipe(
        config={
            "text_config": LINEAR_ATTENTION,
            "vision_config": clip(112),
            "insert_layer_id": 1,
        },
        image_processor=MINICPM,
    ),
    "phi4_multimodal": Recipe(
        config={"vision_config": clip(64, 2, crop_size=64), "audio_config": {"num_blocks": 1}},
        image_processor=square(64, patch_size=2, dynamic_hd=1),
        processor_class="Phi4MultimodalProcessor",
        image_processor_class="Phi4MultimodalImageProcessor",
    ),
    "lfm2_vl": Recipe(),
    "glm4v": Recipe(config={"text_config": {"rope_parameters": ROPE}}, image_processor=QWEN),
    "glm46v": Recipe(config={"text_config": {"rope_parameters": ROPE}}, image_processor=QWEN),
    "glm4v_moe": Recipe(
        config={"text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}},
        image_processor=QWEN,
        image_processor_class="Glm4vImageProcessor",
    ),
    "glm_ocr": Recipe(
        config={"text_config": {"rope_parameters": ROPE}},
        image_processor=QWEN,
        processor_class="Glm46VProcessor",
        image_processor_class="Glm46VImageProcessor",
    ),
    "ernie4_5_vl_moe": Recipe(
        config={
            "text_config": {
                "moe_intermediate_size": [32, 32],
                "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
            }
        },
        image_processor=QWEN,
        special_tokens={"video_end_token": "</img>", "video_start_token": "<img>"},
    ),
    "paddleocr_vl": Recipe(config={"text_config": {"rope_parameters": ROPE}}, image_processor=QWEN),
    "exaone4_5": Recipe(image_processor=QWEN),
    "hyperclovax_vision_v2": Recipe(image_processor=QWEN),
    "video_llama_3": Recipe(config={"vision_config": {"patch_size": 14}}, image_processor=QWEN),
    "mistral3": Recipe(
        config={"vision_config": clip()},
        image_processor=PIXTRAL,
        processor={
            "patch_size": 14,
            "spatial_merge_size": 2,
            "image_token": "<image>",
            "image_break_token": "<row>",
            "image_end_token": "</img>",
        },
    ),
    "lighton_ocr": Recipe(
        config={"vision_config": clip()},
        image_processor=PIXTRAL,
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "llama4": Recipe(
        config={
            "vision_config": clip(
                intermediate_size=256,
                projector_input_dim=64,
                projector_output_dim=64,
                vision_output_dim=64,
            )
        },
        image_processor=square(),
        processor={"patch_size": 14},
        special_tokens={
            "image_token": "<|patch|>",
            "t1": "<|image_start|>",
            "t2": "<|image|>",
            "t3": "<|image_end|>",
        },
        image_placeholder="<|image|>",
    ),
    "mllama": Recipe(
        config={
            "vision_config": clip(
                intermediate_layers_indices=[0, 1], num_global_layers=1, vision_output_dim=192
            ),
            "text_config": {"cross_attention_layers": [1]},
        },
        image_processor=square(),
    ),
    "deepseek_vl": Recipe(
        config={"vision_config": clip()},
        image_processor=square(),
        processor={"num_image_tokens": 16},
    ),
    "janus": Recipe(
        config={
            "vision_config": clip(),
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "latent_channels": 16,
                "num_embeddings": 32,
                "embed_dim": 8,
                "num_res_blocks": 1,
            },
        },
        image_processor=square(),
        processor={"num_image_tokens": 16},
    ),
    "ovis2": Recipe(
        config={
            "vision_config": clip(),
            "visual_indicator_token_ids": [20, 18, 16, 19, 17],
        },
        image_processor=square(),
        processor={"image_seq_length": 16},
        special_tokens={
            "image_token": "<IMG_ATOM>",
            "1": "<IMG_START>",
            "2": "<IMG_GRID>",
            "3": "<IMG_COL>",
            "4": "<IMG_ROW>",
            "5": "<IMG_END>",
        },
    ),
    "perception_lm": Recipe(
        config={
            "vision_config": {
                "architecture": "vit_pe_lang_large_patch14_448",
                "model_args": {
                    "embed_dim": 64,
                    "depth": 2,
                    "num_heads": 4,
                    "img_size": [56, 56],
                    "ref_feat_shape": [4, 4],
                    "global_pool": "",
                },
            }
        },
        image_processor={"tile_size": 56, "max_num_tiles": 4},
        processor={"patch_size": 14, "pooling_ratio": 1},
    ),
    "aria": Recipe(
        config={"vision_config": clip(980, 70), "projector_patch_to_query_dict": {196: 8}},
        processor={"size_conversion": {980: 8}},
    ),
    "florence2": Recipe(
        config={
            "vision_config": {
                "depths": [1] * 4,
                "embed_dim": [16] * 4,
                "num_heads": [2] * 4,
                "num_groups": [2] * 4,
                "window_size": 4,
            }
        },
        image_processor=square(64, image_seq_length=5, crop_size={"height": 64, "width": 64}),
        image_placeholder=None,
    ),
    "chameleon": Recipe(
        config={
            "vocabulary_map": {
                "<image>": 8,
                "IMGIMGAZ": 20,
                "IMGIMGBZ": 21,
                "IMGIMGCZ": 22,
                "IMGIMGDZ": 23,
            },
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_embeddings": 4,
                "resolution": 8,
            },
        },
        image_processor={"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
        processor={"image_seq_length": 16},
        image_placeholder=None,
    ),
    "molmo2": Recipe(
        config={
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "image_patch_id": 17,
            "vision_config": {"image_size": [56, 56], "num_position_embeddings": 16},
        },
        image_processor=square(overlap_margins=[1, 1]),
        special_tokens={
            "1": "<im_patch>",
            "2": "<im_col>",
            "3": "<im_start>",
            "4": "<im_end>",
            "5": "<low_res_im_start>",
        },
    ),
    "cosmos3_edge": Recipe(image_processor=QWEN_16),
    "step3p7": Recipe(
        config={
            "vision_config": clip(112, max_position_embeddings=64),
            "text_config": {"sliding_window": 64},
        },
        image_processor=square(112, patch_size=56),
        special_tokens={"image_token": "<im_patch>"},
        image_placeholder="<im_patch>",
    ),
    "muse_glimmer": Recipe(
        config={"out_hidden_size": 256},
        image_processor={"max_image_tokens": 16},
        special_tokens={
            "image_token": "<|patch|>",
            "1": "<|image_start|>",
            "2": "<|image_end|>",
        },
        image_placeholder="<|patch|>",
    ),
    "kimi_k25": Recipe(
        config={
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
            "text_config": {
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "n_group": 2,
                "topk_group": 1,
                "num_key_value_heads": 4,
            },
        },
        image_processor={"max_patches": 16},
    ),
    "qwen4_exp": Recipe(
        config={
            "text_config": {
                **LINEAR_ATTENTION,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
                "hc_lowrank": 8,
            }
        },
        image_processor=QWEN_16,
    ),
}

# -------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(name: str, folder: Path) -> Path:
    """Save a tiny random checkpoint of one architecture, with everything that belongs to one."""
    recipe = RECIPES[name]
    model_type = recipe.model_type or name
    processor = _make_processor(model_type, recipe)
    config = _make_config(model_type, recipe, processor.tokenizer)
    auto_class = AutoModelForImageTextToText
    if type(config) not in auto_class._model_mapping:
        auto_class = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    _enlarge_weights(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _make_config(model_type: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    # A part of another type than the default must be named before its values are known.
    part_types = {}
    for part, values in recipe.config.items():
        if isinstance(values, dict) and "model_type" in values:
            part_types[part] = {"model_type": values["model_type"]}
    config = AutoConfig.for_model(model_type, **part_types)
    values = _shrink(config.to_dict(), tokenizer)
    return type(config).from_dict(_merge(values, recipe.config))


def _enlarge_weights(model: torch.nn.Module) -> None:
    """Let the image through.

    Many default weights are so small, or gates at zero, that it leaves no trace.
    """
    for weight in model.parameters():
        is_constant = bool(weight.min() == weight.max())
        if is_constant:
            weight.data += 0.1 * torch.randn_like(weight)
        elif weight.ndim > 1:
            inputs = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()
            gain = 1.4 if weight.ndim > 3 else 0.6
            weight.data *= gain * inputs**-0.5 / weight.std()


def _make_processor(model_type: str, recipe: Recipe) -> Any:
    class_name = recipe.processor_class or PROCESSOR_MAPPING_NAMES[model_type]
    processor_class = getattr(transformers, class_name)
    tokenizer = _make_tokenizer(recipe.special_tokens)
    makers: dict[str, Callable[[], Any]] = {
        "image_processor": lambda: _make_image_processor(model_type, recipe),
        "tokenizer": lambda: tokenizer,
        "video_processor": lambda: _make_video_processor(model_type),
        "qformer_tokenizer": lambda: tokenizer,
        "feature_extractor": transformers.Gemma3nAudioFeatureExtractor,
        "audio_processor": transformers.Phi4MultimodalFeatureExtractor,
    }
    accepted = inspect.signature(processor_class.__init__).parameters
    parts = {part: make() for part, make in makers.items() if part in accepted}
    if recipe.image_placeholder is not None:
        parts["chat_template"] = CHAT_TEMPLATE.replace("IMAGE", recipe.image_placeholder)
    return processor_class(**parts, **recipe.processor)


def _make_image_processor(model_type: str, recipe: Recipe) -> Any:
    class_name = recipe.image_processor_class
    if class_name is None:
        class_names = IMAGE_PROCESSOR_MAPPING_NAMES[model_type]
        class_name = class_names.get("torchvision") or class_names["pil"]
    return getattr(transformers, class_name)(**recipe.image_processor)


def _make_video_processor(model_type: str) -> Any:
    class_names = list(VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type, {}).values())
    class_name = class_names[0] if class_names else "Qwen2VLVideoProcessor"
    return getattr(transformers, class_name)(draw_on_frames=False)


def _make_tokenizer(special_tokens: Mapping[str, str | None]) -> PreTrainedTokenizerFast:
    """One token per byte, after the special ones."""
    more_tokens = {token for token in special_tokens.values() if token} - set(SPECIAL_TOKENS)
    all_special = [*SPECIAL_TOKENS, *sorted(more_tokens)]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*all_special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(all_special)
    named = {**TOKENS_BY_NAME, **special_tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={name: token for name, token in named.items() if token},
    )


def _shrink(values: dict, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The values of a config, or of a part of one, at a small size and for this tokenizer."""
    small = {}
    for name, value in values.items():
        if name not in DERIVED_VALUES and not str(name).endswith("_name_or_path"):
            layer_count = values.get("num_hidden_layers")
            small[name] = _shrink_value(str(name), value, tokenizer, layer_count=layer_count)
    return small


def _shrink_value(
    name: str, value: Any, tokenizer: PreTrainedTokenizerFast, *, layer_count: int | None
) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
        return json.loads(json.dumps(value), object_hook=_shorten_sections)
    if isinstance(value, dict):
        return _shrink(value, tokenizer)
    if isinstance(value, list) and len(value) == layer_count:  # one for each layer
        return [SIZES.get(name, one) for one in value[: SIZES["num_hidden_layers"]]]
    if name in ("vocab_size", "vocab_size_per_layer_input"):
        return len(tokenizer)
    if name in ("image_token_id", "image_token_index"):
        image_token = tokenizer.special_tokens_map.get("image_token", "<image>")
        return tokenizer.convert_tokens_to_ids(image_token)
    if is_number and name.endswith(("_token_id", "_token_index")):
        token_name = name.replace("_token_id", "_token").replace("_index", "")
        token = tokenizer.special_tokens_map.get(token_name) or "<mark>"
        return tokenizer.convert_tokens_to_ids(token)
    if is_number and name in SIZES:
        return SIZES[name]
    return value


def _shorten_sections(rope: dict) -> dict:
    if "mrope_section" in rope:
        return {**rope, "mrope_section": [2, 3, 3]}
    return rope


def _merge(values: dict, changes: dict) -> dict:
    """The values with changes in any depth."""
    merged = dict(values)
    for name, change in changes.items():
        old = values.get(name)
        both_are_dicts = isinstance(change, dict) and isinstance(old, dict)
        merged[name] = _merge(old, change) if both_are_dicts else change
    return merged
