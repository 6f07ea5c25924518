"""What the tests share: models' folders, how a command runs, a Hub, and quiet libraries."""

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports transformers or tokenizers: notices would hide a test's own output, and
# tokenizers warns whenever a test starts a process after it has used its threads.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests run in as many processes as there are cores, and numpy's threads would wait for these.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Each program that a test starts imports thousands of modules, which takes twice as long where they
# are compiled each time: some environments forbid to keep what is compiled.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
# Programs that a test starts see this checkout. Nothing asks the Hub, but the tests' own one.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
os.environ["HF_HUB_OFFLINE"] = "1"
# On a CPU MLX starts a C++ compiler for each formula of `mx.compile` that is new on the machine,
# which takes a second. Only tests marked `compiled` do so there, and no program that a test starts.
if sys.platform != "darwin":
    os.environ["MLX_DISABLE_COMPILE"] = "1"

# A script in the background ignores Ctrl-C, and one under nohup the end of its terminal. So would
# every program that a test starts and interrupts: they inherit it, but no handler of Python's.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)

import huggingface_hub
import mlx.core as mx
import pytest
from filelock import FileLock

import mlx_flashhead
from fetch_model import fetch
from loopback_hub import TOKEN, Account, LoopbackHub
from model_folders import write_model
from quick_builds import build_quickly


def pytest_collection_modifyitems(items):
    """The real model's files come first: they take longest, and two processes share the files."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="session")
def real_model_folder() -> Path:
    """SmolLM2-135M-Instruct in float32, built once per machine.

    Its place is ``$MLX_FLASHHEAD_TEST_CACHE``, by default ``~/.cache/mlx_flashhead``.
    """
    cache = Path.home() / ".cache" / "mlx_flashhead"
    named = os.environ.get("MLX_FLASHHEAD_TEST_CACHE")
    if named:
        cache = Path(named)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # The tests run in several processes.
        with FileLock(cache / "smollm2.lock"):
            return fetch("smollm2", cache / "smollm2")
    except (ValueError, OSError) as error:
        pytest.fail(f"{error} (Tests without the real model: -m 'not real'.)", pytrace=False)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A tiny model's folder, not converted. No test changes it."""
    return write_model(tmp_path_factory.mktemp("dense") / "model", tied=False, hidden_size=128)


@pytest.fixture(scope="session")
def converted(dense, tmp_path_factory):
    """The folder of the same model with a FlashHead of 4 probes."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    mlx_flashhead.convert(str(dense), str(folder), n_probes=4, calibration="none", progress=False)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command or a script: → (exit code, standard output and error)."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}

    def run(command, *arguments):
        if isinstance(command, str):
            command = importlib.import_module(f"mlx_flashhead.{command}")
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_tuned() -> Iterator[None]:
    """A tiny model would stay dense, after seconds of measuring: no test would show a FlashHead."""
    with pytest.MonkeyPatch.context() as patch:
        # It counts for programs that the tests start, too.
        patch.setenv("MLX_FLASHHEAD_TUNING", "off")
        yield


@pytest.fixture(autouse=True)
def _compiled(request) -> Iterator[None]:
    """Tests with the mark `compiled` run `mx.compile` as users do, on every machine."""
    if (
        "MLX_DISABLE_COMPILE" not in os.environ
        or request.node.get_closest_marker("compiled") is None
    ):
        yield
        return
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(autouse=True)
def flash_head_home(tmp_path_factory) -> Iterator[Path]:
    """Where FlashHeads are stored: for each test a place of its own, never the user's."""
    home = tmp_path_factory.mktemp("flash_heads") / "home"
    # A test may undo its own patches.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FLASHHEAD_HOME", str(home))
        yield home


@pytest.fixture
def quick(monkeypatch):
    """The build of a FlashHead takes a second."""
    build_quickly(monkeypatch)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub on this machine, which this process is logged in to as "me" of the group "ours"."""
    with LoopbackHub() as hub:
        hub.accounts[TOKEN] = Account("me", organisations=("ours",))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        cache = tmp_path_factory.mktemp("hub_cache")
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(cache)),
            ("HF_TOKEN_PATH", str(cache / "token")),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # Its settings are those of when it was opened.
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
