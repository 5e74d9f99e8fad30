"""MoE-LLaVA (Lin et al. 2024, arXiv:2401.15947) as a model of probekit.

``docs/adapters/moe_llava.py:MoeLlava``: a CLIP tower, a projector of two layers, and StableLM, in
which the feed-forward layer of every second block is a mixture of four experts, two for each token.
As it stands here it is tiny, with random weights. Written from the paper and its public code;
nothing of that code is used.

Published weights (LanguageBind/MoE-LLaVA-StableLM-1.6B-4e) have these names:

    model.image_tower.image_tower.*                  model.tower.*  (CLIP ViT-L/14, 336 pixels)
    model.mm_projector.image_spatial_proj.{0,2}.*    model.projector.{0,2}.*
    model.embed_tokens, model.layers, model.norm     model.decoder.*
    lm_head.weight                                   model.head.weight
    …layers.k.mlp.deepspeed_moe.gate.wg.weight       …layers.k.mlp.router.weight
    …mlp.deepspeed_moe.experts.deepspeed_experts.e.* …mlp.experts.experts.e.*

Not proven without the hub: these names against the files, the text around the prompt, and the
tokenizer (Arcade100k; here it is one token per byte). One thing differs on purpose: DeepSpeed drops
tokens of an expert that has too many, so that a prompt's states depend on its batch. Here none is
dropped.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor
from transformers import (
    ByT5Tokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    StableLmConfig,
    StableLmModel,
)

from probekit.models.decoding import ReadsEmbeddings
from probekit.models.processor import PreparedImage

IMAGE_ID = 383  # stands for a vector of the image; no text has it
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = " ASSISTANT:"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Experts(nn.Module):
    """Feed-forward layers, each for the tokens that are routed to it.

    The arguments of its forward pass are those of transformers' experts: probekit reads there which
    experts a token is routed to.
    """

    def __init__(self, make_expert, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.experts = nn.ModuleList([make_expert() for _ in range(num_experts)])

    def forward(self, hidden_td, top_k_index, top_k_weights):
        mixed_td = torch.zeros_like(hidden_td)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(top_k_index == number)
            weighted = expert(hidden_td[token]) * top_k_weights[token, choice, None]
            mixed_td.index_add_(0, token, weighted.to(mixed_td.dtype))
        return mixed_td


class MixtureOfExperts(nn.Module):
    """A router and its experts, in the place of a feed-forward layer."""

    def __init__(self, make_expert, width: int, *, num_experts: int = 4, top_k: int = 2):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, num_experts, bias=False)
        self.experts = Experts(make_expert, num_experts)

    def forward(self, hidden_ntd):
        hidden_td = hidden_ntd.flatten(0, 1)
        share_te = self.router(hidden_td).softmax(-1, dtype=torch.float32)
        weights, index = share_te.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.experts(hidden_td, index, weights).view_as(hidden_ntd)


class MoeLlavaModel(nn.Module):
    """Tower, projector, decoder and head."""

    def __init__(self, vision: CLIPVisionConfig, text: StableLmConfig):
        super().__init__()
        self.tower = CLIPVisionModel(vision)
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, text.hidden_size),
            nn.GELU(),
            nn.Linear(text.hidden_size, text.hidden_size),
        )
        self.decoder = StableLmModel(text)
        for layer in self.decoder.layers[::2]:
            make_expert = lambda mlp=type(layer.mlp): mlp(text)  # noqa: E731
            layer.mlp = MixtureOfExperts(make_expert, text.hidden_size)
        self.head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)


class MoeLlava(ReadsEmbeddings):
    """What probekit needs of it."""

    image_id = IMAGE_ID
    prompt_format = f"{BEFORE}<image>\n{{prompt}}{AFTER}"

    def __init__(self, untrained: bool = True):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        vision = CLIPVisionConfig(image_size=56, patch_size=14, num_hidden_layers=3, **sizes)
        text = StableLmConfig(vocab_size=384, num_hidden_layers=4, num_key_value_heads=4, **sizes)
        self.model = MoeLlavaModel(vision, text)
        self.decoder = self.model.decoder
        self.blocks = self.decoder.layers
        self.final_norm = self.decoder.norm
        self.vision_blocks = [
            module
            for module in self.model.tower.modules()
            if "EncoderLayer" in type(module).__name__
        ]
        self.output_embedding = self.model.head
        self.tokenizer = ByT5Tokenizer()
        self.side = vision.image_size
        self.grid = vision.image_size // vision.patch_size

    def prepare(self, image, prompts):
        before, after = self._ids(BEFORE), self._ids(AFTER)
        if image is None:
            return PreparedImage.of_ids([before + self._ids(one) + after for one in prompts])
        small = image.convert("RGB").resize((self.side, self.side))
        pixels = normalize(to_tensor(small), CLIP_MEAN, CLIP_STD)
        before = before + [IMAGE_ID] * self.grid**2
        ids = [before + self._ids(f"\n{prompt}") + after for prompt in prompts]
        return PreparedImage.of_ids(ids, image_id=IMAGE_ID, image_inputs={"pixels": pixels[None]})

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def image_features(self, images):
        states = self.model.tower(images["pixels"], output_hidden_states=True).hidden_states
        return self.model.projector(states[-2][:, 1:])  # without the class token

    def token_grid(self, prepared, size):
        step, places = 1 / self.grid, range(self.grid)
        return [
            (x * step, y * step, (x + 1) * step, (y + 1) * step) for y in places for x in places
        ]
