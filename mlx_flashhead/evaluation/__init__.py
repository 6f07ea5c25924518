"""How close an unverified FlashHead comes to the dense head."""
