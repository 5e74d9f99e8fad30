"""LaVIT (Jin et al. 2023, arXiv:2309.04669) as a model of probekit.

``docs/adapters/lavit.py:LaVit``: EVA ViT-g encodes the image. A selector keeps some of its patches,
a merger adds to these what the dropped ones hold, and LLaMA reads them: how many tokens an image
has depends on what it shows. As it stands here it is tiny, with random weights. Written from the
paper and its public code; nothing of that code is used.

The number of image tokens must be known before the decoder runs, so `prepare` encodes the image,
once for all its prompts; it is not done by worker processes. Images of one number of tokens share a
batch. The vectors that the decoder gets are the stage ``projector``.

Published weights (rain1011/LaVIT-7B-v1 and -v2) have these names:

    visual_tokenizer.encoder.*              model.encoder.*  (timm's Eva; `qkv`, `q_bias`, `v_bias`)
    visual_tokenizer.token_predictor.*      model.selector.*  (`in_conv`, `out_conv`)
    visual_tokenizer.causal_encoder.*       model.merger.*  (`token_causal_attn.qkv`, `.proj`;
                                            `token_cross_attn.query`, `.key`, `.value`, `.proj`)
    visual_tokenizer.vit_proj.*             model.projector.*
    language_model/ (LlamaForCausalLM)      model.decoder.*, model.head.*

Not proven without the hub: these names against the files, and the text around the prompt. Two
things differ on purpose. The public code draws which patches to keep (Gumbel noise, also when it
answers); here those are kept that are more likely kept than not, so that equal images have equal
states. At least one is. The published merger adds 1e-6 to sums of attention, which is left out.
"""

from __future__ import annotations

import torch
from timm.models.eva import Eva
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torchvision.transforms.functional import normalize, to_tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaModel

from probekit.models.decoding import ReadsEmbeddings
from probekit.models.processor import PreparedImage

IMAGE_ID, BEGIN_ID, END_ID = 383, 382, 381  # a vector of the image, and 32000 and 32001 of LaVIT
BEFORE, AFTER = "Question: ", " Answer:"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Selector(nn.Module):
    """Which patches are kept, by each patch and the mean of all."""

    def __init__(self, width: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, x_pd):
        local_pd, all_pd = self.in_conv(x_pd).chunk(2, -1)
        score_p2 = self.out_conv(torch.cat([local_pd, all_pd.mean(0).expand_as(all_pd)], -1))
        kept_p = score_p2[:, 0] > score_p2[:, 1]
        kept_p[score_p2.diff().argmin()] = True
        return kept_p


class MergerBlock(nn.Module):
    """Kept patches look at earlier kept ones, then at all dropped ones."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm0, self.norm1, self.norm2 = [nn.LayerNorm(width) for _ in range(3)]
        self.qkv, self.causal_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query, self.key, self.value, self.cross_proj = [
            nn.Linear(width, width) for _ in range(4)
        ]
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_kd, dropped_pd):
        query, key, value = self.qkv(self.norm0(x_kd)).chunk(3, -1)
        x_kd = x_kd + self.causal_proj(self._attend(query, key, value, is_causal=True))
        if len(dropped_pd):
            query, key, value = (
                self.query(self.norm1(x_kd)),
                self.key(dropped_pd),
                self.value(dropped_pd),
            )
            x_kd = x_kd + self.cross_proj(self._attend(query, key, value, is_causal=False))
        return x_kd + self.mlp(self.norm2(x_kd))

    def _attend(self, query, key, value, *, is_causal):
        heads = [one.unflatten(-1, (self.heads, -1)).transpose(0, 1) for one in (query, key, value)]
        return scaled_dot_product_attention(*heads, is_causal=is_causal).transpose(0, 1).flatten(1)


class Merger(nn.Module):
    """Adds what the dropped patches hold to the kept ones."""

    def __init__(self, width: int, *, depth: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList([MergerBlock(width, heads) for _ in range(depth)])
        self.ln_vision, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_pd, kept_p):
        dropped_pd = self.ln_vision(x_pd)[~kept_p]
        x_kd = x_pd[kept_p]
        for block in self.blocks:
            x_kd = block(x_kd, dropped_pd)
        return self.norm(x_kd)


class LaVitModel(nn.Module):
    """Encoder, selector, merger, projector, decoder and head."""

    def __init__(self, encoder: Eva, text: LlamaConfig):
        super().__init__()
        width = encoder.embed_dim
        self.encoder = encoder
        self.selector = Selector(width)
        self.merger = Merger(width, depth=2, heads=4)  # 12 and 16 in LaVIT
        self.projector = nn.Linear(width, text.hidden_size)
        self.decoder = LlamaModel(text)
        self.head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)


class LaVit(ReadsEmbeddings):
    """What probekit needs of it."""

    image_id = IMAGE_ID
    prompt_format = f"<img><image></img>{BEFORE}{{prompt}}{AFTER}"
    prepares_with_model = True

    def __init__(self, untrained: bool = True):
        # LaVIT: 224 pixels, 1408 wide, 40 blocks with 16 heads, mlp_ratio 4.3637; LLaMA 7B.
        self.side, patch = 112, 14
        encoder = Eva(
            img_size=self.side, patch_size=patch, embed_dim=64, depth=3, num_heads=4, num_classes=0
        )
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        text = LlamaConfig(vocab_size=384, num_hidden_layers=4, **sizes)
        self.model = LaVitModel(encoder, text)
        nn.init.normal_(self.model.selector.in_conv[1].weight, std=2)  # else none would be dropped
        nn.init.normal_(self.model.selector.out_conv[0].weight[:, 32:], std=0.1)
        self.decoder = self.model.decoder
        self.blocks = self.decoder.layers
        self.final_norm = self.decoder.norm
        self.output_embedding = self.model.head
        self.tokenizer = ByT5Tokenizer()
        self.grid = self.side // patch

    def prepare(self, image, prompts):
        ids = [
            self.tokenizer(BEFORE + one + AFTER, add_special_tokens=False)["input_ids"]
            for one in prompts
        ]
        if image is None:
            return PreparedImage.of_ids(ids)
        small = image.convert("RGB").resize((self.side, self.side))
        pixels = normalize(to_tensor(small), CLIP_MEAN, CLIP_STD)[None]
        x_pd = self.model.encoder.forward_features(pixels.to(self.model.head.weight))[0, 1:]
        kept_p = self.model.selector(x_pd)
        inputs = {
            "features": self.model.merger(x_pd, kept_p).cpu(),
            "places": kept_p.nonzero()[:, 0].cpu(),
        }
        of_image = [BEGIN_ID] + [IMAGE_ID] * len(inputs["places"]) + [END_ID]
        return PreparedImage.of_ids(
            [of_image + row for row in ids], image_id=IMAGE_ID, image_inputs=inputs
        )

    def image_features(self, images):
        return self.model.projector(images["features"])

    def token_grid(self, prepared, size):
        step = 1 / self.grid
        cells = []
        for place in prepared.image_inputs["places"].tolist():
            y, x = divmod(place, self.grid)
            cells.append((x * step, y * step, (x + 1) * step, (y + 1) * step))
        return cells
