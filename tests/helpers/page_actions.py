"""What a finger does on the page, and where the answers stand."""

from playwright.sync_api import Locator, Page

TOKEN = "k7mf-3xq2-9tzc-hd4w-p8ns"


def ask(page: Page, question: str) -> None:
    """Writes a question and sends it."""
    page.locator("#input").tap()
    page.locator("#input").fill(question)
    page.locator("#send").tap()


def answers(page: Page) -> Locator:
    """The texts of the answers."""
    return page.locator(".message.assistant .body")
