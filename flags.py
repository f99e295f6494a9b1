"""The command line: argparse whose mistakes are one line, and whose --help shows every default.

Checks of one flag are its `type`: a function text -> value that raises InputError.
"""
import argparse
import math
import sys
from functools import partial

import console
from console import InputError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows each default, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with an InputError in place of its usage text. What was given is remembered: run() names the flag."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help)

    def error(self, message):
        raise InputError(f"{' '.join(message.split()).removeprefix('argument ')}; --help lists the flags")

    def _print_message(self, message, file=None):                # argparse's own is silent about a closed pipe
        (file or sys.stderr).write(message)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        console.given = {(a.option_strings or [a.dest])[0]: getattr(args, a.dest) for a in self._actions
                         if hasattr(args, a.dest)}
        return args


def number(kind, least=0, most=math.inf, above=False):
    """The argparse type of an int or float in [least, most], or in (least, most] if above, that fits into 64 bits."""
    top = min(most, 2 ** 63 - 1 if kind is int else sys.float_info.max)

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= top or (above and value == least):
            bounds = f"{'above' if above else 'of at least'} {least}"
            bounds += f" and at most {top}" * (most < math.inf or value > top)
            raise InputError(f"{text!r} must be a {'whole ' if kind is int else ''}number {bounds}")
        return value
    return convert


whole, real = partial(number, int), partial(number, float)
seed_number = whole(0, 2 ** 63 - 1)                              # what every random generator here takes


def add_machine_flags(p):
    """--device and --dtype, as pick_device takes them."""
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of the backbone; gates stay float32")
