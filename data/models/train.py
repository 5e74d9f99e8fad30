"""Train the two tiny vision-language checkpoints on drawn scenes, from nothing, on the CPU.

Run from the root of the repository, in this order; 2.3 GB of pictures are kept in the folder `--cache`::

    python data/models/train.py tiny-fast-vlm
    python data/models/train.py tiny-qwen2-vl --start data/models/tiny-fast-vlm

First the vision encoder learns to make each image token like the embeddings of the words for what stands in its cell;
captioning alone does not ground a model this small. Then the whole model learns to answer questions about pictures,
most of them "does this caption fit". Qwen2-VL's own decoder had not begun to look at the picture after 500 steps, so
that it starts from FastVLM's, which has the same shape.

Scene `i` of the training set is drawn from seed ``(10_000, i)`` and of the held-out check from ``(20_000, i)``. The
scenes that are probed use seeds below 1000: none of them is trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin, Qwen2Tokenizer
from transformers.utils import ModelOutput

from probekit.data.scene_shapes import SHAPES
from probekit.data.scenes import (
    COLOURS,
    SIZE,
    Scene,
    describe_thing,
    draw_scene,
    sample_scene,
    write_captions,
)

TRAIN_SEED, CHECK_SEED = 10_000, 20_000
N_SCENES, N_CHECK = 10_000, 100
STEPS = {"tiny-qwen2-vl": (300, 600), "tiny-fast-vlm": (350, 1500)}  # of the two phases
ENTAILS = "This image contains: {}.\nIs this right?"
PRESENT = "Is there {} in this image?"
DESCRIBE = "Describe this image."
TYPES = "This image contains the following types of object:"
ENGLISH = """
A man and a woman are standing on the street next to a bicycle. Two people sit at a table with plates of food and
glasses of wine. A young girl holding an umbrella walks in the rain. Several cows graze in a field near the water.
The kitchen has a white stove, a sink and wooden cabinets. A black and white photo of a train at the station.
A group of children playing baseball in the park. The person on a surfboard rides a big wave in the ocean. A close up
of a pizza with cheese on top of it. A brown dog laying down on the grass with a frisbee in its mouth. Some people
are skiing down a snow covered slope. A bathroom with a toilet and a mirror. An old bus parked in front of a large
building. A boy is riding his skateboard. A pink vase filled with small flowers sits by the window. A computer, a
keyboard and a mouse on a desk. Three zebras, four horses and five sheep stand behind the wooden fence. A gray bear
looks at the camera. He is wearing a hat and a shirt while talking on his phone. She has long hair and is sitting on
a bench under the trees. The plane flies over many mountains. There are no fruits, apples, oranges or bananas inside
this bowl. What is it? Which one do you see? How many are they? Where was that picture taken, and who took it? Yes,
I think so. It does not look like anything was made from these. Not all of them can be seen from here. Answer with yes
or no. Name the objects in the photo. Describe what you can see. chair couch bed television laptop book clock knife
fork spoon bottle truck motorcycle airplane traffic light stop sign elephant giraffe bird tennis racket kite snowboard
cake sandwich carrot broccoli donut refrigerator oven teddy suitcase backpack handbag tie scissors road city beach
night day sky cloud sun tower bridge room floor wall door side left right above below front back around between
through into out off about after before during for than then their her our your be been being have had will would
could should may more most other another each every both few little long high low new good great
"""


def make_tokenizer(special: list[str]) -> Qwen2Tokenizer:
    """Learn a byte-level BPE vocabulary from captions, prompts and everyday English; it can spell any other text."""
    rng = np.random.default_rng(TRAIN_SEED)
    texts = [" ".join(ENGLISH.split())] * 20 + [
        f"yes no {PRESENT} {DESCRIBE} {TYPES} system\nuser\nassistant\n"
    ] * 200
    for _ in range(1500):
        texts += [ENTAILS.format(said[:-1]) for said in write_captions(sample_scene(rng), rng)]
    base = Qwen2Tokenizer(eos_token="<|im_end|>")
    return base.train_new_from_iterator(
        texts, 1200, new_special_tokens=special, show_progress=False
    )


def chat_template(picture: str) -> str:
    """ChatML as Qwen writes it, but without a system message; `picture` is what stands for an image."""
    return (
        r"{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        r"{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        r"{% if part['type'] == 'image' %}{{ '"
        + picture
        + r"' }}{% else %}{{ part['text'] }}{% endif %}"
        r"{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def decoder(tokenizer: Qwen2Tokenizer, **rope: object) -> dict:
    """Settings of the Qwen2 decoder that both models have."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_qwen2_vl() -> tuple[transformers.Qwen2VLConfig, transformers.Qwen2VLProcessor]:
    """Qwen2-VL with 48 image tokens for a scene, more or less for pictures of another shape."""
    pads = {
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
    }
    tokenizer = make_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *pads.values()])
    size = {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 64 * 64,
        "max_pixels": 128 * 96,
    }
    template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    looks = (
        transformers.Qwen2VLImageProcessor(**size),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**size),
    )
    processor = transformers.Qwen2VLProcessor(*looks, template)
    vision = {
        "depth": 3,
        "embed_dim": 96,
        "hidden_size": 128,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.05,
    }
    config = transformers.Qwen2VLConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, rope_theta=100.0, mrope_section=[4, 6, 6]),
        tie_word_embeddings=True,
        **{f"{k}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in pads.items()},
    )
    return config, processor


