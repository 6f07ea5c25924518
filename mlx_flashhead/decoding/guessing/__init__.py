"""Whoever guesses a text's next tokens, and the choice among their offers."""
