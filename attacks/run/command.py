"""The parsers of the attacking command, one for each of its attacks."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from attacks.run import explain, harden, perturb, sweep
from attacks.run.hygiene import CHECK_IMAGES, FEWEST_IMAGES
from attacks.run.subject import add_options
from train.cli import Parser, make_console, number, run_command
from train.distributed import World, connect

DESCRIPTION = "Attack a trained model by projected gradients, and tell whether what it withstands can be believed."

EXAMPLES = """
examples:
  python -m attacks.run pgd runs/mine          one attack: accuracies, pictures
  python -m attacks.run sweep runs/mine        the write-up's twelve attacks
  python -m attacks.run saliency runs/mine     where the model looks
  python -m attacks.run robust runs/mine       what adversarial training gains

Each has a --help of its own. Every report ends with checks of whether it can
be believed: accuracies that look robust for a wrong reason are told in red.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One of the command's attacks."""

    help: str
    description: str
    epilog: str
    files: str
    """What --out gets, in words."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console, World], None]


ATTACKS = {
    "pgd": Attack(
        help="one attack on every image, with pictures and a table of images",
        description=perturb.DESCRIPTION, epilog=perturb.EXAMPLES,
        files="pgd.json, pgd.csv and pictures", add_options=perturb.add_own_options, run=perturb.run,
    ),
    "sweep": Attack(
        help="the course write-up's six settings by two targets",
        description=sweep.DESCRIPTION, epilog=sweep.EXAMPLES,
        files="sweep.json, sweep.csv and pictures", add_options=lambda _: None, run=sweep.run,
    ),
    "saliency": Attack(
        help="where the model looks, and whether the maps depend on what it learned",
        description=explain.DESCRIPTION, epilog=explain.EXAMPLES,
        files="saliency.png, saliency-randomised.png and saliency.json", add_options=explain.add_own_options,
        run=explain.run,
    ),
    "robust": Attack(
        help="train an adversarial and a plain copy, and attack both",
        description=harden.DESCRIPTION, epilog=harden.EXAMPLES,
        files="both runs, robust.json, robust.csv and pictures", add_options=harden.add_own_options, run=harden.run,
    ),
}


class OwnParser(Parser):
    """Of one attack, that refuses the flags of others itself: argparse would have the outer parser do so, nameless."""

    def parse_known_args(self, *arguments: Any, **options: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def make_parser() -> argparse.ArgumentParser:
    prog, names = "python -m attacks.run", f"{{{','.join(ATTACKS)}}}"
    parser = Parser(
        prog=prog, usage=f"{prog} ATTACK CHECKPOINT... [options]", description=DESCRIPTION, epilog=EXAMPLES
    )
    choices = parser.add_subparsers(dest="attack", required=True, metavar=names, parser_class=OwnParser)
    for name, attack in ATTACKS.items():
        own = choices.add_parser(
            name, help=attack.help, prog=f"{prog} {name}", usage=f"{prog} {name} CHECKPOINT... [options]",
            description=attack.description, epilog=attack.epilog,
        )
        add_options(own, files=attack.files)
        attack.add_options(own)
        if name != "saliency":
            own.add_argument(
                "--check-images", type=number(int, least=FEWEST_IMAGES), default=CHECK_IMAGES, metavar="N",
                help=f"images of the checks at the report's end, evenly over the classes ({CHECK_IMAGES}; "
                f"at least {FEWEST_IMAGES})",
            )
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), command, argv)


def command(arguments: argparse.Namespace) -> None:
    with connect() as world:
        ATTACKS[arguments.attack].run(arguments, make_console(quiet=not world.is_main), world)
