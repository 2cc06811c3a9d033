# SPDX-License-Identifier: GPL-2.0-or-later
import inspect

import pytest

from luksrotd import errors


@pytest.mark.parametrize(
    "abstract",
    [
        errors.LuksrotdError,
        errors.RequestError,
        errors.RefusedError,
        errors.BusyError,
        errors.AuthorizationError,
    ],
)
def test_a_branch_of_the_tree_cannot_be_raised(abstract):
    with pytest.raises(TypeError, match=f"{abstract.__name__} is abstract"):
        abstract("cannot be")


def test_an_inherited_code_does_not_make_a_leaf():
    # Were it registered as a subclass for good, leaves() would see it in every later test: it has no code of its own.
    nameless = type("Nameless", (errors.EngineError,), {})
    with pytest.raises(TypeError, match="Nameless is abstract"):
        nameless("cannot be")


@pytest.mark.parametrize("leaf", errors.leaves().values(), ids=lambda leaf: leaf.__name__)
def test_each_leaf_carries_message_and_outcome(leaf):
    error = leaf("cannot do it")
    assert str(error) == error.message == "cannot do it"
    assert error.outcome is errors.Outcome.UNCHANGED
    assert leaf("cannot do it", outcome=errors.Outcome.UNKNOWN).outcome is errors.Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cannot use é “x”", "cannot use é “x”"),
        ("cannot use \x1b[31m\na\0b", "cannot use ?[31m?a?b"),
        ("c" * errors.MESSAGE_MAX, "c" * errors.MESSAGE_MAX),
        ("c" * (errors.MESSAGE_MAX + 1), "c" * (errors.MESSAGE_MAX - 1) + "…"),
    ],
)
def test_a_message_is_bounded_and_harmless_whatever_is_on_the_disk(text, message):
    error = errors.FormatError(text)
    assert str(error) == error.message == message


def test_leaves_finds_every_class_with_a_code_under_its_code():
    declared = {
        cls.__dict__["code"]: cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.LuksrotdError) and cls.__dict__.get("code")
    }
    assert errors.leaves() == declared
    assert declared["EngineFailed"] is errors.EngineError
    assert declared["EngineCrashed"] is errors.EngineCrashed


def test_codes_are_last_parts_of_a_bus_error_name():
    assert all(code.isascii() and code.isidentifier() and code[0].isupper() for code in errors.leaves())
