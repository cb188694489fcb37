"""Features of an autoencoder: where they fire, how they tell chosen from rejected, what they concern, what they say of a pair."""
