"""All that is on disk of a run, opened together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from probekit import paths
from probekit.images import load_rgb
from probekit.models.load import Vlm, load_vlm
from probekit.models.token_grid import TokenGrid
from probekit.probes import localisation
from probekit.probes.results import ProbeResults
from probekit.tasks import building
from probekit.tasks.base import TaskInfo, task_infos


def names() -> list[str]:
    """Runs that have probe results, the newest first."""
    found = (paths.Home.find().data / "probes").glob("*/results.json")
    return [file.parent.name for file in sorted(found, key=lambda file: -file.stat().st_mtime)]


@dataclass
class SavedRun:
    """A run with probe results.

    Attributes
    ----------
    examples, instances : see :mod:`probekit.tasks.building`
    results : see :class:`probekit.probes.results.ProbeResults`
    kept : the heat of its inspection set
    """

    name: str
    examples: pd.DataFrame
    results: ProbeResults
    kept: localisation.StoredHeat
    _live: dict[tuple[str, str], tuple[Vlm, TokenGrid]] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str) -> SavedRun:
        """
        Raises
        ------
        FileNotFoundError, ValueError
            A step of the run has not been done, or belongs to another examples table.
        """
        examples = building.load_examples(paths.Home.find().data / "tasks" / name)
        results = ProbeResults.read(paths.Home.find().data / "probes" / name, building.table_fingerprint(examples))
        return cls(name, examples, results, localisation.StoredHeat(results.heat))

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """Kind, classes and question by task."""
        return task_infos(self.examples)

    @cached_property
    def instances(self) -> pd.DataFrame:
        return building.load_instances(paths.Home.find().data / "tasks" / self.name)

    @cached_property
    def settings(self) -> dict[str, object]:
        """What the run was made with, by step."""
        build = paths.read_json(paths.Home.find().data / "tasks" / self.name / "build.json")["settings"]
        found = {f"data: {key}": value for key, value in build.items()}
        for one in self.results.stores:
            record, meta = one["record"], one["meta"]
            if record["control"] == "none":
                name = meta["model"] + " (untrained)" * meta["untrained"]
                own = meta["settings"] | {"device": meta["device"], "stages": record["stages"],
                                          "poolings": record["poolings"]}
                found[f"extraction: {name}"] = ", ".join(f"{key}={value}" for key, value in own.items())
                found[f"versions: {name}"] = ", ".join(f"{key} {value}" for key, value in meta["versions"].items())
        return found | {f"probes: {key}": value for key, value in self.results.stores[0]["settings"].items()}

    def write_tables(self, folder: Path) -> dict[str, str]:
        """Write the tables as CSV files, five digits a number, and what they come from; says what each file holds."""
        about = {"metrics": "a row a model, stage, layer, pooling, task, probe, control, split, metric, class and seed",
                 "losses": "a row a probe trained with Adam, epoch and split",
                 "transfer": "the score of each layer's probe on the states of each layer"}
        folder.mkdir(parents=True, exist_ok=True)
        for name in about:
            paths.write_atomic(folder / f"{name}.csv", lambda part, name=name: getattr(self.results, name).to_csv(
                part, index=False, float_format=lambda v: f"{v:.5g}" if abs(v) < 1e5 else f"{v:.0f}"))
        made = {one["fingerprint"]: {key: one[key] for key in ("record", "meta", "settings", "versions")}
                for one in self.results.stores}
        paths.write_json(folder / "settings.json", made)
        files = {f"{name}.csv": text for name, text in about.items()}
        return files | {"settings.json": "what the tables' column settings stands for, and versions of libraries"}

    def tests(self, task: str) -> pd.DataFrame:
        """The test examples of a task, in the order of its predictions."""
        rows = self.examples[(self.examples.task == task) & (self.examples.split == "test")]
        return rows.reset_index(drop=True)

    def boxes(self, image_id: int, category: str) -> np.ndarray:
        """(b, 4) left, top, right, bottom of an image's instances of a category, in shares of its size."""
        own = self._by_image.get(image_id, self.instances[:0])
        return localisation.boxes_of(own[(own.category == category) & (own.iscrowd == 0)])

    def shown(self, image_id: int) -> list[str]:
        """The categories that an image has instances of."""
        return sorted(set(self._by_image.get(image_id, self.instances[:0]).category))

    @cached_property
    def _by_image(self) -> dict[int, pd.DataFrame]:
        tests = set(self.examples.image_id[self.examples.split == "test"])
        return dict([*self.instances[self.instances.image_id.isin(tests)].groupby("image_id")])

    def heat(self, key: str, row: pd.Series, live: bool = True) -> localisation.HeatMap | None:
        """What the probes of ``"<model>|<control>|<pooling>|<task>"`` say of each image token of a test example.

        Stored heat is read; else, if `live`, the model runs once, over this example alone; it is loaded at the first.

        Raises
        ------
        NoGrid
            It is not known where in the image the model's tokens lie.
        """
        found = self.kept.get(key, row.image_id)
        if found is not None or not live:
            return found
        model, control, *_ = key.split("|")
        if (model, control) not in self._live:
            for vlm, _ in self._live.values():
                vlm.release()
            self._live = {}
            vlm = self._load(model, control)
            localisation.check(vlm, [load_rgb(paths.Home.find().resolve(file)) for file in self._some_files], row.prompt)
            self._live[model, control] = vlm, TokenGrid(vlm)
        vlm, grid = self._live[model, control]
        image = load_rgb(paths.Home.find().resolve(row.file), self._meta(model, control)["longest_side"])
        prepared = vlm.prompt_processor.prepare(image, [row.prompt])
        found, = localisation.heat(vlm, [prepared], self.results.probes(key), [grid(prepared, image.size)])
        return found

    def _meta(self, model: str, control: str) -> dict:
        """Settings of a model's extraction."""
        return next(one["meta"]["settings"] for one in self.results.stores if one["record"]["control"] == "none"
                    and (one["meta"]["model"], one["meta"]["untrained"]) == (model, control == "untrained"))

    def _load(self, model: str, control: str) -> Vlm:
        told = self._meta(model, control)
        return load_vlm(told["model"], told["revision"], told["dtype"], None, told["untrained"], told["seed"],
                        told["trust_remote_code"])

    @cached_property
    def _some_files(self) -> list[str]:
        return self.examples.file[self.examples.split == "test"].unique()[: localisation.CHECKED].tolist()
