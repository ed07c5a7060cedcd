"""The grid: every published run, declared in grid.yaml, and what of it is to be done on this machine.

    python workflow/grid.py         # every job: its state, its minutes, and the command, which needs no workflow

A group of jobs in grid.yaml has

    chapter         the chapter; "performance" is run by `python -m benchmarks`
    parameters      those of the chapter; lists are combined, the last of them changes fastest, and a mapping has a
                    value for each value of the list that has its keys
    needs           data sets, such as mvtec/bottle, with parameters in braces
    after           groups that it waits for: their jobs that have the same values of the parameters named
    chained         whether each of its jobs waits for the one before it
    cores, memory   of a job; memory in MB
    minutes         of a job on a CPU; without them it is for GPUs alone
    gpu_minutes     of a job on a GPU; without them it is for CPUs alone
    minimum         values of parameters: which of its jobs have to be done; {} for all
    rehearsed       likewise: which of them a rehearsal runs, with a share of their epochs or steps

Jobs of the minimum come first, otherwise all are in the order of the file. A run that several jobs would store is the
first one's. A job is done when all its runs are stored, by today's protocols, of the data at hand, at the whole budget.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml

from expvae_book import chapters, data, names, runs, sprite_grid
from expvae_book.data import catalogue

GRID = Path(__file__).with_name("grid.yaml")
STORED, TOGETHER = "stored", "all side by side"
MEASURING = 8  # minutes that a job takes at least


@dataclass(frozen=True)
class Job:
    """One command, and what it stores.

    Attributes:
        name: Its group, and the parameters by which the group's jobs differ.
        group: Its group.
        chapter: The chapter.
        parameters: What the chapter is given.
        stored: Parameters of the runs that it stores, as the store has them, but for those of jobs before it.
        needs: Data sets.
        after: Names of jobs that come before it.
        cores: How many it takes.
        memory: In MB.
        minutes: On a CPU, as declared; None where it is for GPUs alone.
        gpu_minutes: On a GPU, as declared; None where it is for CPUs alone.
        minimum: Whether it has to be done.
    """

    name: str
    group: str
    chapter: str
    parameters: Mapping[str, Any]
    stored: tuple[Mapping[str, Any], ...]
    needs: tuple[str, ...]
    after: tuple[str, ...]
    cores: int
    memory: int
    minutes: float | None
    gpu_minutes: float | None
    minimum: bool

    @property
    def rule(self) -> str:
        """Its name as that of a rule."""
        return re.sub(r"\W+", "_", self.name)

    def command(self, output: str = "out.ipynb") -> list[str]:
        """Its command; output is the notebook that papermill writes."""
        if self.chapter == "performance":
            return ["python", "-m", "benchmarks", self.parameters["benchmark"], "--data", self.parameters["data"]]
        options = [word for name, value in self.parameters.items() for word in ("-p", name, str(value))]
        return ["papermill", f"book/{self.chapter}.md", output, *options]

    def declared(self, gpu: bool) -> float | None:
        """Its minutes as declared, on a GPU or on a CPU."""
        return self.gpu_minutes if gpu else self.minutes


@dataclass(frozen=True)
class Planned:
    """A job on this machine.

    Attributes:
        job: The job.
        state: "stored", or why it is to be done: "missing", "outdated", "incomplete" or "of other data".
        minutes: How long it will take; 0 where it cannot run here.
        lacks: What it cannot run here without.
    """

    job: Job
    state: str
    minutes: float
    lacks: tuple[str, ...]

    @property
    def due(self) -> bool:
        """Whether it is to be done, and can be."""
        return self.state != STORED and not self.lacks


def read(path: Path = GRID, scale: float | None = None) -> list[Job]:
    """All jobs in order of worth, those of the minimum first.

    Args:
        path: Where they are declared.
        scale: For a rehearsal: those jobs that are rehearsed, with this share of their epochs or steps, and at least 1.

    Raises:
        ValueError: If a group is not declared as it has to be.
    """
    jobs = []
    for name, group in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        try:
            jobs += _jobs(name, group, jobs, scale)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path.name}: the group {name} is not declared as workflow/grid.py says: {error!r}"
            ) from None
    jobs.sort(key=lambda job: not job.minimum)
    taken, owned = [], []
    for job in jobs:
        owned.append(replace(job, stored=tuple(one for one in job.stored if one not in taken)))
        taken += job.stored
    return owned


def _jobs(name: str, group: Mapping[str, Any], before: Sequence[Job], scale: float | None) -> list[Job]:
    lists = {key: value for key, value in group["parameters"].items() if isinstance(value, list)}
    waits, made = group.get("after", {}), []
    for values in product(*lists.values()):
        varying = dict(zip(lists, values, strict=True))
        parameters = {key: varying.get(key, _one_of(value, values)) for key, value in group["parameters"].items()}
        if scale is not None and not _selected(group.get("rehearsed"), parameters):
            continue
        after = [
            job.name
            for job in before
            if job.group in waits and all(job.parameters[key] == parameters[key] for key in waits[job.group])
        ]
        minutes = [_one_of(group.get(key), values) for key in ("minutes", "gpu_minutes")]
        budget = [key for key in ("epochs", "steps") if key in parameters]
        if scale is not None and budget:
            parameters |= {key: max(1, round(parameters[key] * scale)) for key in budget}
            minutes = [value and max(value * scale, MEASURING) for value in minutes]
        made.append(
            Job(
                ",".join([name, *(f"{key}={value}" for key, value in varying.items())]),
                name,
                group["chapter"],
                parameters,
                tuple(records(group["chapter"], parameters)),
                tuple(need.format(**parameters) for need in group["needs"]),
                tuple(after + ([made[-1].name] if group.get("chained") and made else [])),
                group.get("cores", 1),
                group["memory"],
                *minutes,
                _selected(group.get("minimum"), parameters),
            )
        )
    return made


def _one_of(value: Any, values: Iterable[Any]) -> Any:
    return next(value[key] for key in values if key in value) if isinstance(value, dict) else value


def _selected(selection: Mapping[str, list] | None, parameters: Mapping[str, Any]) -> bool:
    return selection is not None and all(parameters[key] in values for key, values in selection.items())


def records(chapter: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of the runs that a chapter stores when it is given these, which have to name each one in them."""
    rest = dict(parameters)
    if chapter == "disentanglement":
        shared = {name: rest[name] for name in ("steps", "recipe", "stride", "data")}
        choices = {"attention": rest["attention"], "layer": "variant", "alpha": "variant", "pairs": "variant"}
        return sprite_grid.grid(rest["gammas"], rest["lambdas"], rest.get("betas", ""), rest["seeds"], shared, choices)
    if chapter == "ablations":
        rest |= {"dataset": "mnist", "images": rest.pop("digits"), "trained": "briefly"}
        return [rest | {"model": digit} for digit in names.ABLATED]
    if chapter == "mvtec15":
        rest["category"] = rest.pop("categories")
    return [rest]


