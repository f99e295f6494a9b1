"""Does a student's function do what its docstring says? `verdict` runs it on all inputs of cases.py, from easy to odd,
and says in one line what became of it: whatever the function does, no traceback comes back.
"""
import inspect
import math
import traceback

import torch

from lesson.cases import CHECKS

RIGHT, NOT_YET = "right", "not done yet"
ODD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)        # what odd values raise


def verdict(name, function):
    """"right", "not done yet", or "wrong: " with the first wrong input, what was expected, what came, and what mistake
    it looks like."""
    if not callable(function):
        return f"wrong: the file has no function {name}"
    said, inner = first_wrong(name, function), inspect.unwrap(function)
    called = inner.__code__.co_names if inspect.isfunction(inner) and said.startswith("wrong") else ()
    for other in set(called) & set(CHECKS) - {name}:             # the exercises that it calls
        helper = inner.__globals__.get(other)
        if callable(helper) and first_wrong(other, helper).startswith("wrong"):
            return f"{said} (your {other} is wrong too: mend that first)"
    return said


def first_wrong(name, function):
    check = CHECKS[name]
    for first, (arguments, special) in enumerate(check.cases):
        given = copied(arguments)
        got, wanted = attempt(function, given), check.right(*copied(arguments))
        if isinstance(got, NotImplementedError) and not str(got):                # torch raises it too, with a text
            return unfinished(got, name)
        parameters = inspect.signature(check.right).parameters
        wrong = f"wrong: for {', '.join(f'{p}={show(value)}' for p, value in zip(parameters, arguments))}: "
        if any(before is not None and difference(after, before) for after, before in zip(given, arguments)):
            return wrong + "it changes its arguments; make something new (a = a + b, not a += b)"
        if not same(got, wanted):
            like = likeness(check, function, first)
            hint = f"; looks like {like}" if like else f"; note: {special}" if special else ""
            if isinstance(got, BaseException):
                return f"{wrong}expected {show(wanted)}, {raised(got, function)}{hint}"
            return wrong + difference(got, wanted) + hint
    return RIGHT


def copied(arguments):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def attempt(function, arguments):
    """What it returned, or the exception that it raised."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return error


def same(got, wanted):
    if isinstance(got, BaseException) or isinstance(wanted, BaseException):
        return type(got) is type(wanted)
    return difference(got, wanted) is None


def likeness(check, function, first):
    """The mistake that does what a student's function does, up to its first wrong result and most often behind it."""
    done, best, most = {}, None, 0

    def agrees(mistake, case):
        arguments = check.cases[case][0]
        if case not in done:
            done[case] = attempt(function, copied(arguments))
        return same(done[case], attempt(mistake, copied(arguments)))

    for text, mistake in check.mistakes.items():
        if agrees(mistake, first) and all(agrees(mistake, case) for case in range(first)):
            often = sum(agrees(mistake, case) for case in range(len(check.cases)))
            best, most = (text, often) if often > most else (best, most)
    return best


def unfinished(error, name):
    """Whose `raise NotImplementedError` this is: the exercise's, or that of another which it calls."""
    last = [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1:]
    return f"{NOT_YET}: it calls {last[0]}, which is not done" if last and last[0] != name else NOT_YET


# ---------------------------------------------------------------------------------------------------------------------
# Values and exceptions of any kind, in few words
# ---------------------------------------------------------------------------------------------------------------------

def difference(got, wanted):
    """What is wrong with a value, whatever it is; None if nothing is. NaN equals NaN: a mistake may make it."""
    try:
        return compared(got, wanted)
    except ODD:                                                  # a tensor without values, a class that breaks
        return f"expected {show(wanted)}, got {show(got)}, which cannot be compared with it"


def compared(got, wanted):
    if got is None:
        return f"expected {show(wanted)}, got None (no `return`?)"
    if isinstance(wanted, tuple):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            return f"expected {len(wanted)} values, got {kind(got)}"
        each = [(place, compared(a, b)) for place, (a, b) in enumerate(zip(got, wanted), 1)]
        return next((f"value {place} of {len(wanted)}: {said}" for place, said in each if said), None)
    if kind(got) != kind(wanted):
        return f"expected {kind(wanted, True)}, got {kind(got, True)}: {show(got)}"
    got, wanted = (torch.as_tensor(value).detach().cpu() for value in (got, wanted))
    got = got.reshape(wanted.shape)                              # of one number
    x, y = got.double(), wanted.double()
    tolerance = 1e-6 * y.abs().clamp(min=1.0) if wanted.is_floating_point() else torch.zeros(())
    alike = (x == y) | ((x - y).abs() <= tolerance) & y.isfinite() | (x.isnan() & y.isnan())
    if alike.all():
        return None
    if x.numel() > 16:
        place = (~alike).nonzero()[0].tolist()
        return f"expected {show(y[tuple(place)])} at {place}, got {show(x[tuple(place)])}"
    if show(got) == show(wanted):                                # unlike in a later digit
        return f"expected {wanted.tolist()!r}, got {got.tolist()!r}"
    return f"expected {show(wanted)}, got {show(got)}"


def kind(value, exact=False):
    """What sort of value it is; one that is not like another's kind cannot be equal to it. A tensor with one element
    counts as a number, unless its exact shape is asked for."""
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value) if isinstance(value, (bool, int, float)) else value
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return f"a value of type {type(value).__name__}"
    if value.ndim > (not exact) or value.numel() != 1:
        return f"a {'bool ' * (value.dtype == torch.bool)}tensor of shape {tuple(value.shape)}"
    return "True or False" if value.dtype == torch.bool else "a number"


def show(value, longest=160):
    """A value for one line: tensors as lists, numbers with six digits."""
    try:
        value = value.detach().cpu().tolist() if isinstance(value, torch.Tensor) else value
        if isinstance(value, (list, tuple)):
            text = ", ".join(show(x, math.inf) for x in value)
            text = f"({text})" if isinstance(value, tuple) else f"[{text}]"
        else:
            text = f"{value:.6g}" if isinstance(value, float) else " ".join(repr(value).split())
    except ODD:                                                  # a repr of the student's own
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest - 3]}..."


def raised(error, function):
    """A student's exception in a few words, with the line in which it happened."""
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = " ".join("".join(traceback.format_exception_only(error)).split())                 # whatever its __str__ does
    return f"raised {text[:200]}" + (f" (line {lines[-1]} of the file)" if lines else "")
