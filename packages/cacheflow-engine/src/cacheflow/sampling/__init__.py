"""From logits to tokens: processors, log probabilities, random numbers, the choice. Knows no model, no cache and no text."""