def command_here(job: Job, output: str) -> list[str]:
    """The command of a job in this environment, whatever the shell finds under its name."""
    program, *options = job.command(output)
    return [sys.executable, *(options if program == "python" else ["-m", program, "--no-progress-bar", *options])]


# What is there -------------------------------------------------------------------------------------------------------


def state(chapter: str, parameters: Mapping[str, Any]) -> str:
    """What is stored of a run: "stored" where it need not be made again."""
    run = runs.load(chapter, parameters)
    if run is None:
        return "missing"
    if run.outdated:
        return "outdated"
    if not chapters.whole(run):
        return "incomplete"
    return STORED if run.of_data_at_hand else "of other data"


def taken(job: Job, gpu: bool) -> float | None:
    """The minutes that a job took by its stored runs; None where not all are there, of today and of such a device."""
    found = [runs.load(job.chapter, one) for one in job.stored]
    if not found or not all(run and not run.outdated and chapters.whole(run) for run in found):
        return None
    if any(run.record["device"].startswith("cuda") != gpu for run in found):
        return None
    seconds = {}
    for place, run in enumerate(found):
        for name, value in run.record["seconds"].items():
            # Of models that were trained side by side, each one's record has the time of all.
            seconds[name, value if name.endswith(TOGETHER) else place] = value
    return sum(seconds.values()) / 60


def plan(jobs: Sequence[Job], root: Path | None = None, gpu: bool = False) -> list[Planned]:
    """What is to be done of the jobs.

    A job's minutes are those declared, times what the stored jobs of its group took over what was declared of them.

    Args:
        jobs: All jobs.
        root: Data root; by default `expvae_book.data.root()`.
        gpu: Whether they are to run on a GPU.
    """
    there, ratios = _there(root or data.root()), {}
    for group in {job.group for job in jobs}:
        known = [(minutes, job.declared(gpu)) for job in jobs if job.group == group and (minutes := taken(job, gpu))]
        known = [pair for pair in known if pair[1]]
        ratios[group] = sum(pair[0] for pair in known) / sum(pair[1] for pair in known) if known else 1.0
    planned = []
    for job in jobs:
        states = [found for one in job.stored if (found := state(job.chapter, one)) != STORED]
        declared = job.declared(gpu)
        lacks = [need for need in job.needs if not there(need)]
        lacks += [] if declared else ["a CPU" if gpu else "a GPU"]
        minutes = 0.0 if lacks else declared * ratios[job.group]
        planned.append(Planned(job, states[0] if states else STORED, minutes, tuple(lacks)))
    return planned


