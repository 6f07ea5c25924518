"""How close FlashHead comes to the dense head."""
