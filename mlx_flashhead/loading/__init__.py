"""A model with its FlashHead: looked up, built at first use, cached, attached."""