def _there(root: Path):
    # Torchvision downloads ImageNet's weights where their file does not lie below the root.
    return cache(lambda need: need == "imagenet" or catalogue.is_at_hand(catalogue.source(need), root))


def sizes(needs: Iterable[str], root: Path) -> dict[str, float]:
    """MiB of each data set as it lies below the root."""
    found = {}
    for need in set(needs):
        path = root / (catalogue.IMAGENET_FILE if need == "imagenet" else catalogue.source(need).folder)
        files = [path] if path.is_file() else path.rglob("*")
        found[need] = sum(file.stat().st_size for file in files if file.is_file()) / 2**20
    return found


# What fits -----------------------------------------------------------------------------------------------------------


def pack(
    planned: Sequence[Planned], minutes: float, mib: float, sizes: Mapping[str, float], lanes: int
) -> list[Planned]:
    """The jobs that end within a time, side by side, and whose data can be uploaded; the worthier first.

    Each due job goes where it can start first, after those that it waits for, unless it would end too late or its data,
    together with those of the jobs taken, would be too much; then it is left out, and those that wait for it too.

    Args:
        planned: Jobs in order of worth.
        minutes: The time.
        mib: MiB of data that can be uploaded.
        sizes: MiB of each data set.
        lanes: How many jobs run side by side.
    """
    free, ends, carried, chosen = [0.0] * lanes, {}, set(), []
    left = {one.job.name for one in planned if one.due}
    for one in planned:
        needs = carried | set(one.job.needs)
        start = max([min(free), *(ends.get(name, 0.0) for name in one.job.after)])
        waits = left.intersection(one.job.after)
        if not one.due or waits or start + one.minutes > minutes or sum(sizes[need] for need in needs) > mib:
            continue
        ends[one.job.name] = free[free.index(min(free))] = start + one.minutes
        left.discard(one.job.name)
        carried = needs
        chosen.append(one)
    return chosen


# What is said --------------------------------------------------------------------------------------------------------


def hours(planned: Iterable[Planned], gpu: bool) -> str:
    """How long jobs take one after the other on a GPU, or on one core, as text."""
    return f"{sum(one.minutes * (1 if gpu else one.job.cores) for one in planned) / 60:.1f} h"


def report(planned: Sequence[Planned], chosen: Sequence[Planned], gpu: bool = False, commands: bool = False) -> str:
    """What is to be done, what is left out, and how long it takes.

    Args:
        planned: All jobs.
        chosen: Those that are run.
        gpu: Whether on a GPU.
        commands: Whether each job is followed by its command.
    """
    lines, least = [], [one for one in chosen if one.job.minimum]
    for one in chosen:
        mark = "*" if one.job.minimum else " "
        lines.append(f"{mark} {one.minutes:6.0f} min  {one.state:<14}{one.job.name}")
        lines += [f"{'':14}{shlex.join(one.job.command())}"] if commands else []
    left = [one for one in planned if one.state != STORED and one.lacks]
    for group in dict.fromkeys(one.job.group for one in left):
        lacks = [one.lacks for one in left if one.job.group == group]
        lines.append(f"  left out: {len(lacks)} of {group}, which lack {', '.join(dict.fromkeys(chain(*lacks)))}")
    done = sum(one.state == STORED for one in planned)
    lines.append(
        f"{len(planned)} jobs are declared and {done} done. To do: {len(chosen)}, {hours(chosen, gpu)} of a "
        f"{'GPU' if gpu else 'core'}; the minimum (*): {len(least)}, {hours(least, gpu)}."
    )
    due = [one for one in planned if one.due]
    if len(chosen) < len(due):
        lines.append(
            f"{len(due) - len(chosen)} more do not fit: {hours((one for one in due if one not in chosen), gpu)}."
        )
    return "\n".join(lines)


def main() -> None:
    """Print what is to be done, with commands."""
    planned = plan(read())
    print(report(planned, [one for one in planned if one.due], commands=True))


if __name__ == "__main__":
    sys.exit(main())
