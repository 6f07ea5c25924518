"""The ground floor: what any folder may use, and what knows nothing of heads and models."""
