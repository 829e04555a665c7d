"""The only folder that imports mflux: the families that can be gated, and how a pipeline is hooked."""
