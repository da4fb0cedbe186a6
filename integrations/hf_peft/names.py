"""Which modules a PEFT configuration means by its names and patterns, as PEFT would match them.

A configuration may be a stranger's: nothing here takes longer than it has layers, names and
patterns together, or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.integrations.hf_peft.linear_pattern import LinearPattern, Work

# A key that is a name, as most are: what is escaped in it is itself, and a plain dot any character.
_NAME = re.compile(r"(\^?)((?:[\w.-]|\\[^\w\s])+)")
_KEPT = 1000
_ANY = "\n"  # in its place; it matches no line end


class Names:
    """What the names and patterns of a configuration say of modules.

    Args:
        config: `adapter_config.json`; its lists are lists of texts, its patterns dicts.

    Raises:
        TokenGateError, in all methods: a pattern has what is not known here, or takes too long.
        re.error: one is no regular expression.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._work = Work()
        self._listed = config.get("target_modules") or ()
        self._targets = self._named(self._listed)
        self._parameters = frozenset(config.get("target_parameters") or ())
        self._own_names = {each.rpartition(".")[2] for each in self._parameters}
        self._excluded = self._named(config.get("exclude_modules") or ())
        self._by_regex = isinstance(self._listed, str)
        self._saved_whole = ModulesToSave(config.get("modules_to_save") or (), self._work)
        chosen = config.get("layers_to_transform")
        self._all_layers = chosen is None or chosen == []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        self._chosen = frozenset(each for each in chosen if isinstance(each, (int, float)))
        layers = config.get("layers_pattern") or ()
        layers = [layers] if isinstance(layers, str) else layers
        self._layers = [LayerIndex(each, self._work) for each in layers]
        self._ranks = FirstPattern(config.get("rank_pattern") or {}, self._work)
        self._alphas = FirstPattern(config.get("alpha_pattern") or {}, self._work)

    def is_target(self, name: str) -> bool:
        """Whether PEFT adapts the module of this name, if its class can be adapted."""
        if self._excluded(name) or self._saved_whole.would_hold(name) or not self._targets(name):
            return False
        # A module that is listed by its whole name is adapted in whatever layer it is.
        if self._by_regex or self._all_layers or name in self._listed:
            return True
        return self._index(name) in self._chosen

    def is_target_parameter(self, name: str) -> bool:
        """Whether PEFT adapts the parameter of this name, in whatever layer it is."""
        return any(each in self._parameters for each in _ends(name, self._work))

    def holds_parameters(self, name: str) -> bool:
        """Whether a module of this name may have such parameters."""
        return any(self.is_target_parameter(f"{name}.{own}") for own in self._own_names)

    def is_saved_whole(self, names: Iterable[str]) -> bool:
        """Whether PEFT saves one of these modules whole."""
        return any(map(self._saved_whole.are, names))

    def rank(self, name: str, default: Any) -> Any:
        """What `rank_pattern` says of a layer."""
        return self._ranks.of(name, default)

    def alpha(self, name: str, default: Any) -> Any:
        """What `alpha_pattern` says of a layer."""
        return self._alphas.of(name, default)

    def _named(self, patterns: Any) -> Any:
        if isinstance(patterns, str):
            return LinearPattern(patterns, self._work).fullmatch
        known = frozenset(patterns)
        return lambda name: any(each in known for each in _ends(name, self._work))

    def _index(self, name: str) -> int | None:
        """The first number in the name, or the first behind one of the patterns."""
        if not self._layers:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
            return int(found[1]) if found else None
        return next((i for each in self._layers if (i := each.of(name)) is not None), None)


