"""What a machine gains by a FlashHead and by wide steps, and each kind of step taken once."""
