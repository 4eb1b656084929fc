"""Decisions of a search in words, and its outcome. Margins and standard errors are paired, by image and seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import kdcore

from .chains import DIRECT, STUDENT, Chain
from .study import Study

NAMED = 4
"""Chains that a sentence names."""


def started(study: Study) -> kdcore.Choice:
    """The direct student is the first to be delivered."""
    seeds = f", mean of {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
    text = f"{study.chains.name(DIRECT)}, the direct student: {_share(study, DIRECT)} on the monitor split{seeds}"
    return kdcore.Choice(text, delivered(study, DIRECT))


def between(study: Study, chosen: Chain, other: Chain, how: str, best: Chain) -> kdcore.Choice:
    """The chain ``chosen`` and the other, with the points between them; ``best`` is what a run would deliver now."""
    text = f"{study.chains.name(chosen)} {how} {study.chains.name(other)}"
    found = kdcore.paired_difference(study.students(chosen), study.students(other))
    if math.isnan(found.mean):
        return kdcore.Choice(f"{text}: no accuracy to compare", delivered(study, best))
    return kdcore.Choice(text, delivered(study, best), found.mean, found.error)


def left_out(study: Study, chains: Sequence[Chain], best: Chain) -> Iterable[kdcore.Choice]:
    """Says which of these chains did not fit the budget, and which were pruned, with the numbers."""
    unpaid = {chain: _over(study, study.unpaid[chain]) for chain in chains if chain in study.unpaid}
    pruned = {chain: _below(study, *study.pruned[chain]) for chain in chains if chain in study.pruned}
    for why, group in (("over the budget", unpaid), ("weak assistants", pruned)):
        told = [f"{study.chains.name(chain)} ({about})" for chain, about in group.items()]
        if told:
            more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
            yield kdcore.Choice(f"left out, {why}: {', '.join(told[:NAMED])}{more}", delivered(study, best))


def _over(study: Study, broken: Mapping[str, float]) -> str:
    """E.g. ``with it 14 of 12 stages``."""
    budget = study.options.budget
    return "with it " + ", ".join(f"{total:.4g} of {getattr(budget, name):g} {name}" for name, total in broken.items())


def _below(study: Study, path: Chain, found: kdcore.Difference) -> str:
    """E.g. ``10-4 is 2.10 ± 0.52 points below the best student``."""
    error = 0.0 if found.error is None else 100 * found.error
    return f"{study.chains.path_name(path)} is {-100 * found.mean:.2f} ± {error:.2f} points below the best student"


def next_best(study: Study, best: Chain) -> Chain | None:
    """The best of the other chains; of equal ones the first trained."""
    return max((chain for chain in study.trained if chain != best), key=study.worth, default=None)


def delivered(study: Study, chain: Chain) -> kdcore.ResultRef:
    """The chain's student of the first seed; the best of the seeds would be chosen by noise."""
    return study.chains.stage((*chain, STUDENT), study.seeds[0])["student"]


def outcome(study: Study, best: Chain) -> kdcore.Outcome:
    """The chosen chain's student, every chain's students as replicates, and what was trained."""
    chains = [best, *(chain for chain in study.trained if chain != best)]
    replicates = {study.chains.name(chain): _refs(study, chain) for chain in chains}
    if study.options.baseline:
        without = " and ".join(spec.name.rpartition("/")[2] for spec in study.chains.run.controllers)
        for chain in chains:
            replicates[f"{study.chains.name(chain)} without {without}"] = _refs(study, chain, controlled=False)
    teacher = study.chains.stage(DIRECT, study.seeds[0])["teacher"]
    return kdcore.Outcome(delivered(study, best), teacher, _evidence(study), _note(study, best), replicates)


def _refs(study: Study, chain: Chain, controlled: bool = True) -> tuple[kdcore.ResultRef, ...]:
    return tuple(member.ref for member in study.students(chain, controlled))


def _evidence(study: Study) -> dict[str, float]:
    learners = [r for r in study.results.values() if {"student", "teacher"} & r.members.keys()]
    times = len(study.seeds) * (2 if study.options.baseline else 1)
    alone = times * sum(len(chain) + 2 for chain in study.trained)
    alone += len(study.seeds) * sum(len(study.prefixes(chain)) + 1 for chain in study.pruned)
    return {
        "chains": len(study.trained),
        "chains_skipped": len(study.unpaid) + len(study.pruned),
        "stages": len(learners),
        "stages_without_sharing": alone,
        "controls": len(study.results) - len(learners),
    }


def _note(study: Study, best: Chain) -> str:
    name, evidence = study.chains.name, _evidence(study)
    parts = [f"Chosen is {name(best)}, with {_share(study, best)} on the monitor split."]
    if best != DIRECT:
        found = kdcore.paired_difference(study.students(best), study.students(DIRECT))
        parts.append(f"The direct student {name(DIRECT)} has {_share(study, DIRECT)} ({_points(found)}).")
    if len(study.seeds) > 1:
        parts.append(f"Means of {len(study.seeds)} seeds; delivered is the first one's student.")
    shared, alone = evidence["stages"], evidence["stages_without_sharing"]
    parts.append(f"{shared} stages were asked for, without sharing {alone}.")
    for why, group in (("did not fit the budget", study.unpaid), ("began with a weak assistant", study.pruned)):
        if group:
            parts.append(f"{len(group)} {'chain' if len(group) == 1 else 'chains'} {why}.")
    if spent := study.spent():
        parts.append(f"Spent: {', '.join(f'{total:.4g} of {limit:g} {name}' for name, total, limit in spent)}.")
    return " ".join(parts)


def _share(study: Study, chain: Chain) -> str:
    accuracy = study.accuracy(chain)
    return "no accuracy" if math.isnan(accuracy) else f"{accuracy:.2%}"


def _points(found: kdcore.Difference) -> str:
    error = "" if found.error is None else f", standard error {100 * found.error:.2f}"
    return f"{100 * found.mean:+.2f} points{error}"