class ModulesToSave:
    """The modules that PEFT trains and saves whole."""

    def __init__(self, modules: Iterable[str], work: Work | None = None) -> None:
        self._modules, self._work = tuple(modules), work or Work()
        self._patterns = [
            LinearPattern(rf"(^|.*\.){module}($|\..*)", self._work) for module in self._modules
        ]

    def would_hold(self, name: str) -> bool:
        """Whether PEFT never adapts this module because it takes it for a part of these.

        It matches them anywhere in the name, as regular expressions.
        """
        return any(pattern.match(name) for pattern in self._patterns)

    def are(self, name: str) -> bool:
        """Whether PEFT saves the module of this name whole: by its end, not by components."""
        self._work.do(1 + len(self._modules) // 8, "modules_to_save")
        return name.endswith(self._modules)


class FirstPattern:
    """What `rank_pattern` or `alpha_pattern` says of a layer: the first key that matches counts.

    A key is a regular expression for the name or for what follows a dot of it. Which one is the
    first is what the file says, as when PEFT loads it; PEFT sorts them when it saves.
    """

    def __init__(self, patterns: Mapping[str, Any], work: Work) -> None:
        self._values, self._work = list(patterns.values()), work
        # Those that are names, by length and where any character may be: theirs is found at once.
        self._names: dict[int, dict[tuple[int, ...], dict[tuple[bool, str], int]]] = {}
        self._others: list[tuple[int, str]] = []
        self._made: dict[int, LinearPattern] = {}
        for number, key in enumerate(patterns):
            if found := _NAME.fullmatch(key):
                text = re.sub(r"\\(.)|\.", lambda each: each[1] or _ANY, found[2])
                places = tuple(at for at, character in enumerate(text) if character == _ANY)
                same = self._names.setdefault(len(text), {}).setdefault(places, {})
                same.setdefault((found[1] == "^", text), number)
            else:
                self._others.append((number, key))

    def of(self, name: str, default: Any) -> Any:
        """The value of the first that matches."""
        first = len(self._values)
        for end in _ends(name, self._work):
            for places, same in self._names.get(len(end), {}).items():
                self._work.do(1 + len(places), "rank_pattern or alpha_pattern")
                characters = list(end)
                for at in places:
                    characters[at] = _ANY
                text = "".join(characters)
                first = min(first, same.get((False, text), first))
                if end is name:  # `^` does not match behind a dot
                    first = min(first, same.get((True, text), first))
        for number, key in self._others:
            if number > first:
                break
            pattern = self._made.get(number)
            if pattern is None:
                pattern = LinearPattern(rf"(.*\.)?({key})$", self._work)
                if len(self._made) < _KEPT:  # each takes far more memory than its text
                    self._made[number] = pattern
            if pattern.match(name):
                first = number
        return self._values[first] if first < len(self._values) else default


class LayerIndex:
    """The first number in a name that is a component behind one of `layers_pattern`."""

    def __init__(self, pattern: str, work: Work) -> None:
        self._pattern, self._work = LinearPattern(pattern, work), work
        if not self._pattern.stands_alone():
            raise TokenGateError(
                f"layers_pattern={brief(pattern)} has alternatives that PEFT would take apart: put "
                "them into brackets, (?:...)."
            )

    def of(self, name: str) -> int | None:
        """None where there is none; of several, that behind the match that begins first."""
        numbers = {found.start(): int(found[1]) for found in re.finditer(r"\.(\d+)(?=\.)", name)}
        starts = [0, *(at + 1 for at, character in enumerate(name) if character == ".")]
        for start in starts if numbers else ():
            self._work.do(len(numbers), self._pattern.source)
            ends = [at for at in numbers if self._pattern.fullmatch(name, start, at)]
            if len(ends) > 1:
                raise TokenGateError(
                    f"layers_pattern={brief(self._pattern.source)} matches {name!r} in front of "
                    "several numbers: name the one module that holds the layers."
                )
            if ends:
                return numbers[ends[0]]
        return None


def only(name: str) -> str:
    """A key of these patterns that matches this layer alone: `^` does not match behind a dot."""
    return f"^{re.escape(name)}"


def _ends(name: str, work: Work) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    work.do(2 * name.count("."), "names")
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
