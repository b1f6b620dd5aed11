"""What may be typed behind a command: right values, boundaries and nonsense, arranged by the command's own parser."""

import argparse
import random
from collections.abc import Callable, Iterator

from commands import Command

import models

DIGITS = "9" * 400
TEXTS = (
    "", " ", "-", "-x", "--", "x", "nan", "inf", "-inf", "True", "None", "é", "１２", "\udcff", "a\nb", "a\x1b[31mb",
    "a\u202eb", "[/b]", "%s", "{}", "$HOME", "*", "a,b", "~", "~nobody-at-all/x", "x" * 300, "x" * 5000, "x/" * 200,
)  # fmt: skip
NUMBERS = (
    "0", "1", "2", "3", "8", "10", "32", "40", "-1", "0.5", "0.99", "1.5", "1e-300", "1e-320", "1e308", "1e400",
    "-0.0", "1e3", "1_000", "0x10", "4096", "4097", *(str(2**power) for power in (31, 53, 62, 63, 64, 100)),
    str(2**63 - 1), DIGITS, f"{DIGITS}/1", f"1/{DIGITS}", "8/255", "1/0", "0/1", "+1", " 1 ", "1,2,3,4,5,6,7",
    "2,3,8,8,4,3,3,1,1", "1,1,1,1,1,9,9",
)  # fmt: skip
PATHS = (
    "run", "begun", "run/best.pt", "begun/last.pt", "data", "notes.txt", "notes.txt/x", "empty", "nowhere",
    "nowhere/x.json", "x.png", "x.json", "run/config.json", "broken.pt", "broken.json", "loop", "dangling", "/dev/null",
    "/dev/full", "/proc/x", "/proc/self/mem", ".", "..", "../x", "new\nline", "\udcffile", "run/../run", "fashion-mini",
    "imagenet", "none",
)  # fmt: skip
VALUES = (*TEXTS, *NUMBERS, *PATHS)
LIKELY = ("run", "begun", "x.json", "x.png", "1", "8", "32", "40", "0.5", "fashion-mini")
"""Of those, what most arguments go on with."""


def right_values(action: argparse.Action) -> list[str]:
    """Those of its choices, or of VALUES, that the parser takes for this argument."""
    if action.choices is not None:
        return list(map(str, action.choices))
    return [value for value in (*VALUES, *models.MODELS) if action.type is None or _takes(action.type, value)]


def _takes(kind: Callable[[str], object], value: str) -> bool:
    try:
        kind(value)
    except (argparse.ArgumentTypeError, ValueError, ArithmeticError):  # the last is a bug, for `wrong` to find
        return False
    return True


def arguments_of(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], list[argparse.Action]]:
    """(positional ones, flags) but for --help."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return [a for a in actions if not a.option_strings], [a for a in actions if a.option_strings]


def each_value(command: Command) -> Iterator[list[str]]:
    """Command lines with one argument beside those that must be there: all arguments by all VALUES and choices."""
    draw = Lines(command, seed=0)
    positional, flags = arguments_of(command.parser)
    needed = [typical(action) for action in positional]
    for place, action in enumerate(positional):
        for value in dict.fromkeys((*VALUES, *right_values(action))):
            yield [*command.first, *needed[:place], value, *needed[place + 1 :]]
    for action in flags:
        for flag in action.option_strings:
            if action.nargs == 0:
                yield [*command.first, *needed, flag]
                continue
            yield [*command.first, *needed, flag]
            for value in dict.fromkeys((*VALUES, *right_values(action))):
                typed = [f"{flag}={value}"] if draw.random.random() < 0.5 else [flag, value]
                yield [*command.first, *needed, *typed]


def typical(action: argparse.Action) -> str:
    """Of a positional argument: its first choice, a model's name or a run."""
    right = right_values(action)
    return next((value for value in ("run", "simplenet") if value in right), right[0])


class Lines:
    """Random command lines of one command: mostly right ones, then something is done to some of them."""

    def __init__(self, command: Command, *, seed: int):
        self.command, self.random = command, random.Random(f"{command.name} {seed}")
        self.positional, self.flags = arguments_of(command.parser)
        self.right = {id(action): right_values(action) for action in (*self.positional, *self.flags)}

    def value(self, action: argparse.Action) -> str:
        right = self.right[id(action)]
        if right and self.random.random() < 0.9:
            liked = [value for value in right if value in LIKELY]
            return self.random.choice(liked if liked and self.random.random() < 0.8 else right)
        return self.random.choice(VALUES)

    def values(self, action: argparse.Action) -> list[str]:
        if action.nargs == 0:
            return []
        least, most = {"?": (0, 1), "*": (0, 2), "+": (1, 3)}.get(action.nargs, (1, 1))
        return [self.value(action) for _ in range(self.random.randint(least, most))]

    def placed(self, action: argparse.Action) -> list[str]:
        """Positional values: mostly one, and mostly one that lets the flags be looked at."""
        if self.random.random() < 0.15:
            return self.values(action)
        return [self.random.choice(self.right[id(action)]) if action.choices is not None else typical(action)]

    def typed(self, action: argparse.Action) -> list[str]:
        """A flag with its values."""
        flag, values = self.random.choice(action.option_strings), self.values(action)
        if len(values) == 1 and self.random.random() < 0.3:
            return [f"{flag}={values[0]}"]
        return [flag, *values]

    def next(self) -> list[str]:
        count = self.random.choice((0, 1, 1, 2, 2, 3, 5))
        flags = self.random.sample(self.flags, min(count, len(self.flags)))
        parts = [self.typed(action) for action in flags]
        parts.insert(0, [value for action in self.positional for value in self.placed(action)])
        if self.random.random() < 0.3:
            self.spoil(parts)
        if self.random.random() < 0.3:
            self.random.shuffle(parts)
        return [*self.command.first, *(word for part in parts for word in part)]

    def spoil(self, parts: list[list[str]]) -> None:
        part = self.random.choice(parts)
        how = self.random.choice(("unknown", "abbreviated", "twice", "cut", "more", "dashes", "value", "joined"))
        if how == "unknown":
            parts.append([self.random.choice(("--colour", "-q", "--Out", "—out", "---", "--=x", "--no-", "-1")), "x"])
        elif how == "twice":
            parts.append(list(part))
        elif how == "more":
            parts[0].append(self.random.choice(VALUES))
        elif how == "dashes":
            part.insert(self.random.randint(0, len(part)), "--")
        elif part and how == "abbreviated":
            part[0] = part[0][:-1]
        elif part and how == "cut":
            part.pop()
        elif part and how == "value":
            part[-1] = self.random.choice(VALUES)
        elif part and how == "joined":
            part[0] += "="
