"""A wrong command line is answered with what the command takes, what it got, and a fix."""

import pytest
from support.commands import nelbo_fails


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("evaluate run x.npz", "evaluate takes RUN, and got x.npz too; give data as --data x.npz"),
        ("train a b", "train takes [DATA], and got b too; leave it out"),
        ("decompress x.nlb --out x.npz", "needs RUN FILE --out OUT; got x.nlb --out x.npz; see"),
        ("report", "report needs RUN; got nothing; see: nelbo report --help"),
        ("explain", "explain needs RUN; got nothing"),
        ("score run", "score needs RUN [DATA] --out OUT; got run; see: nelbo score --help"),
        ("evaluate run --calls", "--calls needs a value; see: nelbo evaluate --help"),
        ("train x --epochs 3", "no option --epochs; did you mean --steps or --minutes?"),
        ("evaluate run --limit 50", "no option --limit; did you mean --target-error or --calls?"),
        ("evaluate run --step=3", "evaluate has no option --step; did you mean --steps?"),
        ("evaluate run --colour", "no option --colour; see: nelbo evaluate --help"),
        ("evaluate run --sampler no", 'Choose from: "left-to-right", "greedy", "margin"'),
        ("evaluate run --guidance 3", "guidance has no likelihood"),
        ("report run --steps 10,20", "whole number; got '10,20'; give one, such as 10"),
        ("evaluate run --calls many", "--calls of evaluate must be a number; got 'many'; see"),
        ("evaluate run --target-errors 3", "did you mean --target-error?"),
    ],
)
def test_a_wrong_argument_is_answered_with_what_the_command_takes(line, says, capsys):
    assert says in nelbo_fails(capsys, *line.split())
