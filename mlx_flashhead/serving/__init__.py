"""The HTTP server: OpenAI's API for FlashHead models, and a page for browsers."""
