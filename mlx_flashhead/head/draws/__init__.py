"""How a token is drawn, and when that is certain: a file for each kind of draw."""
