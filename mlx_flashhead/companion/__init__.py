"""A FlashHead apart from its model: found, built at first use, kept, and attached."""
