"""From hidden states to the logits of a few answer words, without the head over the vocabulary.

What is needed is taken from a loaded model once, and held against the whole model's logits of a
real prompt. From then on answers are read off stored states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from probekit.models.batches import batch_images, batch_tokens
from probekit.models.devices import copy_to
from probekit.models.hooks import tap_decoder
from probekit.models.load import Vlm
from probekit.models.processor import PreparedImage

# How far logits may be off, as a share of the largest one.
TOLERANCES = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}
# How far each entry of a normed state may be off in float32, as a share of it.
NORM_TOLERANCE = 1e-3
# Under which names norms state what is added to the variance.
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")
# Tokens with a lower logit are those that a model is kept from saying.
LOWEST_LOGIT = -1e4
# How the words of answers are spelled at the beginning of an answer.
SPELLINGS = ("{word}", " {word}", "{Word}", " {Word}", "{WORD}", " {WORD}")


NO_HEAD = "its checkpoint has no output embedding"
NO_HEAD_OF_ADAPTER = "its adapter lacks one of output_embedding, logits, tokenizer"
NO_LENS = "its final norm is not one that is known, so there is no lens"


class NoAnswers(ValueError):
    """Why the answers of a model cannot be read, in one line."""


@dataclass(frozen=True)
class Spelling:
    """A word as an answer may begin with it.

    Attributes
    ----------
    word : str
    form : int
        Which of :data:`SPELLINGS`.
    token_ids : tuple of int
        What the tokenizer makes of it.
    """

    word: str
    form: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class FinalNorm:
    """The norm between the last block and the output embedding.

    Attributes
    ----------
    kind : {"rms", "layer", "none"}
        Zhang and Sennrich (2019), Ba et al. (2016), or no norm.
    weight_d, bias_d : ndarray or None
        (d,) float32; None for all ones, and for zeros.
    epsilon : float
    """

    kind: str
    weight_d: np.ndarray | None = None
    bias_d: np.ndarray | None = None
    epsilon: float = 0.0

    def __call__(self, hidden_nd: np.ndarray) -> np.ndarray:
        """Return (n, d) float32 normed hidden states."""
        return self.on("cpu")(_as_tensor(hidden_nd)).numpy()

    def on(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the norm for float32 hidden states (..., d) on a device."""
        weight_d = None if self.weight_d is None else copy_to(device, _as_tensor(self.weight_d))
        bias_d = None if self.bias_d is None else copy_to(device, _as_tensor(self.bias_d))

        def norm(hidden: torch.Tensor) -> torch.Tensor:
            width = hidden.shape[-1:]
            if self.kind == "none":
                return hidden
            if self.kind == "layer":
                return functional.layer_norm(hidden, width, weight_d, bias_d, self.epsilon)
            normed = functional.rms_norm(hidden, width, weight_d, self.epsilon)
            return normed if bias_d is None else normed + bias_d

        return norm


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What turns a model's hidden states into logits of answer words.

    Attributes
    ----------
    spellings : tuple of Spelling
        Of all words that were asked for; those that the tokenizer cannot spell are not among them.
    blank_ids : tuple of int
        Ids of tokens that are nothing but space.
    token_ids : tuple of int
        The v tokens that have a row.
    rows_vd : ndarray
        (v, d) float32 rows of the output embedding.
    bias_v : ndarray or None
        (v,) float32.
    scale : float
        Logits are multiplied by it.
    soft_cap : float or None
        Logits go through ``soft_cap * tanh(logits / soft_cap)``.
    norm : FinalNorm or None
        None where it is not known, so that layers before the last cannot be read.
    largest_error : float
        The largest difference of these logits from those of the whole model, of one prompt.
    refusal : str
        Why there is nothing to read, then all arrays are empty; else ``""``.
    """

    spellings: tuple[Spelling, ...] = ()
    blank_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    rows_vd: np.ndarray
    bias_v: np.ndarray | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    norm: FinalNorm | None = None
    largest_error: float = 0.0
    refusal: str = ""

    @classmethod
    def refused(cls, reason: str) -> AnswerHead:
        """Return the head of a model whose answers cannot be read."""
        return cls(rows_vd=np.zeros((0, 0), np.float32), refusal=reason)

    def token_logits(self, hidden_nd: np.ndarray, *, is_normed: bool) -> np.ndarray:
        """Compute the logits of all tokens that have a row.

        Parameters
        ----------
        hidden_nd : ndarray
            (n, d) hidden states of the tokens after which the answer begins.
        is_normed : bool
            Whether they are of the last layer, which comes after the final norm.

        Returns
        -------
        ndarray
            (n, v) float32.

        Raises
        ------
        NoAnswers
            The final norm is not known, and they are of another layer.
        """
        if not is_normed and self.norm is None:
            raise NoAnswers(NO_LENS)
        return self.on("cpu")(_as_tensor(hidden_nd), is_normed=is_normed).numpy()

    def on(
        self, device: str, places: Sequence[int] | slice = slice(None)
    ) -> Callable[..., torch.Tensor]:
        """Return the head for float32 hidden states on a device.

        Parameters
        ----------
        device : str
        places : sequence of int, optional
            Places of the tokens that are wanted among the v; all of them unless they are named.

        Returns
        -------
        callable
            ``logits(hidden, is_normed=...)``: from (..., d) to (..., v), see :meth:`token_logits`.
            Hidden states that are not normed need a head whose norm is known.
        """
        rows_dv = copy_to(device, _as_tensor(self.rows_vd[places].T))
        bias_v = None if self.bias_v is None else copy_to(device, _as_tensor(self.bias_v[places]))
        norm = None if self.norm is None else self.norm.on(device)

        def logits(hidden: torch.Tensor, *, is_normed: bool) -> torch.Tensor:
            if not is_normed and norm is not None:
                hidden = norm(hidden)
            raw = hidden @ rows_dv
            if bias_v is not None:
                raw = raw + bias_v
            scaled = self.scale * raw
            if self.soft_cap is None:
                return scaled
            return self.soft_cap * torch.tanh(scaled / self.soft_cap)

        return logits

    # -------------------------------------------------------------------------------- on disk

    def to_tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays, and what is to be written beside them as JSON."""
        arrays = {}
        if not self.refusal:
            arrays["rows"] = self.rows_vd
        if self.bias_v is not None:
            arrays["bias"] = self.bias_v
        note: dict[str, Any] = {
            "spellings": [asdict(spelling) for spelling in self.spellings],
            "blank_ids": self.blank_ids,
            "token_ids": self.token_ids,
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "largest_error": self.largest_error,
            "refusal": self.refusal,
        }
        if self.norm is not None:
            note["norm"] = {"kind": self.norm.kind, "epsilon": self.norm.epsilon}
            if self.norm.weight_d is not None:
                arrays["norm_weight"] = self.norm.weight_d
            if self.norm.bias_d is not None:
                arrays["norm_bias"] = self.norm.bias_d
        return arrays, note

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> AnswerHead:
        """Put together what :meth:`to_tensors` took apart."""
        if note["refusal"]:
            return cls.refused(note["refusal"])
        norm = None
        if "norm" in note:
            norm = FinalNorm(
                note["norm"]["kind"],
                weight_d=arrays.get("norm_weight"),
                bias_d=arrays.get("norm_bias"),
                epsilon=note["norm"]["epsilon"],
            )
        spellings = tuple(
            Spelling(one["word"], one["form"], tuple(one["token_ids"])) for one in note["spellings"]
        )
        return cls(
            spellings=spellings,
            blank_ids=tuple(note["blank_ids"]),
            token_ids=tuple(note["token_ids"]),
            rows_vd=arrays["rows"],
            bias_v=arrays.get("bias"),
            scale=note["scale"],
            soft_cap=note["soft_cap"],
            norm=norm,
            largest_error=note["largest_error"],
        )

    # -------------------------------------------------------------------------------- answers

    def answer_tokens(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Find the tokens that tell answers apart, see :meth:`distinct_tokens`.

        Raises
        ------
        NoAnswers
            An answer is left without a token.
        """
        tokens_by_answer = self.distinct_tokens(answers)
        for words, tokens in zip(answers, tokens_by_answer, strict=True):
            if not tokens:
                is_spelled = any(one.word in words for one in self.spellings)
                reason = "begins like another one" if is_spelled else "is not in its vocabulary"
                raise NoAnswers(f"its tokenizer cannot tell {words[0]!r} apart: it {reason}")
        return tokens_by_answer

    def distinct_tokens(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Find the tokens with which one answer begins and no other one.

        In each spelling, that is the first token that is more than space. A token that two answers
        begin with tells nothing, and is left out.

        Parameters
        ----------
        answers : sequence of sequences of str
            The words for each of the a answers.

        Returns
        -------
        list of list of int
            For each answer places among the v tokens; none where it has no token of its own.
        """
        tokens_by_answer: list[set[int]] = [set() for _ in answers]
        for form in range(len(SPELLINGS)):
            ids_by_answer = [
                [
                    list(spelling.token_ids)
                    for spelling in self.spellings
                    if spelling.form == form and spelling.word in words
                ]
                for words in answers
            ]
            for tokens, spelled in zip(tokens_by_answer, ids_by_answer, strict=True):
                tokens.update(self._first_that_is_not_blank(ids) for ids in spelled)
        claims = [token for tokens in tokens_by_answer for token in tokens]
        places = {token: place for place, token in enumerate(self.token_ids)}
        return [
            [places[token] for token in sorted(tokens) if claims.count(token) == 1]
            for tokens in tokens_by_answer
        ]

    def _first_that_is_not_blank(self, token_ids: Sequence[int]) -> int:
        return next((token for token in token_ids if token not in self.blank_ids), token_ids[0])


# ----------------------------------------------------------------------------- from a loaded model


def take_answer_head(vlm: Vlm, words: Sequence[str], prepared: PreparedImage) -> AnswerHead:
    """Take from a model what the answers of prompts are read with, and check it.

    Parameters
    ----------
    vlm : Vlm
        With its head (`with_head` of :func:`probekit.models.load.load_vlm`).
    words : sequence of str
        All words of all answers.
    prepared : PreparedImage
        One image with one prompt, on which the whole model runs once.

    Returns
    -------
    AnswerHead
        With its `refusal`, where the model has no answers to read.
    """
    try:
        return _take_answer_head(vlm, words, prepared)
    except NoAnswers as error:
        return AnswerHead.refused(str(error))


@torch.inference_mode()
def _take_answer_head(vlm: Vlm, words: Sequence[str], prepared: PreparedImage) -> AnswerHead:
    if vlm.reads_prompts_by_encoder:
        raise NoAnswers(
            "its prompts are read by an encoder, and what its decoder says is not read: not for "
            f"the architecture {vlm.type}"
        )
    if vlm.head is None:
        raise NoAnswers(NO_HEAD if vlm.is_native else NO_HEAD_OF_ADAPTER)
    output = vlm.head.module
    weight_vd = output.weight
    if weight_vd.shape[1] != vlm.width:
        raise NoAnswers(
            f"its output embedding is {weight_vd.shape[1]} wide, and its last layer {vlm.width}"
        )
    tokenizer = vlm.tokenizer
    spellings = spell(words, tokenizer)
    if not spellings:
        raise NoAnswers(f"its tokenizer has none of the words {', '.join(words)}")
    token_ids = sorted({token for one in spellings for token in one.token_ids})
    blank_ids = [token for token in token_ids if not tokenizer.decode([token]).strip()]
    before_norm_d, last_d, logits_v = _run_whole(vlm, prepared)
    bias = getattr(output, "bias", None)
    raw_v = (last_d.to(weight_vd.dtype) @ weight_vd.T).float()
    if bias is not None:
        raw_v = raw_v + bias.float()
    soft_cap = getattr(vlm.adapter, "soft_cap", None)
    scale = _measure_scale(raw_v, logits_v, soft_cap=soft_cap)
    index = torch.tensor(token_ids, device=weight_vd.device)
    head = AnswerHead(
        spellings=tuple(spellings),
        blank_ids=tuple(blank_ids),
        token_ids=tuple(token_ids),
        rows_vd=_as_numpy(weight_vd[index]),
        bias_v=None if bias is None else _as_numpy(bias[index]),
        scale=scale,
        soft_cap=soft_cap,
        norm=find_final_norm(vlm, before_norm_d, last_d),
    )
    mine_v = head.token_logits(_as_numpy(last_d)[None], is_normed=True)[0]
    error = float(np.abs(mine_v - _as_numpy(logits_v[index])).max())
    largest = float(logits_v[logits_v > LOWEST_LOGIT].abs().max())
    if not error <= TOLERANCES[vlm.dtype] * largest:
        raise NoAnswers(
            "its logits are not those of its output embedding (they differ by "
            f"{error:.2g}, and are up to {largest:.2g})"
        )
    return replace(head, largest_error=error)


def spell(words: Sequence[str], tokenizer: Any) -> list[Spelling]:
    """Return all spellings of words that a tokenizer knows."""
    spellings = []
    for word in words:
        for form, pattern in enumerate(SPELLINGS):
            text = pattern.format(word=word, Word=word.capitalize(), WORD=word.upper())
            token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if token_ids and tokenizer.unk_token_id not in token_ids:
                spellings.append(Spelling(word, form, token_ids))
    return spellings


def _run_whole(
    vlm: Vlm, prepared: PreparedImage
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the whole model on one prompt; return what comes of its last token.

    Returns
    -------
    before_norm_d, last_d : Tensor
        (d,) what leaves the last block, and the last layer.
    logits_v : Tensor
        (vocabulary,) float32.
    """
    if vlm.head is None:
        raise NoAnswers(NO_HEAD)
    tokens = vlm.to_device(batch_tokens(vlm, [prepared.tokens[0]]))
    images = vlm.to_device(batch_images(vlm, [prepared]))
    seen: dict[str, torch.Tensor] = {}

    def keep(layer: str, hidden_ntd: torch.Tensor) -> None:
        if layer == vlm.layers[-1]:
            seen["last"] = hidden_ntd[0, -1].clone()

    def keep_block(module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor):
            seen["block"] = hidden.reshape(-1, hidden.shape[-1])[-1].clone()

    handle = vlm.blocks[-1].register_forward_hook(keep_block)
    try:
        with tap_decoder(vlm, keep):
            logits_ntv = vlm.head.logits(tokens, images)
    finally:
        handle.remove()
    return seen["block"], seen["last"], logits_ntv[0, -1].float()


def _measure_scale(raw_v: torch.Tensor, logits_v: torch.Tensor, *, soft_cap: float | None) -> float:
    """Return what raw logits are multiplied by: architectures call it many names."""
    if soft_cap is not None:
        inside = (logits_v / soft_cap).clamp(-0.9999, 0.9999)
        logits_v = soft_cap * torch.atanh(inside)
    sayable = logits_v > LOWEST_LOGIT
    raw_v = raw_v[sayable].double()
    scale = float((raw_v @ logits_v[sayable].double()) / (raw_v @ raw_v))
    return 1.0 if abs(scale - 1) < 1e-3 else scale


# ---------------------------------------------------------------------------------- the final norm


def find_final_norm(
    vlm: Vlm, before_norm_d: torch.Tensor, last_d: torch.Tensor
) -> FinalNorm | None:
    """Find the norm that makes the last layer of what leaves the last block.

    Parameters
    ----------
    vlm : Vlm
    before_norm_d, last_d : Tensor
        (d,) of one token, what leaves the last block, and the last layer.

    Returns
    -------
    FinalNorm or None
        None where no module of the decoder does that by a formula that is known.
    """
    if torch.equal(before_norm_d, last_d):
        return FinalNorm("none")
    if before_norm_d.shape != last_d.shape:
        return None
    inside_blocks = set(vlm.blocks.modules())
    for module in vlm.stack.modules():
        if module in inside_blocks or not _is_norm_like(module, vlm.width):
            continue
        if not _agree(module(before_norm_d[None])[0], last_d, vlm.dtype):
            continue
        norm = _describe_norm(module, vlm)
        if norm is not None:
            return norm
    return None


def _is_norm_like(module: nn.Module, width: int) -> bool:
    parameters = list(module.parameters())
    is_leaf = not list(module.children())
    return (
        is_leaf
        and "norm" in type(module).__name__.lower()
        and all(parameter.shape == (width,) for parameter in parameters)
    )


def _describe_norm(module: nn.Module, vlm: Vlm) -> FinalNorm | None:
    """Return the formula that computes what a module does to random states."""
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    weight_d = None if weight is None else _as_numpy(weight)
    bias_d = None if bias is None else _as_numpy(bias)
    epsilons = [getattr(module, name, None) for name in EPSILON_NAMES]
    epsilon = next((value for value in epsilons if value is not None), 1e-6)
    candidates = [FinalNorm(kind, weight_d, bias_d, epsilon) for kind in ("rms", "layer")]
    if weight_d is not None:  # some add 1 to their weights
        candidates += [replace(norm, weight_d=1 + weight_d) for norm in candidates]
    # In float32, and of states that are not around zero: else nothing would distinguish a norm that
    # centres from one that does not, or large weights from those with 1 added.
    exact = copy.deepcopy(module).float().cpu()
    generator = torch.Generator().manual_seed(0)
    sample_nd = torch.randn(8, vlm.width, generator=generator) + 1
    sample_nd = sample_nd * torch.logspace(-1, 2, 8)[:, None]
    expected_nd = _as_numpy(exact(sample_nd))
    errors = []
    for norm in candidates:
        off_nd = np.abs(norm(_as_numpy(sample_nd)) - expected_nd)
        errors.append(float((off_nd / (np.abs(expected_nd) + 1e-3)).max()))
    best = int(np.argmin(errors))
    return candidates[best] if errors[best] < NORM_TOLERANCE else None


def _agree(a: torch.Tensor, b: torch.Tensor, dtype: str) -> bool:
    scale = float(b.float().abs().max())
    return float((a.float() - b.float()).abs().max()) <= TOLERANCES[dtype] * scale


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
