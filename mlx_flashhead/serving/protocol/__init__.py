"""OpenAI's API: requests and what they may ask for, answers, errors."""
