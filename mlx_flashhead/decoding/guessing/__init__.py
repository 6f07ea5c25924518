"""Whoever guesses a text's next tokens."""
