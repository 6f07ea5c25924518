"""The flags on who may use the server."""

import re

import pytest

from mlx_flashhead.serving.network.access import is_token
from mlx_flashhead.serving.network.addresses import access_of
from mlx_flashhead.serving.options import check_options, make_parser


@pytest.fixture
def parse(tmp_path):
    """A function that parses flags as the server's command does."""

    def parse(*flags):
        parser = make_parser()
        args = parser.parse_args(
            ["--model", "model", "--token-file", str(tmp_path / "token"), *flags]
        )
        check_options(parser, args)
        return args

    return parse


def test_this_machine_alone_by_default(parse, tmp_path):
    args = parse()
    access = access_of(args)
    assert (args.host, access.token) == ("127.0.0.1", None)
    assert not access.origins and not access.knows_host("mac.local")
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(
    "flags", [["--lan"], ["--host", "0.0.0.0"], ["--host", "192.168.1.5"], ["--host", "::"]]
)
def test_any_network_needs_the_token(parse, flags):
    args = parse(*flags)
    access = access_of(args)
    assert args.host == (flags[1] if flags[1:] else "0.0.0.0")
    assert is_token(access.token)
    assert access_of(args).token == access.token


def test_the_largest_body_is_a_rule(parse):
    for flags in ([], ["--lan"]):
        assert access_of(parse(*flags, "--max-body-bytes", "500K")).max_body_bytes == 500 << 10


def test_names_and_origins_are_added(parse):
    args = parse("--allowed-hosts", "Mac.fritz.box,other", "--allowed-origins", "https://a.example")
    access = access_of(args)
    assert access.knows_host("mac.fritz.box:8080") and access.knows_host("other")
    assert access.origins == {"https://a.example"}


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--lan", "--host", "127.0.0.1"], "--host 127.0.0.1 is this machine alone: leave it out"),
        (["--allowed-origins", "*"], "--allowed-origins *: name each site"),
        (
            ["--allowed-origins", "https://a.example/path"],
            "--allowed-origins https://a.example/path",
        ),
        (["--allowed-origins", "null"], "--allowed-origins null: name each site"),
    ],
)
def test_contradictions_are_told(parse, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        parse(*flags)
    assert end.value.code == 2
    assert sentence in re.sub(r"\s+", " ", capsys.readouterr().err)
