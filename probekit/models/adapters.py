"""Models that transformers does not have: classes of a file or of an installed module.

They are found by name, hashed, and made. They are code, and run only when they are named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from probekit import paths
from probekit.models.processor import PreparedImage
from probekit.models.protocol import NEEDED, SWITCHED_OFF

GROUP = "probekit.models"
FILE_AND_CLASS = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")


# The hash of each installed module's code as it was imported: Python imports it once.
_IMPORTED: dict[str, str] = {}


@dataclass(frozen=True)
class AdapterSource:
    """Where the class of an adapter is.

    Attributes
    ----------
    name : str
        What the model is called in tables: the name of the class.
    file : Path
        Its code.
    code : bytes
        What the file says: of a file this is run, and hashed.
    entry_point : EntryPoint or None
        Of an installed module; None for a file.
    """

    name: str
    file: Path
    code: bytes = field(repr=False)
    entry_point: EntryPoint | None = None

    def hash_code(self) -> str:
        """Return the hash of the code that runs; of what it imports, nothing is hashed.

        Of an entry point these are the file of the module that it names, and the file that the
        class is written in.

        Raises
        ------
        ValueError
            An installed module has changed since it was imported.
        """
        if self.entry_point is None:
            return _hash(self.code)
        now = self._hash_installed(self.entry_point.load())
        if _IMPORTED.setdefault(self.entry_point.value, now) != now:
            raise ValueError(
                f"the code of {self.entry_point.value} has changed since it was imported, and the "
                "old one would run: restart the kernel"
            )
        return now

    def _hash_installed(self, made_of: Any) -> str:
        try:
            written_in = inspect.getsourcefile(made_of)
        except (OSError, TypeError):  # it is compiled
            written_in = None
        if written_in is None or Path(written_in).resolve() == self.file.resolve():
            return _hash(self.code)
        return _hash(self.code, Path(written_in).read_bytes())

    def check_revision(self, revision: str | None) -> str:
        """Return the hash of the code.

        Parameters
        ----------
        revision : str or None
            The hash that it must have; None allows any.

        Raises
        ------
        ValueError
            It is another one.
        """
        code_hash = self.hash_code()
        if revision is not None and revision != code_hash:
            raise ValueError(
                f"{self.file} is not the code that was asked for: its hash is {code_hash}, not "
                f"{revision}; run 02_extract again with the code as it is now, or bring the other "
                "back"
            )
        return code_hash

    def load_class(self) -> Any:
        """Run the file, and return the class.

        Raises
        ------
        ValueError
            It has no class of that name, or an installed module has changed since it was imported.
        """
        if self.entry_point is not None:
            self.hash_code()
            return self.entry_point.load()
        module_name = f"probekit_adapter_{self.file.stem}_{_hash(bytes(self.file), self.code)[5:]}"
        module = sys.modules.get(module_name)
        if module is None:
            specification = importlib.util.spec_from_file_location(module_name, self.file)
            if specification is None:
                raise ValueError(f"{self.file} cannot be loaded as Python")
            module = importlib.util.module_from_spec(specification)
            sys.modules[module_name] = module  # dataclasses look their module up there
            try:
                # Not by the loader: it may take compiled code of an earlier state of the file.
                program = compile(self.code, str(self.file), "exec", dont_inherit=True)
                exec(program, vars(module))
            except BaseException:
                del sys.modules[module_name]
                raise
        if not hasattr(module, self.name):
            classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
            raise ValueError(
                f"{self.file} has no class {self.name}: it has {', '.join(sorted(classes))}"
            )
        return getattr(module, self.name)

    def weight_files(self) -> list[Path]:
        """List the files that the class says it loads (`weights`), for their hash.

        Raises
        ------
        FileNotFoundError
            One of them is not there.
        """
        weights = getattr(self.load_class(), "weights", ())
        named = [weights] if isinstance(weights, (str, Path)) else weights
        files: list[Path] = []
        for one in named:
            path = (self.file.parent / Path(one).expanduser()).resolve()
            if not path.exists():
                raise FileNotFoundError(f"{path}, of the weights of {self.name}, is not there")
            inside = path.rglob("*") if path.is_dir() else [path]
            files += sorted(file for file in inside if file.is_file())
        return files

    def make(self, *, untrained: bool, seed: int) -> Any:
        """Make the adapter.

        Parameters
        ----------
        untrained : bool
            Take random weights, as a control.
        seed : int
            Of what it draws at random.

        Raises
        ------
        ValueError
            It lacks something, or cannot be untrained.
        """
        made_of = self.load_class()
        arguments = inspect.signature(made_of).parameters
        if untrained and "untrained" not in arguments:
            raise ValueError(
                f"untrained: {self.name} has no argument of that name, so it is not known how it "
                "takes random weights: add untrained=False to its __init__, or leave it out of "
                "untrained"
            )
        options = {"untrained": untrained, "seed": seed}
        options = {name: value for name, value in options.items() if name in arguments}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = made_of(**options)
        missing = [name for name in NEEDED if getattr(adapter, name, None) is None]
        if missing:
            raise ValueError(
                f"{self.name} of {self.file} lacks {', '.join(missing)}: docs/models.md, "
                '"Your own VLM", says what a model needs'
            )
        if not getattr(adapter, "width", None):
            adapter.width = _find_width(adapter, self.name)
        return adapter


def find_adapter(model: str, home: str | Path | paths.Home | None = None) -> AdapterSource | None:
    """Find the class that a name stands for; None where it stands for something else.

    Parameters
    ----------
    model : str
        ``file.py:Class`` (a relative file starts at the home), or the name of an entry point of the
        group ``probekit.models``.
    home : str, Path or Home, optional
        See :meth:`probekit.paths.Home.find`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        An entry point has the name of something else.
    """
    home = paths.Home.find(home)
    named = FILE_AND_CLASS.fullmatch(model)
    if named is None:
        return _find_installed(model, home)
    file = home.resolve(named["file"])
    if not file.is_file():
        here = Path(named["file"]).expanduser().resolve()
        fix = f"name it from there, or whole: {here}:{named['name']}"
        raise FileNotFoundError(
            f"there is no file {file}: a relative path starts at the home, {home.root}; "
            + (
                fix
                if here.is_file()
                else f"{model} is to be a file with a class that reads a model"
            )
        )
    return AdapterSource(named["name"], file, file.read_bytes())


def _find_installed(model: str, home: paths.Home) -> AdapterSource | None:
    for entry_point in entry_points(group=GROUP):
        if entry_point.name != model:
            continue
        other = _find_namesake(model, home)
        if other:
            raise ValueError(
                f"two things are called {model}: {other}, and the entry point {entry_point.value} "
                "of an installed package. Uninstall that, or give its entry point another name"
            )
        specification = importlib.util.find_spec(entry_point.module)
        if specification is None or specification.origin is None:
            raise FileNotFoundError(
                f"the entry point {model} names {entry_point.module}, which is not installed"
            )
        file = Path(specification.origin)
        return AdapterSource(model, file, file.read_bytes(), entry_point)
    return None


def _find_namesake(model: str, home: paths.Home) -> str:
    """Say what else an entry point's name stands for; "" where that is nothing."""
    from probekit.models.presets import PRESETS  # which find adapters here

    if model in PRESETS:
        return "a preset"
    if (home.resolve(model) / "config.json").exists():
        return f"the checkpoint folder {home.resolve(model)}"
    return "an id on the Hugging Face hub" if "/" in model else ""


