"""The flags on who may use the server."""

import pytest

from mlx_flashhead.serving.network.addresses import access_of
from mlx_flashhead.serving.options import check_options, make_parser


@pytest.fixture
def access_by(tmp_path):
    """A function of flags, as the server's command parses them: → (host, access)."""

    def access_by(*flags):
        parser = make_parser()
        token_file = str(tmp_path / "token")
        args = parser.parse_args(["--model", "model", "--token-file", token_file, *flags])
        check_options(parser, args)
        return args.host, access_of(args)

    return access_by


def test_this_machine_alone_by_default(access_by, tmp_path):
    host, access = access_by()
    assert (host, access.token) == ("127.0.0.1", None)
    assert not access.origins and not access.hosts
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(
    "flags", [["--lan"], ["--host", "0.0.0.0"], ["--host", "192.168.1.5"], ["--host", "::"]]
)
def test_any_network_needs_the_token(access_by, flags):
    host, access = access_by(*flags, "--max-body-bytes", "500K")
    assert host == (flags[1] if flags[1:] else "0.0.0.0")
    assert access.token and access.token == access_by(*flags)[1].token
    assert access.max_body_bytes == 500 << 10


def test_names_and_origins_are_added(access_by):
    names = ("--allowed-hosts", "Mac.fritz.box,other", "--allowed-origins", "https://a.example")
    _, access = access_by(*names)
    assert access.hosts == {"mac.fritz.box", "other"}
    assert access.origins == {"https://a.example"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lan", "--host", "127.0.0.1"], "--host 127.0.0.1 is this machine alone: leave it out"),
        (["--allowed-origins", "*"], "--allowed-origins *: name each site"),
        (["--allowed-origins", "https://a.example/b"], "--allowed-origins https://a.example/b"),
        (["--allowed-origins", "null"], "--allowed-origins null: name each site"),
    ],
)
def test_contradictions_are_told(refused, flags, said):
    assert said in refused("server", "--model", "./absent", *flags)