def tiny_fast_vlm() -> tuple[transformers.FastVlmConfig, transformers.LlavaProcessor]:
    """FastVLM with a FastViT that makes 6x6 image tokens of a picture resized to a square."""
    tokenizer = make_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    side = {"height": 96, "width": 96}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template(r"<image>\n"),
    )
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "hidden_size": 256,
        "model_args": {
            "layers": [1, 1, 2, 2],
            "embed_dims": [32, 64, 128, 128],
            "mlp_ratios": [2] * 4,
            "token_mixers": [*["repmixer"] * 3, "attention"],
            "se_downsamples": [False] * 4,
            "downsamples": [False, True, True, False],  # 16 pixels a token
            "layer_scale_init_value": 0.1,  # timm's 1e-5 is for deep networks: shallow ones start too slowly with it
        },
    }
    config = transformers.FastVlmConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **decoder(tokenizer, rope_theta=100.0)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
        tie_word_embeddings=True,
    )
    return config, processor


def start_from(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Take over the decoder of a trained checkpoint, with the embeddings of the tokens that both vocabularies have."""
    given = transformers.AutoModelForImageTextToText.from_pretrained(
        folder
    ).model.language_model.state_dict()
    known, wanted = (
        reader.get_vocab()
        for reader in (
            transformers.AutoProcessor.from_pretrained(folder).tokenizer,
            processor.tokenizer,
        )
    )
    rows = model.get_input_embeddings().weight.detach().clone()
    for token in known.keys() & wanted.keys():
        rows[wanted[token]] = given["embed_tokens.weight"][known[token]]
    model.model.language_model.load_state_dict({**given, "embed_tokens.weight": rows})


def scene_of(seed: int, number: int) -> Scene:
    return sample_scene(np.random.default_rng([seed, number]))


def pictures(folder: Path) -> np.ndarray:
    """Draw the training scenes once; both models read the same file."""
    path = folder / f"scenes-{TRAIN_SEED}-{N_SCENES}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = np.lib.format.open_memmap(
            path.with_suffix(".part"), "w+", np.uint8, (N_SCENES, *SIZE[::-1], 3)
        )
        with ThreadPoolExecutor(2) as pool:  # Pillow lets go of the interpreter while it draws
            for i, picture in enumerate(
                pool.map(lambda i: draw_scene(scene_of(TRAIN_SEED, i)), range(N_SCENES))
            ):
                drawn[i] = np.asarray(picture)
        drawn.flush()
        path.with_suffix(".part").rename(path)
    return np.load(path, mmap_mode="c")


def cells(scene: Scene, rows: int, columns: int) -> np.ndarray:
    """Category and colour at the centre of each cell of a grid, `len(SHAPES)` and `len(COLOURS)` where nothing is."""
    y, x = np.meshgrid(
        (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij"
    )
    found = np.full((2, rows, columns), [[[len(SHAPES)]], [[len(COLOURS)]]])
    for thing in scene.things:
        inside = (
            np.maximum(abs(x * SIZE[0] - thing.x), abs(y * SIZE[1] - thing.y)) < 0.42 * thing.side
        )
        found[:, inside] = [
            [list(SHAPES).index(thing.category)],
            [list(COLOURS).index(thing.colour)],
        ]
    return found.reshape(2, -1)


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another colour or category for one thing, or mirrored, so that relations turn round."""
    kind, i = int(rng.integers(3)), int(rng.integers(len(scene.things)))
    things = list(scene.things)
    if kind == 2:
        axis, limit = (("x", SIZE[0]), ("y", SIZE[1]))[rng.integers(2)]
        things = [replace(t, **{axis: limit - getattr(t, axis)}) for t in things]
    else:
        field, values = (("colour", COLOURS), ("category", SHAPES))[kind]
        things[i] = replace(things[i], **{field: str(rng.choice(list(values)))})
    return replace(scene, things=tuple(things))


def nearly(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is false in one thing's colour or category, or in how two things stand to each other."""
    names = {describe_thing(t) for t in scene.things}
    while True:
        other, seed, which = altered(scene, rng), int(rng.integers(2**32)), int(rng.integers(5))
        right, wrong = (
            write_captions(s, np.random.default_rng(seed))[which] for s in (scene, other)
        )
        new = {describe_thing(t) for t in other.things} - names
        # without a thing that is not there, a mirrored caption may still be true of one of two equal things
        if any(n in wrong.lower() for n in new) or (
            not new and wrong != right and len(names) == len(scene.things)
        ):
            return wrong


def questions(
    scene: Scene, other: Scene, rng: np.random.Generator, check: bool = False
) -> list[tuple[str, str, str]]:
    """Questions about a scene as (kind, prompt, answer); `other` lends the captions that do not fit."""
    here = sorted({t.category for t in scene.things})
    said = [("true", c, "yes") for c in rng.permutation(write_captions(scene, rng))[:2]]
    said += [
        ("other", str(rng.choice(write_captions(other, rng))), "no"),
        ("hard", nearly(scene, rng), "no"),
    ]
    asked = [(kind, ENTAILS.format(c[:-1]), answer) for kind, c, answer in said]
    for pool, answer in ((here, "yes"), (sorted(set(SHAPES) - set(here)), "no")):
        asked.append(("present", PRESENT.format(f"a {rng.choice(pool)}"), answer))
    if check:
        return asked
    if rng.random() < 0.5:
        return [*asked, ("text", DESCRIBE, str(rng.choice(write_captions(scene, rng))))]
    listed = f"{TYPES} {', '.join(rng.permutation(list(SHAPES)))}" if rng.random() < 0.5 else TYPES
    return [*asked, ("text", listed, ", ".join(here))]


def chat(processor: ProcessorMixin, prompt: str) -> str:
    """The prompt after a picture, as the user's turn, up to where the answer starts."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


class Packer:
    """Lay a picture and several questions about it into one sequence, in which no question sees another one.

    The picture's tokens are then computed once, not once a question. Every question keeps the positions and the
    tokens that it has when it stands there alone.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        text = chat(processor, "?")
        alone = processor(
            text=[text], images=[draw_scene(scene_of(TRAIN_SEED, 0))], return_tensors="pt"
        )
        tail = len(processor.tokenizer(text[text.index("?") :]).input_ids)
        if "image_grid_thw" in alone:
            place = model.model.get_rope_index(
                alone.input_ids, alone.mm_token_type_ids, alone.image_grid_thw
            )[0][:, 0]
            self.grid = [int(n) // 2 for n in alone.image_grid_thw[0, 1:]]
        else:
            place = torch.arange(alone.input_ids.shape[1])[None]
            self.grid = [6, 6]
        self.head, self.place = alone.input_ids[0, :-tail].tolist(), place[:, :-tail]
        self.processor, self.start = processor, text[: text.index("?")]

    def __call__(self, asked: list[list[tuple[str, str, str]]]) -> dict[str, torch.Tensor]:
        """Tokens, positions, the mask of what sees what, and as labels the answers' tokens."""
        read = self.processor.tokenizer
        flat = [q for one in asked for q in one]
        prompts = iter(
            read([chat(self.processor, p).removeprefix(self.start) for _, p, _ in flat]).input_ids
        )
        answers = iter(read([f"{a}<|im_end|>" for _, _, a in flat]).input_ids)
        rows, first = [], int(self.place.max()) + 1
        for one in asked:
            ids, labels, owner, place = (
                list(self.head),
                [-100] * len(self.head),
                [0] * len(self.head),
                [self.place],
            )
            for k in range(len(one)):
                p, a = next(prompts), next(answers)
                ids += p + a
                labels += [-100] * (len(p) - 1) + a + [-100]
                owner += [k + 1] * len(p + a)
                place.append(torch.arange(first, first + len(p + a)).expand(len(self.place), -1))
            rows.append(
                (
                    torch.tensor(ids),
                    torch.tensor(labels),
                    torch.tensor(owner),
                    torch.cat(place, 1).T,
                )
            )
        ids, labels, owner, place = (
            torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=value)
            for column, value in zip(
                zip(*rows, strict=True), (read.pad_token_id, -100, -1, 0), strict=True
            )
        )
        sees = (owner[:, None] == owner[:, :, None]) | (owner[:, None] == 0)
        return {
            "ids": ids,
            "labels": labels,
            "place": place.permute(2, 0, 1),
            "sees": sees.tril()[:, None],
        }


class Trainer:
    """The two phases of training, and a small check on scenes that are not in the training set."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        shots: np.ndarray,
        seed: int,
        fixed: bool,
    ) -> None:
        self.model, self.processor, self.shots = model, processor, shots
        self.rng, self.pack = np.random.default_rng([TRAIN_SEED, seed]), Packer(model, processor)
        self.scenes = [scene_of(TRAIN_SEED, i) for i in range(len(shots))]
        self.cells = torch.tensor(np.stack([cells(s, *self.pack.grid) for s in self.scenes]))
        self.nothing, self.fixed = torch.nn.Linear(128, 2), fixed
        self.words = torch.tensor(
            [processor.tokenizer(f" {w}").input_ids for w in (*SHAPES, *COLOURS)]
        )[:, 0]
        self.yes, self.no = (processor.tokenizer(w).input_ids[0] for w in ("yes", "no"))
        held, rng = (
            [scene_of(CHECK_SEED, i) for i in range(N_CHECK)],
            np.random.default_rng(CHECK_SEED),
        )
        self.check_shots = [np.array(draw_scene(s)) for s in held]
        self.check_asked = [questions(s, held[i - 1], rng, check=True) for i, s in enumerate(held)]

    def features(self, shots: list[np.ndarray]) -> ModelOutput:
        images = [torch.from_numpy(s).permute(2, 0, 1) for s in shots]
        return self.model.model.get_image_features(
            **self.processor.image_processor(images, return_tensors="pt")
        )

    def logits(
        self, shots: list[np.ndarray], asked: list
    ) -> tuple[torch.Tensor, torch.Tensor, object]:
        """Logits where an answer's next token is due, those tokens, and the image features."""
        seen, packed = self.features(shots), self.pack(asked)
        place = packed["place"] if len(packed["place"]) == 3 else packed["place"][0]
        out = self.model.model(
            input_ids=packed["ids"],
            position_ids=place,
            use_cache=False,
            attention_mask={"full_attention": packed["sees"]},
            mm_encoder_outputs={"image": seen},
        )
        due = packed["labels"] != -100
        return self.model.lm_head(out.last_hidden_state[due]), packed["labels"][due], seen

    def cell_loss(self, seen: ModelOutput, chosen: np.ndarray) -> torch.Tensor:
        """How badly image tokens match the embeddings of the words for what stands in their cell."""
        tokens, names = (
            torch.stack(tuple(seen.pooler_output)),
            self.model.get_input_embeddings()(self.words),
        )
        names = (
            names.detach() if self.fixed else names
        )  # a trained decoder knows the words by these embeddings
        named = (8 * tokens @ names.T).split([len(SHAPES), len(COLOURS)], 2)
        empty, truth = self.nothing(tokens).split(1, 2), self.cells[chosen]
        guesses = [torch.cat(pair, 2).transpose(1, 2) for pair in zip(named, empty, strict=True)]
        return sum(F.cross_entropy(guess, truth[:, i]) for i, guess in enumerate(guesses))

    def text_loss(self, chosen: np.ndarray) -> torch.Tensor:
        others = self.rng.integers(len(self.scenes), size=len(chosen))
        asked = [
            questions(self.scenes[i], self.scenes[j], self.rng)
            for i, j in zip(chosen, others, strict=True)
        ]
        logits, truth, seen = self.logits([self.shots[i] for i in chosen], asked)
        loss, short = (
            F.cross_entropy(logits, truth, reduction="none"),
            (truth == self.yes) | (truth == self.no),
        )
        return loss[short].mean() + 0.4 * loss[~short].mean() + 0.3 * self.cell_loss(seen, chosen)

    def fit(self, steps: int, batch: int, text: bool, peak: float = 1.5e-3) -> None:
        """One cycle of AdamW on what stands in the cells (`text` false) or on the questions."""
        weights = [*self.model.parameters(), *self.nothing.parameters()]
        optimiser = torch.optim.AdamW(weights, lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, peak, total_steps=steps, pct_start=0.1
        )
        kept, start = [], time.perf_counter()
        for step in range(1, steps + 1):
            self.model.train()
            chosen = np.sort(self.rng.choice(len(self.scenes), batch, replace=False))
            loss = (
                self.text_loss(chosen)
                if text
                else self.cell_loss(self.features([self.shots[i] for i in chosen]), chosen)
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            cycle.step()
            kept.append(loss.item())
            if step % 100 == 0 or step in (10, 50):
                pace = (time.perf_counter() - start) / step * 1e3
                print(
                    f"{'text' if text else 'cells'} {step}: loss {np.mean(kept[-100:]):.3f}, {pace:.0f} ms a step",
                    self.check() if text and step >= 100 else "",
                    flush=True,
                )

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Share of right yes/no answers on held-out scenes, by kind of question."""
        self.model.eval()
        logits, truth, _ = self.logits(self.check_shots, self.check_asked)
        short = (truth == self.yes) | (truth == self.no)
        right = ((logits[:, self.yes] > logits[:, self.no]) == (truth == self.yes))[short]
        kinds = np.array([kind for one in self.check_asked for kind, _, _ in one])
        return {str(k): round(float(right.numpy()[kinds == k].mean()), 3) for k in np.unique(kinds)}


@torch.no_grad()
def zero_shot(folder: Path, n: int = 600) -> dict[str, float]:
    """Load a saved folder as anybody would, and let it answer on scenes that it has not seen."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    yes, no = (processor.tokenizer(word).input_ids[0] for word in ("yes", "no"))
    held, rng, right = (
        [scene_of(CHECK_SEED, i) for i in range(n)],
        np.random.default_rng(CHECK_SEED + 1),
        {},
    )
    for i, scene in enumerate(held):
        asked = questions(scene, held[i - 1], rng, check=True)[1:]
        inputs = processor(
            text=[chat(processor, p) for _, p, _ in asked],
            images=[[draw_scene(scene)]] * len(asked),
            padding=True,
            return_tensors="pt",
        )
        last = inputs.attention_mask.sum(1) - 1
        logits = model(**inputs).logits[torch.arange(len(asked)), last]
        for (kind, _, answer), said in zip(
            asked, (logits[:, yes] > logits[:, no]).tolist(), strict=True
        ):
            right.setdefault(kind, []).append(said == (answer == "yes"))
    share = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return {
        "scenes": n,
        "entailment": round((share["true"] + share["other"]) / 2, 4),
        "entailment_one_word_off": round(share["hard"], 4),
        "presence": round(share["present"], 4),
    }


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Store half-precision weights; the config asks for float32, in which they are computed with after loading."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if not all(v.isfinite().all() for v in state.values()):
        raise ValueError("a weight is not finite in float16")
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--steps", type=int, nargs=2, help="of the two phases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="folder of the checkpoint; next to this script unless given"
    )
    parser.add_argument("--start", type=Path, help="checkpoint whose trained decoder to begin with")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/training"), help="folder of the drawn pictures"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shots, start = pictures(args.cache), time.perf_counter()
    config, processor = tiny_qwen2_vl() if args.name == "tiny-qwen2-vl" else tiny_fast_vlm()
    model = transformers.AutoModelForImageTextToText.from_config(config)
    if args.start:
        start_from(args.start, model, processor)
    trainer = Trainer(model, processor, shots, args.seed, fixed=bool(args.start))
    steps = args.steps or STEPS[args.name]
    trainer.fit(steps[0], 32, text=False)
    trainer.fit(steps[1], 8, text=True)
    folder = args.out or Path(__file__).parent / args.name
    save(model.eval(), processor, folder)
    about = {
        "start": args.start and args.start.name,
        "steps": list(steps),
        "seed": args.seed,
        "seconds": round(time.perf_counter() - start),
        "parameters": model.num_parameters(),
        "unseen_scenes": zero_shot(folder),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, np)},
    }
    (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
