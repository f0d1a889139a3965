"""Which passes there are, and in which order the chosen ones run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from sparsec.compiler.quiet import one_line
from sparsec.errors import UsageError
from sparsec.passes.base import TIERS, Pass, Tier, in_words, met, unmet
from sparsec.plan import Plan, first_error

GROUP = "sparsec.passes"


def known_passes() -> dict[str, type[Pass]]:
    """Every installed pass by name: ours and third parties', from the entry-point group ``sparsec.passes``.

    Raises:
        UsageError: a third party's pass cannot be imported or is none, or a name is taken twice.
    """
    return {name: _load(entry) for name, entry in _entries().items()}


def _entries() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if found.setdefault(entry.name, entry).value != entry.value:
            raise UsageError(
                f"{found[entry.name].value} and {entry.value} are both named {entry.name!r}: uninstall one"
            )
    return found


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        loaded = entry.load()
    except Exception as error:
        raise UsageError(
            f"the pass {entry.name!r} ({entry.value}) cannot be imported ({one_line(error)}): uninstall it"
        ) from None
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and loaded.name == entry.name):
        raise UsageError(f"{entry.value} is no pass named {entry.name!r}: uninstall it")
    return loaded


def suggest(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'?``, or the known words where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def make_passes(configs: Mapping[str, Mapping[str, Any]]) -> list[Pass]:
    """Configured passes in the order they run.

    Args:
        configs: options by pass name.

    Raises:
        UsageError: unknown pass or option, wrong value, conflict, or an order that cannot hold.
    """
    known = _entries()
    made: list[Pass] = []
    for name, options in configs.items():
        if name not in known:
            raise UsageError(f"there is no pass {name!r}: {suggest(name, list(known))}")
        made.append(make_pass(_load(known[name]), options))
    return in_order(made)


def with_tier(configs: Mapping[str, Mapping[str, Any]], tier: Tier) -> dict[str, dict[str, Any]]:
    """Options by pass name with what ``--tier`` sets below those that are given.

    Raises:
        UsageError: an unknown pass, or one that cannot be had for so little.
    """
    known, filled = _entries(), {}
    for name, options in configs.items():
        if name not in known:
            raise UsageError(f"there is no pass {name!r}: {suggest(name, list(known))}")
        kind = _load(known[name])
        if tier not in kind.presets and TIERS.index(kind.tier) > TIERS.index(tier):
            least = next(iter(kind.presets), kind.tier)
            raise UsageError(f"{name} is not to be had at tier {tier}: drop it, or give --tier {least}")
        filled[name] = {**kind.presets.get(tier, {}), **options}
    return filled


def make_pass(kind: type[Pass], options: Mapping[str, Any]) -> Pass:
    """One pass with its options checked."""
    fields = list(kind.model_fields)
    for option in options:
        if option not in fields:
            raise UsageError(f"{kind.name} has no option {option!r}: {suggest(option, fields)}")
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise UsageError(f"{kind.name}.{first_error(error)}") from None


def in_order(passes: Sequence[Pass]) -> list[Pass]:
    """Stable topological order by ``after``."""
    names = {each.name for each in passes}
    for each in passes:
        for other in each.conflicts:
            if other in names:
                raise UsageError(f"{each.name} and {other} exclude each other: drop one")
    waiting, done = list(passes), []
    while waiting:
        ready = next((p for p in waiting if not any(w.name in p.after for w in waiting)), None)
        if ready is None:
            raise UsageError(f"these passes each want to run after another: {', '.join(p.name for p in waiting)}")
        waiting.remove(ready)
        done.append(ready)
    return done


def check_needs(passes: Sequence[Pass], plan: Plan) -> None:
    """Every need is met, by the model or by a pass before.

    Args:
        passes: in the order they run.
        plan: the unchanged model's.

    Raises:
        UsageError: one is not; says which pass meets it.
    """
    have = met(plan)
    for each in passes:
        for any_of in unmet(have, each.needs):
            givers = [
                name
                for name, kind in known_passes().items()
                if not set(any_of).isdisjoint(kind.gives) and set(any_of).isdisjoint(kind.needs)
            ]
            others = f"add one of {', '.join(givers)} to --passes" if givers else "name another model or pass"
            raise UsageError(f"{each.name} needs {in_words((any_of,))[0]}: {others}")
        have |= set(each.gives)
