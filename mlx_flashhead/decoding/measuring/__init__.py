"""What a machine gains by a FlashHead and by wide steps, and each step taken once before a text."""
