"""Reward models: text to tokens, tokens to rewards and hidden states, and how they are trained."""
