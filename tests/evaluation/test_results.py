"""How a benchmark ends: what it tells whoever stopped it or gave it something wrong."""

import pytest

from slotmemory.errors import InputError
from slotmemory.evaluation.results import status_of


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(("keeps", "told"), [(True, "goes on from here"), (False, "starts again")])
def test_who_stops_a_benchmark_is_told_what_the_same_command_will_do(capsys, keeps, told):
    assert status_of(raising(KeyboardInterrupt()), keeps) == 130
    assert told in capsys.readouterr().err


def test_bad_input_is_one_line_and_not_a_success(capsys):
    assert status_of(raising(InputError("--streams 0: at least one is needed"))) == 2
    assert capsys.readouterr().err == "--streams 0: at least one is needed\n"
    assert status_of(lambda: None) == 0
