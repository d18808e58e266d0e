"""What is said where there is no terminal: lines now and then, none for what is short."""

import re

import pytest

import main
from machine import progress

from .conftest import flags


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes as it is told."""
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now
    monkeypatch.setattr(progress, "time", told := Clock())
    return told


def test_a_line_after_two_seconds_at_every_tenth_and_at_the_end(clock, capsys):
    def items():
        for item in range(20):
            clock.now += 0.5
            yield item
    assert list(progress.progress_bar(items(), desc="counting", total=20, unit="image")) == [*range(20)]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting: 4 of 20, 2 images/s, 8 s left"                # two seconds have passed
    assert lines[1] == "counting: 6 of 20, 2 images/s, 7 s left"
    assert lines[-1] == "counting: 20 of 20, 2 images/s, done in 10 s" and len(lines) == 9


def test_what_is_short_says_nothing(clock, capsys):
    with progress.progress_bar(total=100, desc="filling") as bar:
        for _ in range(10):
            clock.now += 0.19
            bar.update(10)
    assert list(progress.progress_bar([1, 2], desc="few")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_what_is_broken_off_is_not_called_done(clock, capsys):
    with pytest.raises(OSError), progress.progress_bar(total=10, desc="filling") as bar:
        clock.now += 3
        bar.update(5)
        bar.update(5)
        raise OSError
    assert capsys.readouterr().err.splitlines() == ["filling: 5 of 10, 1.67 items/s, 3 s left"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "60 min"),
                                               (11_100, "3 h 05 min")])
def test_times_are_for_people(seconds, text):
    assert progress.lasting(seconds) == text


def test_a_training_without_a_terminal_tells_of_itself(mitstates, tmp_path, capsys):
    assert main.main(flags("mitstates", mitstates, tmp_path / "logs", num_iters=5, log_frequency=2)) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in told] == ["step 2 of 5", "step 4 of 5"]
    assert all(re.fullmatch(r"step \d of 5: loss \d+\.\d{4}, \d+ queries/s, \d+ s left", line) for line in told)