def _hash(*parts: bytes) -> str:
    return f"code-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"


def _find_width(adapter: Any, name: str) -> int:
    """Return d, as the weights after the last block show it."""
    embedding = getattr(adapter, "output_embedding", None)
    if embedding is not None:
        return int(embedding.weight.shape[1])
    widths = {len(one) for one in adapter.final_norm.parameters() if one.ndim == 1}
    if len(widths) != 1:
        raise ValueError(
            f"{name}: neither its final norm nor an output embedding shows how wide its hidden "
            "states are: set width"
        )
    return widths.pop()


def switched_off(adapter: Any) -> dict[str, str]:
    """Return what an adapter leaves out, and what cannot be done for that."""
    return {
        name: what
        for name, what in SWITCHED_OFF.items()
        if getattr(adapter, name, None) is None
        and not (name == "image_features" and getattr(adapter, "has_projector", False))
    }


@dataclass(frozen=True)
class AdapterPrompts:
    """Has an adapter prepare images and prompts, and checks what it makes of them.

    Attributes
    ----------
    name : str
        Of the model, for messages.
    adapter : object
    """

    name: str
    adapter: Any

    @property
    def runs_model(self) -> bool:
        """Whether the model runs in it, so that worker processes cannot do it."""
        return bool(getattr(self.adapter, "prepares_with_model", False))

    def describe_format(self) -> str | None:
        """Return nothing: what the model is given is the adapter's affair."""
        return None

    def wrap(self, prompt: str, *, with_image: bool = True) -> str:
        """Return the text around a prompt as the adapter states it, for people to read."""
        return getattr(self.adapter, "prompt_format", "{prompt}").replace("{prompt}", prompt)

    def prepare(self, image: Image.Image | None, prompts: Sequence[str]) -> PreparedImage:
        """Prepare one image with k prompts.

        Raises
        ------
        ValueError
            What the adapter makes of them cannot be read; the message says why.
        """
        with torch.inference_mode():
            prepared = self.adapter.prepare(image, list(prompts))
        if not isinstance(prepared, PreparedImage):
            raise ValueError(
                f"{self.name}.prepare returns a {type(prepared).__name__}: return a PreparedImage, "
                "as PreparedImage.of_ids makes it"
            )
        if not len(prepared.tokens) == len(prepared.image_masks) == len(prompts):
            raise ValueError(
                f"{self.name}.prepare makes {len(prepared.tokens)} rows of tokens and "
                f"{len(prepared.image_masks)} image masks of {len(prompts)} prompts"
            )
        for row, mask in zip(prepared.tokens, prepared.image_masks, strict=True):
            if "input_ids" not in row or row["input_ids"].shape != mask.shape:
                raise ValueError(
                    f"{self.name}.prepare: each prompt needs input_ids (t,) and an image mask of "
                    "the same shape"
                )
        self._check_image(prepared, image is not None)
        inputs = {name: value.detach() for name, value in prepared.image_inputs.items()}
        return replace(prepared, image_inputs=inputs)

    def _check_image(self, prepared: PreparedImage, has_image: bool) -> None:
        counts = sorted({int(mask.sum()) for mask in prepared.image_masks})
        if not has_image:
            if prepared.image_inputs or counts != [0]:
                raise ValueError(
                    f"{self.name}.prepare marks image tokens, or makes image inputs, where there "
                    "is no image (None)"
                )
            return
        if not prepared.image_inputs:
            raise ValueError(f"{self.name}.prepare makes no image inputs of an image")
        if len(counts) > 1:
            raise ValueError(
                f"{self.name}.prepare marks {counts[0]} to {counts[-1]} image tokens for the same "
                "image, depending on the prompt"
            )
        if counts == [0]:
            raise ValueError(f"{self.name}.prepare marks no image token")

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, or as numbers where the adapter has no tokenizer."""
        tokenizer = getattr(self.adapter, "tokenizer", None)
        return tokenizer.decode(list(ids)) if tokenizer else " ".join(map(str, ids))
