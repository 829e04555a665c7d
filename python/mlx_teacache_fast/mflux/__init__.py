"""The only folder that imports mflux: ``patch`` puts gating into a pipeline, one file per family says how."""
