"""Finding a better policy for a model, on the user's own machine and prompts."""
