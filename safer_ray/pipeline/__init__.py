"""The stages, what runs them, and the experiments made of them."""
