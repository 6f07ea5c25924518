"""The head, per token: from a hidden state to logits. Arrays only."""
