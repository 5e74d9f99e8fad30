"""The passes of an adapter whose decoder is one of transformers: most forks of LLaVA."""

from __future__ import annotations

from typing import Any

import torch

from probekit.models.protocol import Inputs


class ReadsEmbeddings:
    """Gives an adapter its passes, where a decoder of transformers reads words and image vectors.

    To inherit from, besides writing the rest of :class:`probekit.models.protocol.Adapter`.

    Attributes
    ----------
    decoder : torch.nn.Module
        Without its head, such as a LlamaModel.
    image_id : int
        The token id that stands for a vector of the image.
    output_embedding : torch.nn.Module or None
        For answers.
    """

    decoder: Any
    image_id: int
    output_embedding: Any = None

    def image_features(self, images: Inputs) -> Any:
        """Return (images, vectors, d), or (vectors, d) one image after the other."""
        raise NotImplementedError

    def forward(self, tokens: Inputs, images: Inputs) -> None:
        """See the protocol."""
        self._decode(tokens, images)

    def logits(self, tokens: Inputs, images: Inputs) -> torch.Tensor:
        """See the protocol."""
        return self.output_embedding(self._decode(tokens, images))

    def forward_prefix(self, tokens: Inputs, images: Inputs) -> Any:
        """See the protocol."""
        from transformers import DynamicCache  # takes seconds

        cache = DynamicCache(config=self.decoder.config)
        self._decode(tokens, images, cache=cache)
        return cache

    def forward_suffix(self, tokens: Inputs, cache: Any, owner_n: torch.Tensor) -> None:
        """See the protocol."""
        cache.reorder_cache(owner_n)
        self._decode(tokens, {}, cache=cache)

    def _decode(self, tokens: Inputs, images: Inputs, *, cache: Any = None) -> torch.Tensor:
        """Return (n, t, d), the last layer; tokens that are cached come before."""
        ids_nt = tokens["input_ids"]
        mask = tokens["attention_mask"]
        x_ntd = self.decoder.get_input_embeddings()(ids_nt)
        if images:
            vectors = self.image_features(images)
            x_ntd = x_ntd.clone()
            x_ntd[ids_nt == self.image_id] = vectors.flatten(0, -2).to(x_ntd.dtype)
        start = mask.shape[1] - ids_nt.shape[1]
        places_t = torch.arange(start, mask.shape[1], device=ids_nt.device)
        output = self.decoder(
            inputs_embeds=x_ntd,
            attention_mask=mask,
            position_ids=places_t.expand(len(ids_nt), -1),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state
