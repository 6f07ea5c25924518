"""Arguments: what a type takes and rejects, and how an error reads."""

import argparse

import pytest

from mlx_flashhead.common.arguments import (
    Parser,
    check,
    json_object,
    number,
    one_of,
    true_or_false,
    whole_number,
    whole_numbers,
)

WHOLE = "give a whole number of 1 or more"


@pytest.mark.parametrize(
    "type, raw, value",
    [
        (whole_number(1, or_no_limit=True), "-1", -1),
        (number(0), "0.5", 0.5),
        (number(0, 1), 1, 1.0),
        (number(0, 1, above=True), "1e-3", 0.001),
        (whole_numbers(1), "48, 96", [48, 96]),
        (json_object, '{"a": 1}', {"a": 1}),
        (true_or_false, "F", False),
        (true_or_false, "false", False),
        (true_or_false, "T", True),
        (true_or_false, "1", True),
    ],
)
def test_values(type, raw, value):
    result = type(raw)
    assert result == value
    assert result.__class__ is value.__class__


@pytest.mark.parametrize(
    "type, raw, wanted",
    [
        (whole_number(1), "0", WHOLE),
        (whole_number(1), "1.5", WHOLE),
        (whole_number(1), 2.0, WHOLE),
        (whole_number(1), True, WHOLE),
        (whole_number(1, 9), "10", "give 1 to 9"),
        (whole_number(1, or_no_limit=True), "-2", f"{WHOLE}, or -1 for no limit"),
        (number(0), "-0.1", "give a number of 0 or more"),
        (number(0), "nan", "give a number of 0 or more"),
        (number(0), "inf", "give a number of 0 or more"),
        (number(0, 1, above=True), "0", "give a number above 0, at most 1"),
        (one_of(4, 8, 16), "5", "choose 4, 8 or 16"),
        (whole_numbers(1), "4,", "give whole numbers of 1 or more such as 48,96,256"),
        (json_object, "[1]", 'give a JSON object such as {"enable_thinking": false}'),
        (true_or_false, "maybe", "give T or F"),
    ],
)
def test_errors(type, raw, wanted):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        type(raw)
    assert str(caught.value) == f"it is {raw}: {wanted}"
    with pytest.raises(ValueError) as caught:
        check("n_probes", raw, type)
    assert str(caught.value) == f"`n_probes` is {raw}: {wanted}."


@pytest.mark.parametrize(
    "words, text",
    [
        (["-n", "0"], "--number/-n is 0: give a whole number of 1 or more."),
        (["-n"], "--number/-n: expected one argument."),
        (["-n", "1", "--kind", "c"], "--kind: invalid choice: 'c' (choose from "),
        ([], "the following arguments are required: --number/-n."),
        (["-n", "1", "--other"], "unrecognized arguments: --other."),
    ],
)
def test_an_error_is_one_sentence(words, text, capsys):
    parser = Parser()
    parser.add_argument("--number", "-n", type=whole_number(1), required=True)
    parser.add_argument("--kind", choices=("a", "b"))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {text}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "line, said",
    [
        ("--model a --promt hi", "there is no --promt: did you mean --prompt?"),
        ("--model a --temperature 0.5", "there is no --temperature: did you mean --temp?"),
        ("--model a --max_tokens=5", "there is no --max_tokens: did you mean --max-tokens?"),
        ("--model a hi", "hi has no flag before it: did you mean --prompt hi?"),
        ("--model a b/c", "b/c has no flag before it: did you mean --model b/c?"),
        ("--zebra", "the following arguments are required: --model, as in program --model a."),
        ("--model a --zebra", "unrecognized arguments: --zebra."),
        ("--model a -z", "unrecognized arguments: -z."),
    ],
)
def test_a_near_miss_names_the_flag(line, said, capsys):
    parser = Parser(example="program --model a")
    parser.add_argument("--model", required=True)
    for flag in ("--prompt", "--temp", "--top-p", "--max-tokens", "--max-kv-size"):
        parser.add_argument(flag)
    with pytest.raises(SystemExit):
        parser.parse_args(line.split())
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_near_miss_of_a_subcommand(capsys):
    parser = Parser()
    parser.add_subparsers().add_parser("text").add_argument("--probes")
    with pytest.raises(SystemExit):
        parser.parse_args(["text", "--prob", "1", "--probse", "2"])
    assert capsys.readouterr().err == "error: there is no --probse: did you mean --probes?\n"
