"""How many tokens a batch may have, and what becomes of one that does not fit the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tqdm.auto import tqdm

from probekit.models.batches import count_tokens
from probekit.models.devices import free_memory, is_out_of_memory
from probekit.models.processor import PreparedImage

Result = TypeVar("Result")
Images = Sequence[PreparedImage]


class TokenBudget:
    """Runs batches, and those that do not fit the memory in parts.

    Parameters
    ----------
    tokens : int
        Of a full batch.
    model, device : str
        For messages.
    fix : str
        For the message that a single prompt does not fit.
    """

    def __init__(self, tokens: int, *, model: str, device: str, fix: str) -> None:
        self._wanted = tokens
        self._model = model
        self._device = device
        self._fix = fix
        self._too_many = math.inf
        self._most_that_fitted = 0  # of batches with fewer tokens than were too many

    @property
    def tokens(self) -> int:
        """Of a full batch; after one did not fit, as many as the largest that did."""
        if self._too_many == math.inf:
            return self._wanted
        return min(self._wanted, self._most_that_fitted or math.ceil(self._too_many / 2))

    def run(
        self,
        prepared: Images,
        run_part: Callable[[Images], Result],
        *,
        way: str,
        join: Callable[[Result, Result, bool], Result],
    ) -> Result:
        """Run images with their prompts, in parts where they do not fit the memory.

        Parameters
        ----------
        prepared : sequence of PreparedImage
        run_part : callable
            Called with all of them, or with one part after the other.
        way : str
            Out of :data:`probekit.models.forward.WAYS`, on which the number of tokens depends.
        join : callable
            Puts together what `run_part` returned for two parts. Its third argument is False where
            both have the same image, with other prompts.

        Returns
        -------
        object
            What `run_part`, or `join`, returned.

        Raises
        ------
        MemoryError
            A single prompt with its image does not fit.
        """
        tokens = count_tokens(prepared, way)
        halves = _split_in_halves(prepared)
        if tokens < self._too_many or len(halves) < 2:
            try:
                result = run_part(prepared)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            else:
                self._most_that_fitted = max(self._most_that_fitted, tokens)
                return result
            free_memory()  # outside of the except: a traceback holds on to what did not fit
            if len(halves) < 2:
                raise MemoryError(
                    f"one prompt with its image, {tokens:,} tokens, does not fit the memory of "
                    f"{self._device}: {self._fix} ({reason})"
                )
            self._lower(tokens)
        first, second = [self.run(half, run_part, way=way, join=join) for half in halves]
        return join(first, second, len(prepared) > 1)

    def _lower(self, tokens: int) -> None:
        self._too_many = tokens
        if self._most_that_fitted >= tokens:
            self._most_that_fitted = 0
        tqdm.write(
            f"{self._model}: a batch of {tokens:,} tokens does not fit the memory of "
            f"{self._device}: it runs in halves, and batches have fewer from here on"
        )


def _split_in_halves(prepared: Images) -> list[Images]:
    """Split the images, or the prompts of the only one; one prompt stays as it is."""
    if len(prepared) > 1:
        middle = len(prepared) // 2
        return [prepared[:middle], prepared[middle:]]
    image = prepared[0]
    middle = len(image.tokens) // 2
    if middle == 0:
        return [prepared]
    first = replace(image, tokens=image.tokens[:middle], image_masks=image.image_masks[:middle])
    second = replace(image, tokens=image.tokens[middle:], image_masks=image.image_masks[middle:])
    return [[first], [second]]
