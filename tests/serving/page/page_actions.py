"""What a finger does on the page, and where the answers stand."""

from contextlib import contextmanager

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, question: str, *, ends: int | None = None) -> None:
    """Writes a question and sends it, and waits until ``ends`` answers have ended."""
    page.locator("#input").fill(question)
    page.locator("#send").click()
    if ends is not None:
        expect(page.locator(".stats")).to_have_count(ends)


def answers(page: Page) -> Locator:
    """The texts of the answers."""
    return page.locator(".message.assistant .body")


def becomes(page: Page, expression: str, value: object = True) -> None:
    """Waits until an expression of the page has a value: layout, fonts and scrolling come later."""
    page.wait_for_function(
        f"(value) => JSON.stringify({expression}) === JSON.stringify(value)", arg=value
    )


def tap(page: Page, name: str) -> None:
    """Taps the last button of a name."""
    page.get_by_role("button", name=name).last.tap()


@contextmanager
def settings(page: Page):
    """A block in which the settings are open."""
    page.locator("#open-settings").tap()
    yield
    tap(page, "Done")
