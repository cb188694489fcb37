"""Features of an autoencoder: where they fire, how they tell chosen from rejected, what they concern, and pair scores."""
