"""Tiny random checkpoints of many architectures: transformers' own default configs, shrunken, with a byte tokenizer."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

SMALL = {  # by the names that configs use
    3: "num_hidden_layers n_layer layers decoder_layers num_decoder_layers",
    2: "depth num_layers conf_num_hidden_layers n_layers encoder_layers num_key_value_heads num_experts_per_tok "
       "moe_topk moe_k linear_num_key_heads vision_layers num_hidden_layers_image",
    4: "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads n_head "
       "num_experts num_local_experts moe_num_experts n_routed_experts linear_num_value_heads",
    8: "num_query_tokens latent_query_num resampler_n_latents",
    16: "head_dim d_kv linear_key_head_dim linear_value_head_dim num_image_tokens",
    32: "moe_intermediate_size share_expert_dim ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels",
    64: "hidden_size embed_dim d_model dim hidden_dim n_embd projection_dim out_hidden_size text_hidden_size "
        "vision_hidden_size word_embed_proj_dim projection_hidden_size projector_hidden_size",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff ffn_hidden_size "
        "shared_expert_intermediate_size intermediate_size_mlp alignment_intermediate_size",
    2048: "max_position_embeddings",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
DERIVED = {"layer_types", "mlp_layer_types", "deepstack_visual_indexes", "dtype", "transformers_version", "id2label",
           "label2id", "per_layer_config"}  # these follow from the sizes, or do not matter
NAMED = {  # special tokens, by the names under which processors ask the tokenizer for them
    "<image>": "image_token context_image_token",
    "<video>": "video_token",
    "<audio>": "audio_token",
    "<img>": "boi_token start_image_token image_start_token image_id_start_token slice_start_token "
             "image_boundary_token image_wrapper_token boa_token",
    "</img>": "eoi_token end_image_token image_end_token image_id_end_token slice_end_token eoa_token",
    "<row>": "img_line_break_token image_break_token eol_token eof_token newline_token",
    "<tile>": "image_newline_token tile_token",
}
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>", "<unk>", "<mark>", *NAMED]
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@dataclass(frozen=True)
class Row:
    """What one architecture needs beside the general rule.

    Attributes
    ----------
    config, image, processor : values of its config, image processor and processor
    words : special tokens by the names under which its processor looks them up (numbers: it writes them itself);
        None takes one of :data:`NAMED` away
    placed : what stands for an image in its chat template; None saves a checkpoint without a template
    """

    config: dict = field(default_factory=dict)
    image: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    words: dict[str, str | None] = field(default_factory=dict)
    placed: str | None = "<image>"
    processor_class: str | None = None
    image_class: str | None = None
    of: str | None = None  # the model type, where the name says more


def clip(size: int = 56, patch: int = 14, **more) -> dict:
    return {"image_size": size, "patch_size": patch, **more}


def side(size: int = 56, **more) -> dict:
    return {"size": {"height": size, "width": size}, **more}


QWEN = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "patch_size": 14}
QWEN16 = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
GRID = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
MINICPM = {"scale_resolution": 112, "slice_mode": False}
OWN_TOKEN = {"image_token": None}  # the processor adds it
FASTVIT = {"hidden_size": 64, "architecture": "fastvit_mci3", "model_args": {
    "layers": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32], "mlp_ratios": [1, 1, 1, 1], "inference_mode": True}}
FULL = ["full_attention"] * 3
LINEAR = {"text_config": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}}
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
ROWS: dict[str, Row] = {
    "qwen2_vl": Row({"text_config": {"rope_parameters": ROPE}}, QWEN),
    "qwen2_5_vl": Row({"text_config": {"rope_parameters": ROPE}}, QWEN),
    "qwen3_vl": Row(image=QWEN16),
    "qwen3_vl_moe": Row(image=QWEN16, image_class="Qwen2VLImageProcessor"),
    "qwen3_5": Row(LINEAR, QWEN16),
    "qwen3_5_moe": Row(LINEAR, QWEN16),
    "fast_vlm": Row({"image_seq_length": 4, "vision_config": FASTVIT}, side(64),
                    {"patch_size": 32, "vision_feature_select_strategy": "full"}, processor_class="LlavaProcessor",
                    image_class="CLIPImageProcessor"),
    "llava": Row({"vision_config": clip()}, CROP, LLAVA),
    "vipllava": Row({"vision_config": clip(), "vision_feature_layers": [-1, -2]}, CROP, LLAVA),
    "llava_next": Row({"vision_config": clip(), **GRID}, {**CROP, **GRID}, LLAVA),
    "llava_next_video": Row({"vision_config": clip(), **GRID}, {**CROP, **GRID}, LLAVA),
    "llava_onevision": Row({"vision_config": clip(), **GRID}, {**side(), **GRID},
                           {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
    "video_llava": Row({"vision_config": clip()}, CROP, {"patch_size": 14, "num_additional_image_tokens": 1}),
    "gemma3": Row({"vision_config": clip(), "mm_tokens_per_image": 4}, side(), {"image_seq_length": 4}, placed="<img>"),
    "gemma3n": Row({"text_config": {"layer_types": FULL, "num_kv_shared_layers": 1}, "vision_soft_tokens_per_image": 4,
                    "vision_config": FASTVIT}, side(64), {"image_seq_length": 4}),
    "gemma4": Row({"vision_config": {"model_type": "gemma4_vision", "patch_size": 4, "position_embedding_size": 256}},
                  {"patch_size": 4, "max_soft_tokens": 70}),
    "t5gemma2": Row({"encoder": {"vision_config": clip(), "mm_tokens_per_image": 4}}, side(), {"image_seq_length": 4},
                    placed="<img>"),
    "paligemma": Row({"vision_config": clip()}, side(image_seq_length=16), placed=None),
    "internvl": Row({"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}, "image_seq_length": 4},
                    side(), {"image_seq_length": 4}),
    "qianfan_ocr": Row({"vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}, "image_seq_length": 4},
                       side(), {"image_seq_length": 4}),
    "smolvlm": Row({"vision_config": clip(), "scale_factor": 2}, TILES, {"image_seq_len": 4}),
    "idefics3": Row({"vision_config": clip(), "scale_factor": 2}, TILES, {"image_seq_len": 4}),
    "idefics2": Row({"vision_config": clip(70)}, {"size": {"shortest_edge": 42, "longest_edge": 70}},
                    {"image_seq_len": 8}),
    "granite_docling": Row({"vision_config": clip(scale_factor=2)}, side(max_patches=4), {"image_seq_len": 4}),
    "aya_vision": Row({"vision_config": clip(), "downsample_factor": 2}, side(),
                      {"patch_size": 14, "img_size": 56, "downsample_factor": 2}, {"image_token": "<|IMG_PATCH|>"}),
    "cohere2_vision": Row({"vision_config": clip(), "downsample_factor": 2}, side(patch_size=2)),
    "blip-2": Row({"vision_config": clip()}, side(), {"num_query_tokens": 8}, OWN_TOKEN, placed=None),
    "blip-2 (T5)": Row({"vision_config": clip(), "use_decoder_only_language_model": False,
                        "text_config": {"model_type": "t5"}}, side(), {"num_query_tokens": 8}, OWN_TOKEN, placed=None,
                       of="blip-2"),
    "instructblip": Row({"vision_config": clip()}, side(), {"num_query_tokens": 8}, OWN_TOKEN, placed=None),
    "kosmos-2": Row({"vision_config": clip(), "latent_query_num": 64}, CROP, placed=None,
                    processor_class="Kosmos2Processor"),
    "minicpmv4_6": Row(LINEAR | {"vision_config": clip(112), "insert_layer_id": 1}, MINICPM),
    "minicpmv4_7": Row(LINEAR | {"vision_config": clip(112), "insert_layer_id": 1}, MINICPM),
    "phi4_multimodal": Row({"vision_config": clip(64, 2, crop_size=64), "audio_config": {"num_blocks": 1}},
                           side(64, patch_size=2, dynamic_hd=1), processor_class="Phi4MultimodalProcessor",
                           image_class="Phi4MultimodalImageProcessor"),
    "lfm2_vl": Row(),
    "glm4v": Row({"text_config": {"rope_parameters": ROPE}}, QWEN),
    "glm46v": Row({"text_config": {"rope_parameters": ROPE}}, QWEN),
    "glm4v_moe": Row({"text_config": {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}}, QWEN,
                     image_class="Glm4vImageProcessor"),
    "glm_ocr": Row({"text_config": {"rope_parameters": ROPE}}, QWEN, processor_class="Glm46VProcessor",
                   image_class="Glm46VImageProcessor"),
    "ernie4_5_vl_moe": Row(
        {"text_config": {"moe_intermediate_size": [32, 32], "rope_parameters": ROPE | {"mrope_section": [3, 3, 2]}}},
        QWEN, {}, {"video_end_token": "</img>", "video_start_token": "<img>"}),
    "paddleocr_vl": Row({"text_config": {"rope_parameters": ROPE}}, QWEN),
    "exaone4_5": Row(image=QWEN),
    "hyperclovax_vision_v2": Row(image=QWEN),
    "video_llama_3": Row({"vision_config": {"patch_size": 14}}, QWEN),
    "mistral3": Row({"vision_config": clip()}, {"size": {"longest_edge": 56}, "patch_size": 14},
                    {"patch_size": 14, "spatial_merge_size": 2, "image_token": "<image>", "image_break_token": "<row>",
                     "image_end_token": "</img>"}),
    "lighton_ocr": Row({"vision_config": clip()}, {"size": {"longest_edge": 56}, "patch_size": 14},
                       {"patch_size": 14, "spatial_merge_size": 2}),
    "llama4": Row({"vision_config": clip(intermediate_size=256, projector_input_dim=64, projector_output_dim=64,
                                         vision_output_dim=64)}, side(), {"patch_size": 14},
                  {"image_token": "<|patch|>", "t1": "<|image_start|>", "t2": "<|image|>", "t3": "<|image_end|>"},
                  "<|image|>"),
    "mllama": Row({"vision_config": clip(intermediate_layers_indices=[0, 1], num_global_layers=1,
                                         vision_output_dim=192), "text_config": {
        "cross_attention_layers": [1]}}, side()),
    "deepseek_vl": Row({"vision_config": clip()}, side(), {"num_image_tokens": 16}),
    "janus": Row({"vision_config": clip(), "vq_config": {
        "base_channels": 32, "channel_multiplier": [1, 1], "latent_channels": 16, "num_embeddings": 32, "embed_dim": 8,
        "num_res_blocks": 1}}, side(), {"num_image_tokens": 16}),
    "ovis2": Row({"vision_config": clip(), "visual_indicator_token_ids": [20, 18, 16, 19, 17]}, side(),
                 {"image_seq_length": 16}, {"image_token": "<IMG_ATOM>", "1": "<IMG_START>", "2": "<IMG_GRID>",
                                            "3": "<IMG_COL>", "4": "<IMG_ROW>", "5": "<IMG_END>"}),
    "perception_lm": Row({"vision_config": {"architecture": "vit_pe_lang_large_patch14_448", "model_args": {
        "embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [56, 56], "ref_feat_shape": [4, 4],
        "global_pool": ""}}}, {"tile_size": 56, "max_num_tiles": 4}, {"patch_size": 14, "pooling_ratio": 1}),
    "aria": Row({"vision_config": clip(980, 70), "projector_patch_to_query_dict": {196: 8}}, {},
                {"size_conversion": {980: 8}}),
    "florence2": Row({"vision_config": {"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4,
                                        "num_groups": [2] * 4, "window_size": 4}},
                     side(64, image_seq_length=5, crop_size={"height": 64, "width": 64})),
    "chameleon": Row(
        {"vocabulary_map": {"<image>": 8, "IMGIMGAZ": 20, "IMGIMGBZ": 21, "IMGIMGCZ": 22, "IMGIMGDZ": 23}, "vq_config":
         {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 4, "resolution": 8}},
        {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}, {"image_seq_length": 16}, placed=None),
    "molmo2": Row({"adapter_config": {"vision_feature_layer": [1, 0]}, "image_patch_id": 17, "vision_config": {
        "image_size": [56, 56], "num_position_embeddings": 16}}, side(overlap_margins=[1, 1]), {},
        {"1": "<im_patch>", "2": "<im_col>", "3": "<im_start>", "4": "<im_end>", "5": "<low_res_im_start>"}),
    "cosmos3_edge": Row(image=QWEN16),
    "step3p7": Row({"vision_config": clip(112, max_position_embeddings=64), "text_config": {"sliding_window": 64}},
                   side(112, patch_size=56), {}, {"image_token": "<im_patch>"}, "<im_patch>"),
    "muse_glimmer": Row({"out_hidden_size": 256}, {"max_image_tokens": 16}, {},
                        {"image_token": "<|patch|>", "1": "<|image_start|>", "2": "<|image_end|>"}, "<|patch|>"),
    "kimi_k25": Row({"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}, "text_config": {
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16,
        "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}}, {"max_patches": 16}),
    "qwen4_exp": Row({"text_config": LINEAR["text_config"] | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "hc_lowrank": 8}}, QWEN16),
}


def make(name: str, folder: Path) -> Path:
    """Save a tiny random checkpoint (config, weights, tokenizer, processor, template) of one architecture."""
    row = ROWS[name]
    kind = row.of or name
    processor = make_processor(kind, row)
    parts = {key: {"model_type": part["model_type"]} for key, part in row.config.items()
             if isinstance(part, dict) and "model_type" in part}
    config = AutoConfig.for_model(kind, **parts)
    values = _shrunken(config.to_dict(), len(processor.tokenizer), processor.tokenizer)
    config = type(config).from_dict(_merged(values, row.config))
    mapping = AutoModelForImageTextToText._model_mapping
    maker = AutoModelForImageTextToText if type(config) in mapping else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = maker.from_config(config)
    _liven(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _liven(model: torch.nn.Module) -> None:
    """Weights that let the image through: many default ones are so small, or gates at zero, that it leaves no trace."""
    for weight in model.parameters():
        if weight.unique().numel() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
        elif weight.ndim > 1:
            inputs = weight.shape[-1] if weight.ndim == 3 else weight[0].numel()
            weight.data *= (1.4 if weight.ndim > 3 else 0.6) * inputs ** -0.5 / weight.std()


def make_processor(kind: str, row: Row):
    tokenizer = _tokenizer(row.words)
    processor_class = getattr(transformers, row.processor_class or PROCESSOR_MAPPING_NAMES[kind])
    image_classes = {} if row.image_class else IMAGE_PROCESSOR_MAPPING_NAMES[kind]
    image_class = row.image_class or image_classes.get("torchvision") or image_classes["pil"]
    video_class = next(iter(VIDEO_PROCESSOR_MAPPING_NAMES.get(kind, {}).values()), "Qwen2VLVideoProcessor")
    made = {"image_processor": lambda: getattr(transformers, image_class)(**row.image), "tokenizer": lambda: tokenizer,
            "video_processor": lambda: getattr(transformers, video_class)(draw_on_frames=False),
            "qformer_tokenizer": lambda: tokenizer,
            "feature_extractor": lambda: transformers.Gemma3nAudioFeatureExtractor(),
            "audio_processor": lambda: transformers.Phi4MultimodalFeatureExtractor()}
    wanted = inspect.signature(processor_class.__init__).parameters
    parts = {part: make_part() for part, make_part in made.items() if part in wanted}
    template = CHAT.replace("IMAGE", row.placed) if row.placed else None
    return processor_class(**parts, **row.processor, **({"chat_template": template} if template else {}))


def _tokenizer(words: dict[str, str | None]) -> PreTrainedTokenizerFast:
    """One token a byte."""
    named = {name: word for word, names in NAMED.items() for name in names.split()} | words
    special = [*WORDS, *sorted({*filter(None, words.values())} - {*WORDS})]
    spelled = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: i for i, word in enumerate([*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}, []))
    spelled.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.decoder = tokenizers.decoders.ByteLevel()
    spelled.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=spelled, eos_token="<|im_end|>", bos_token="<s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={name: word for name, word in named.items() if word})


def _shrunken(values: dict, vocabulary: int, tokenizer) -> dict:
    small = {}
    for key, value in values.items():
        if key in DERIVED or str(key).endswith("_name_or_path"):
            continue
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, dict) and key in ("rope_parameters", "rope_scaling"):
            small[key] = json.loads(json.dumps(value), object_hook=_short_sections)
        elif isinstance(value, dict):
            small[key] = _shrunken(value, vocabulary, tokenizer)
        elif isinstance(value, list) and len(value) == values.get("num_hidden_layers"):  # one for each layer
            small[key] = [SIZES.get(key, one) for one in value[:SIZES["num_hidden_layers"]]]
        elif key in ("vocab_size", "vocab_size_per_layer_input"):
            small[key] = vocabulary
        elif key in ("image_token_id", "image_token_index"):
            small[key] = tokenizer.convert_tokens_to_ids(tokenizer.special_tokens_map.get("image_token", "<image>"))
        elif number and str(key).endswith(("_token_id", "_token_index")):
            known = tokenizer.special_tokens_map.get(key.replace("_token_id", "_token").replace("_index", ""))
            small[key] = tokenizer.convert_tokens_to_ids(known or "<mark>")
        else:
            small[key] = SIZES[key] if number and key in SIZES else value
    return small


def _short_sections(rope: dict) -> dict:
    return rope | {"mrope_section": [2, 3, 3]} if "mrope_section" in rope else rope


def _merged(values: dict, changes: dict) -> dict:
    both = {key: _merged(values[key], value) if isinstance(value, dict) and isinstance(values.get(key), dict) else value
            for key, value in changes.items()}
    return values | both
