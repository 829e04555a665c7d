"""Finding the best policy for a model, on the user's own machine and prompts."""
