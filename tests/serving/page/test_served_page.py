"""The real server with the page: the command as a user starts it, in a browser and by a program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from playwright.sync_api import expect

from mlx_flashhead import convert
from model_folders import write_model

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny FlashHead checkpoint, with another one beside it."""
    folder = tmp_path_factory.mktemp("served")
    model = write_model(folder / "model", hidden_size=32)
    for name in ("tiny-flashhead", "other-flashhead"):
        convert(str(model), str(folder / name), calibration="none")
    return folder / "tiny-flashhead"


@pytest.fixture(scope="module")
def lan(checkpoint, tmp_path_factory):
    """What the command with --lan prints, once it serves."""
    token_file = tmp_path_factory.mktemp("token") / "token"
    command = [sys.executable, "-m", "mlx_flashhead.server", "--model", checkpoint, "--lan"]
    command += ["--port", "0", "--max-tokens", "40", "--token-file", token_file]
    command += ["--allow-models", checkpoint.with_name("other-flashhead")]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "?token=" in line:
                    break
            yield "".join(lines)
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def page_url(lan):
    """The address that was printed, with the token."""
    return re.search(r"http://\S+\?token=[a-z0-9-]{24}", lan)[0]


def test_code_and_address_are_printed(lan, page_url):
    assert lan.count("▄") > 50
    assert not page_url.startswith("http://0.0.0.0")


def test_page_talks_to_the_model(page_url, open_page):
    page = open_page(page_url)
    expect(page.locator("#model")).to_have_text("tiny-flashhead")
    page.locator("#input").fill("Hello")
    page.locator("#send").tap()
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    page.locator("#open-settings").tap()
    page.locator("#n_probes").fill("3")
    page.get_by_role("button", name="Done").tap()
    page.get_by_role("button", name="Answer again").tap()
    expect(page.locator(".stats")).to_contain_text("token")
    expect(page.locator(".notice[role=alert]")).to_have_count(0)
    page.locator("#open-settings").tap()
    page.locator("#dense").tap()
    page.get_by_role("button", name="Done").tap()
    page.get_by_role("button", name="Answer again").tap()
    expect(page.locator(".stats")).to_contain_text("token")
    expect(page.locator(".notice[role=alert]")).to_have_count(0)


def test_page_compares_with_dense_and_changes_the_model(page_url, open_page):
    page = open_page(page_url, "iphone")
    expect(page.locator("#model")).to_have_text("tiny-flashhead")
    page.get_by_label("Model", exact=True).select_option("other-flashhead")
    page.locator("#open-settings").tap()
    page.locator("#system").fill("Be brief.")
    page.get_by_role("button", name="Done").tap()
    page.locator("#input").fill("Hello")
    page.locator("#send").tap()
    expect(page.locator(".stats")).to_contain_text("other-flashhead")
    page.get_by_role("button", name="Compare").tap()
    # a random model without calibration writes another text
    expect(page.locator("#verdict")).to_contain_text(re.compile("are equal|differ"))
    expect(page.locator("#sides .notice")).to_have_count(0)


def test_program_needs_the_token(page_url):
    address, _, token = page_url.partition("?token=")
    messages = [{"role": "user", "content": "Hello"}]
    for key in ("wrong", token):
        client = openai.OpenAI(base_url=f"{address}v1", api_key=key, max_retries=0)
        with client:
            if key == "wrong":
                with pytest.raises(openai.AuthenticationError):
                    client.chat.completions.create(model="default_model", messages=messages)
            else:
                answer = client.chat.completions.create(model="default_model", messages=messages)
                assert answer.usage.completion_tokens > 0
