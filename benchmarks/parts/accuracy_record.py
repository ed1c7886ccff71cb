"""What `time_accuracy.py` predicts, and how well, from what its hosts left in a folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from galvatron_jax.cost import OptimizerMemory, price_plan
from galvatron_jax.spec.cluster import ClusterSpec
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.plan import Plan
from galvatron_jax.spec.profile import CollectiveTiming, LayerTiming, Profile, Timing

SEARCHED = "searched for "
ROUNDS = 3
"""In which all plans take their turn."""


def file_name(name: str) -> str:
    """A name without what files cannot have in theirs."""
    return name.replace("/", "-").replace(",", "")


@dataclass(frozen=True)
class Bench:
    """A model's folder."""

    folder: Path
    links: tuple[str, ...]
    every_plan: Callable[[ModelSpec], Mapping[str, Plan]]
    """All plans by name that may be asked for."""

    @property
    def profiled(self) -> bool:
        return all((self.folder / f"searched {file_name(link)}.json").exists() for link in self.links)

    @property
    def model(self) -> ModelSpec:
        return ModelSpec.load(self.folder / "model.json")

    def wanted(self, names: Sequence[str] | None) -> dict[str, Plan]:
        """Plans by name: those asked for, and those that the search found."""
        every = self.every_plan(self.model)
        chosen = {name: every[name] for name in names} if names is not None else dict(every)
        for link in self.links:
            plan = Plan.load(self.folder / f"searched {file_name(link)}.json")
            chosen[SEARCHED + link] = plan.model_copy(update={"prediction": None})
        return chosen

    def missing(self, names: Sequence[str] | None) -> dict[str, Plan]:
        """Those that lack rounds; of equal ones one."""
        wanted, seen = self.wanted(names), set()
        found = {}
        for name, plan in wanted.items():
            record = self._measured_as(wanted, name)
            if (record is None or record["rounds"] < ROUNDS) and _sort(plan) not in seen:
                found[name] = plan
                seen.add(_sort(plan))
        return found

    def done(self, names: Sequence[str] | None) -> int:
        """Rounds that every plan has which lacks some."""
        wanted = self.wanted(names)
        records = [self._measured_as(wanted, name) for name in self.missing(names)]
        return min((record["rounds"] if record else 0 for record in records), default=ROUNDS)

    def profile(self, link: str) -> Profile:
        """Of all rounds."""
        pattern = f"profile {file_name(link)} *.json"
        return quietest([Profile.load(path) for path in sorted(self.folder.glob(pattern))])

    def _measured_as(self, wanted: dict[str, Plan], name: str) -> dict[str, Any] | None:
        """The record of a plan, or of an equal one."""
        for other in (name, *(n for n, plan in wanted.items() if _sort(plan) == _sort(wanted[name]))):
            path = self.folder / f"measured {file_name(other)}.json"
            if path.exists():
                record = json.loads(path.read_text())
                if _sort(Plan.model_validate(record["plan"])) == _sort(wanted[name]):
                    return record
        return None

    def rows(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Predicted and measured seconds of every plan on every link."""
        model, wanted = self.model, self.wanted(names)
        optimizer = OptimizerMemory(**_slots(self.folder / "optimizer.json"))
        found = []
        for link in self.links:
            cluster = ClusterSpec.load(self.folder / f"cluster {file_name(link)}.json")
            profile = self.profile(link)
            for name, plan in wanted.items():
                record = self._measured_as(wanted, name)
                if record is None or (name.startswith(SEARCHED) and name != SEARCHED + link):
                    continue
                time = price_plan(model, plan, cluster=cluster, profile=profile, optimizer=optimizer).time
                seconds = record["seconds"][link]
                measured = min(seconds)
                found.append(
                    {
                        "model": model.name,
                        "link": link,
                        "plan": name,
                        "measured_s": round(measured, 5),
                        "measured_median_s": round(statistics.median(seconds), 5),
                        "measured_most_s": round(max(seconds), 5),
                        "predicted_s": round(time.step_s, 5),
                        "error": round(time.step_s / measured - 1.0, 4),
                        "parts_s": {key: round(value, 5) for key, value in time.model_dump().items()},
                    }
                )
        return found


def quietest(profiles: Sequence[Profile]) -> Profile:
    """One profile of several: the least that a layer took, as of steps; of a collective, one of many, the median."""

    def least(found: Sequence[Timing]) -> Timing:
        return Timing(median_s=min(each.median_s if each.least_s is None else each.least_s for each in found))

    def middle(found: Sequence[Timing]) -> Timing:
        return Timing(median_s=statistics.median(each.median_s for each in found))

    layers: dict[tuple, list[LayerTiming]] = {}
    collectives: dict[tuple, list[CollectiveTiming]] = {}
    for profile in profiles:
        for layer in profile.layers:
            layers.setdefault((layer.kind, layer.shape, layer.remat), []).append(layer)
        for each in profile.collectives:
            collectives.setdefault((each.kind, each.axis_size, each.level, each.bytes), []).append(each)
    quiet_layers = [
        own[0].model_copy(update={key: least([getattr(each, key) for each in own]) for key in ("forward", "backward")})
        for own in layers.values()
    ]
    quiet_collectives = [
        own[0].model_copy(update={"timing": middle([each.timing for each in own])}) for own in collectives.values()
    ]
    return profiles[0].model_copy(update={"layers": tuple(quiet_layers), "collectives": tuple(quiet_collectives)})


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and link: errors, rank correlation, and how far the searched plan is from the fastest."""
    found = []
    for model, link in dict.fromkeys((row["model"], row["link"]) for row in rows):
        own = [row for row in rows if (row["model"], row["link"]) == (model, link)]
        listed = [row for row in own if not row["plan"].startswith(SEARCHED)]
        searched = next(row for row in own if row["plan"].startswith(SEARCHED))
        fastest = min(own, key=lambda row: row["measured_s"])
        predicted, measured = ([row[key] for row in listed] for key in ("predicted_s", "measured_s"))
        found.append(
            {
                "model": model,
                "link": link,
                "plans": len(listed),
                "mean_absolute_error": round(statistics.mean(abs(row["error"]) for row in listed), 4),
                "worst_error": max((row["error"] for row in listed), key=abs),
                "spearman": round(float(spearmanr(predicted, measured).statistic), 4),
                "fastest_measured": fastest["plan"],
                "searched_over_fastest": round(searched["measured_s"] / fastest["measured_s"] - 1.0, 4),
            }
        )
    return found


def _sort(plan: Plan) -> str:
    """A plan without what does not run, as text."""
    without = {"prediction": None, "model": "", "model_fingerprint": None, "software": {}}
    return plan.model_copy(update=without).model_dump_json()


def _slots(path: Path) -> dict[str, Any]:
    read = json.loads(path.read_text())
    return {"param_like_slots": tuple(read["slots"]), "scalar_bytes": read["scalar_bytes"]}
