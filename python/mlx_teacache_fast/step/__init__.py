"""One generation: which steps compute, and what a skipped one gets. Names no model and imports no mflux."""
