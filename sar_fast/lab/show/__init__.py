"""Pictures of what was measured: overlays, heat maps, reports."""
