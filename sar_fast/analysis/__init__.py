"""What SAR did to an input: recordings with and without it, overlays, heatmaps, timings, the report."""
