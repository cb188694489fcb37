"""Features of an autoencoder: where they fire, what they tell apart and concern, and what they say of a pair."""
