from __future__ import annotations

import pickle
import re

import pytest

from moeplan import errors


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    drawn = re.findall(r"[├└│ ]*[─ ]*(\w+(?:Error))", errors.__doc__ or "")
    kinds = set(errors.__all__) - {"FieldProblem"}
    assert set(drawn) == kinds
    for name in kinds:
        assert issubclass(getattr(errors, name), errors.MoeplanError)
        assert getattr(errors, name).exit_code == 2


def test_input_errors_stand_under_one_class():
    for kind in (
        errors.SpecError,
        errors.TraceError,
        errors.PlanError,
        errors.ProfileError,
        errors.UnknownNameError,
    ):
        assert issubclass(kind, errors.InputError)
    for kind in (errors.InfeasibleError, errors.ExportError, errors.MissingExtraError):
        assert not issubclass(kind, errors.InputError)


def test_an_unknown_name_is_answered_with_the_list_and_a_guess():
    error = errors.UnknownNameError("planner", "Greedyy", ["joint", "greedy"])
    assert str(error) == "planner 'Greedyy' is not known; did you mean 'greedy'? choose one of: greedy, joint"
    assert "did you mean" not in str(errors.UnknownNameError("planner", "xyz", ["joint"]))


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(errors.MissingExtraError, match=r"reading a.pt needs the 'torch' extra.*-e '\.\[torch\]'"):
        raise errors.MissingExtraError("reading a.pt", "torch")


def test_programs_read_from_attributes_what_people_read_from_the_message():
    error = errors.UnknownNameError("planner", "Greedyy", ["joint", "greedy"])
    assert (error.kind, error.name, error.known) == ("planner", "Greedyy", ("greedy", "joint"))
    missing = errors.MissingExtraError("reading a.pt", "torch")
    assert (missing.what, missing.extra) == ("reading a.pt", "torch")


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownNameError("planner", "x", ["joint"]),
        errors.UnknownNameError("planner", "eplb", ["greedy"], "greedy"),
        errors.MissingExtraError("reading a.pt", "torch"),
        errors.SpecError("ranks (0): too few", [errors.FieldProblem("ranks", 0, "too few")]),
    ],
)
def test_errors_go_from_process_to_process_as_they_are(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
